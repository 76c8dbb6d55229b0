"""Inputs that the model refuses, and what it says of them."""

import math

import pytest
import torch
from helpers.models import small_inputs, small_model

import input_checks_detris
from benchmarks.counting import Operations
from input_checks_detris import can_be_read

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "got phrases but no pixel_values.* give pixel_values too"),
        ({"input_ids": None}, "got images but no input_ids.* give input_ids too"),
        ({"pixel_values": torch.zeros(2, 3, 70, 70)}, r"\(2, 3, 70, 70\) but .* \(images, 3, 56, 56\).*image_size="),
        ({"pixel_values": torch.zeros(2, 1, 56, 56)}, r"\(2, 1, 56, 56\) but .* \(images, 3, 56, 56\)"),
        ({"pixel_values": torch.zeros(3, 56, 56)}, r"\(3, 56, 56\) but .* \(images, 3, 56, 56\)"),
        ({"pixel_values": torch.zeros(0, 3, 56, 56)}, r"batch is empty \(0 images, 2 phrases\)"),
        ({"input_ids": torch.zeros(0, 7, dtype=torch.long)}, r"batch is empty \(2 images, 0 phrases\)"),
        ({"input_ids": torch.tensor([62, 5, 63])}, r"input_ids has shape \(3,\)"),
        ({"pixel_values": torch.zeros(1, 3, 56, 56)}, "2 phrases for 1 images: give image_index"),
        (
            {"image_index": torch.tensor([0])},
            r"image_index has shape \(1,\).*: give one whole number for each",
        ),
        ({"image_index": torch.tensor([[0, 1]])}, r"image_index has shape \(1, 2\)"),
        ({"image_index": torch.tensor([0, 2])}, r"image_index is \[0, 2\].* out of range: there are 2 images"),
        ({"image_index": torch.tensor([-1, 0])}, r"image_index is \[-1, 0\].* out of range"),
        ({"image_index": torch.tensor([0.0, 1.0])}, "image_index .*float32"),
        ({"image_index": torch.tensor([False, True])}, "image_index .*bool"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \(2, 5\)"),
        ({"labels": torch.zeros(56, 56)}, r"labels has shape \(56, 56\): give one mask .* each of the 2 phrases"),
        ({"labels": torch.zeros(3, 56, 56)}, r"labels has shape \(3, 56, 56\): give one mask"),
        ({"labels": torch.zeros(2, 1, 56, 56)}, r"labels has shape \(2, 1, 56, 56\): give one mask"),
        ({"labels": torch.zeros(2, 480, 640)}, r"labels has shape \(2, 480, 640\): give one mask \(56, 56\)"),
        ({"labels": torch.zeros(2, 56, 56, dtype=torch.complex64)}, "labels has the type torch.complex64"),
        (
            {"encoded_text": (torch.zeros(2, 7, 24), torch.zeros(3, 20))},
            r"encoded_text has the shapes .*\(3, 20\)\]: give what encode_text .*, \[\(2, 7, 24\), \(2, 20\)\]",
        ),
        ({"encoded_text": (torch.zeros(2, 5, 24), torch.zeros(2, 20))}, r"encoded_text has the shapes \[\(2, 5, 24\)"),
        ({"encoded_text": (torch.zeros(2, 7, 24),)}, r"encoded_text has the shapes \[\(2, 7, 24\)\]"),
        (
            {"encoded_text": (torch.zeros(2, 7, 24), torch.zeros(2, 20)), "adapter_names": ["default"] * 2},
            "encoded_text and adapter_names are given.* give one",
        ),
    ],
)
def test_a_bad_input_is_named_with_its_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**small_inputs(2) | change)


@pytest.mark.parametrize("value", [255, -100, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("training", [False, True])
def test_labels_outside_0_to_1_are_refused(value, training):
    labels = torch.zeros(2, 56, 56)
    labels[1, 20, 30] = value
    with pytest.raises(ValueError, match="labels holds values from .*: give 1 inside the mask, 0 outside"):
        small_model().train(training)(**small_inputs(2), labels=labels)


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors count as those of a GPU, whose numbers cannot be read without waiting for it."""
    monkeypatch.setattr(input_checks_detris, "can_be_read", lambda tensor: False)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("value", [255, -100, math.nan])
@pytest.mark.parametrize("training", [False, True])
def test_labels_that_cannot_be_read_make_the_loss_nan(value, training):
    """The loss stops the run."""
    model, labels = small_model().train(training), torch.zeros(2, 56, 56)
    labels[1, 0, 1] = value  # a pixel that nearest-neighbour sampling leaves out
    assert model(**small_inputs(2), labels=labels).loss.isnan()
    assert model(**small_inputs(2), labels=labels.clamp(0, 1).nan_to_num()).loss.isfinite()


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("image_index", [[0, 2], [-1, 0]])
def test_an_image_index_that_cannot_be_read_is_checked_on_the_gpu(image_index):
    with pytest.raises(RuntimeError, match="image_index is out of range: images are counted from 0"):
        small_model()(**small_inputs(2), image_index=torch.tensor(image_index))


def test_numbers_are_read_on_the_cpu_and_outside_a_graph(monkeypatch):
    assert can_be_read(torch.zeros(1)) and not can_be_read(torch.zeros(1, device="meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not can_be_read(torch.zeros(1))


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("encoded", [False, True])
def test_nothing_is_read_from_the_gpu(training, encoded):
    model = small_model().train(training)
    inputs = small_inputs(3, 2) | {"image_index": torch.tensor([0, 1, 1]), "labels": torch.zeros(3, 56, 56)}
    encoded_text = model.encode_text(inputs["input_ids"]) if encoded else None
    on_gpu = [*inputs.values(), *(encoded_text or ()), *model.parameters(), *model.buffers()]
    with Operations(on_gpu) as operations:
        output = model(**inputs, encoded_text=encoded_text)
        output.loss.backward()
    assert operations.launches > 100
    assert operations.reads == []
