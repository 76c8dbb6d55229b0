"""What the processor makes of images, masks and phrases, how it makes masks of logits, and what it refuses.

The official implementation printed what is in `fixtures/tokens.json`.
"""

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.pictures import SIDE, picture
from PIL import Image
from transformers import CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN
from transformers.utils import PaddingStrategy

from benchmarks.counting import Operations
from processing_detris import DetrisImageProcessor, DetrisProcessor

FIXTURES = Path(__file__).parent / "fixtures"


# Arguments

SETTLED = {  # arguments of other processors that say what is done here anyway
    "padding": ["max_length", PaddingStrategy.MAX_LENGTH, True, None],
    "truncation": [True, None],
    "max_length": [17, np.int64(17), None],
    "add_special_tokens": [True],
    "return_attention_mask": [True],
    "return_tensors": ["pt"],
    "padding_side": ["right"],
    "do_resize": [True],
    "do_rescale": [True],
    "do_normalize": [True],
    "size": [SIDE, {"height": SIDE, "width": SIDE}],
    "image_mean": [OPENAI_CLIP_MEAN, tuple(OPENAI_CLIP_MEAN)],
}
CONTRADICTIONS = {
    "padding": ["longest", False, PaddingStrategy.LONGEST],
    "truncation": [False, 1],
    "max_length": [77, 16],
    "add_special_tokens": [False],
    "return_attention_mask": [False],
    "do_resize": [False],
    "do_rescale": [False],
    "do_normalize": [False],
    "size": [224, {"shortest_edge": SIDE}],
    "image_mean": [[0.5, 0.5, 0.5], np.zeros(3)],
    "text_kwargs": [{}],
}


@pytest.mark.parametrize("name", SETTLED)
def test_keywords_that_agree_with_the_checkpoint_change_nothing(processor, name):
    expected = processor(images=picture(), text="a cat", return_tensors="pt")
    for value in SETTLED[name]:
        out = processor(images=picture(), text="a cat", **{"return_tensors": "pt", name: value})
        assert set(out) == set(expected) and all(torch.equal(out[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_keywords_that_contradict_the_checkpoint_are_refused_by_name(processor, name):
    for value in CONTRADICTIONS[name]:
        with pytest.raises(TypeError, match=f"^({name} is |There is no argument '{name}').*leave it out"):
            processor(images=picture(), text="a cat", **{name: value})


def test_unknown_keywords_are_refused(processor):
    with pytest.raises(TypeError, match="paddding"):
        processor(text="cat", paddding=True)
    with pytest.raises(TypeError, match="do_resize"):
        processor.image_processor(picture(), do_resize=False)


@pytest.mark.parametrize(
    "size", [{"height": 56, "width": 57}, {"shortest_edge": 56}, 0, {"height": 5.5, "width": 5.5}]
)
def test_size_is_a_square(size):
    with pytest.raises(ValueError, match="size is"):
        DetrisImageProcessor(size=size)


# Masks to train on


def test_maps_belong_to_phrases_or_images(processor):
    images = [picture(30, 44), picture(20, 10)]
    maps = [np.ones((30, 44), bool), np.zeros((20, 10), bool)]
    shared = processor(images=images, text=[["cat", "dog"], ["cat"]], segmentation_maps=maps)
    assert shared.labels.max(axis=(1, 2)).tolist() == [1, 1, 0]
    own = processor(images=images, text=[["cat", "dog"], ["cat"]], segmentation_maps=[maps[0], ~maps[0], ~maps[1]])
    assert own.labels.max(axis=(1, 2)).tolist() == [1, 0, 1]
    one_image = processor(images=images[0], text=["cat", "dog"], segmentation_maps=np.stack([maps[0], ~maps[0]]))
    assert one_image.labels.max(axis=(1, 2)).tolist() == [1, 0]


@pytest.mark.parametrize(
    "maps, message",
    [
        (np.ones((29, 44)), r"segmentation_maps\[0\] has \(height, width\) \(29, 44\).*images\[0\], has \(30, 44\)"),
        ([np.ones((30, 44))] * 3, "3 segmentation_maps for 2 phrases of 1 images"),
        (np.full((30, 44), 2), "segmentation_maps.* integers from 2 to 2"),
        (np.full((30, 44), -1), "segmentation_maps.* integers from -1"),
        (np.full((30, 44), 1.5), "segmentation_maps.* from 1.5"),
        ([], "segmentation_maps is empty"),
        ([np.ones((30, 44, 3))], r"segmentation_maps\[0\] has shape"),
    ],
)
def test_bad_maps_are_refused(processor, maps, message):
    with pytest.raises(ValueError, match=message):
        processor(images=picture(), text=["cat", "dog"], segmentation_maps=maps)


def test_maps_need_images(processor):
    with pytest.raises(ValueError, match="images is missing"):
        processor(text="cat", segmentation_maps=np.ones((3, 3)))


# Phrases


@pytest.mark.parametrize("length, table", [(17, "word_len"), (22, "word_len"), (77, "word_len"), (17, "text_repair")])
def test_tokens_equal_official(clip_tokenizer, image_processor, length, table):
    expected = json.loads((FIXTURES / "tokens.json").read_text())[table]
    expected = expected if table == "text_repair" else expected[str(length)]
    processor = DetrisProcessor(image_processor, clip_tokenizer, max_text_length=length)
    out = processor(text=list(expected), return_tensors="pt")
    assert out.input_ids.tolist() == list(expected.values())
    assert torch.equal(out.attention_mask, (out.input_ids != 0).long())


def test_another_vocabulary(processor):
    a, d, g_end, s_end, start, end = 64, 67, 256 + 70, 256 + 82, 515, 516
    out = processor(text=["CAT", "dogs &amp;amp; a <"])  # before "<" ftfy leaves entities alone
    assert out.input_ids[0].tolist() == [start, 513, end] + [0] * 14
    assert out.input_ids[1].tolist() == [start, 514, 70, s_end, 256 + 5, 256 + a, 256 + 27, end] + [0] * 9
    assert processor(text="adg").input_ids[0, :6].tolist() == [start, a, d, g_end, end, 0]


def test_long_phrases_are_cut_with_one_warning(processor, caplog):
    exact, long = processor(text=[" ".join("c" * 15), " ".join("c" * 16)]).input_ids
    processor(text=" ".join("d" * 40))
    assert exact.tolist() == long.tolist() == [515] + [256 + 66] * 15 + [516]
    (record,) = caplog.records
    for part in ("'c c c", "18 tokens", "max_text_length=17", "shorten"):
        assert part in record.getMessage()


@pytest.mark.parametrize("phrase", ["", " \t\n", "&nbsp;"])
@pytest.mark.parametrize("wrap", [lambda phrase: ["cat", phrase], lambda phrase: [["cat", phrase]]])
def test_empty_phrases_are_refused(processor, phrase, wrap):
    with pytest.raises(ValueError, match="phrase 1 of text is .*no words"):
        processor(text=wrap(phrase))


def test_any_container_of_phrases_is_a_list(processor):
    phrases, nested = ["cat", "a dog"], [["cat", "a dog"], ["dog"]]
    rows = datasets.Dataset.from_dict({"phrase": phrases, "phrases": nested})
    images = [picture()] * 2
    expected = processor(images=images, text=phrases)
    for text in (
        np.array(phrases),
        np.array(phrases, object),
        rows["phrase"],
        pd.Series(phrases),
        (p for p in phrases),
    ):
        out = processor(images=images, text=text)
        assert all(np.array_equal(out[key], expected[key]) for key in expected)
    expected = processor(images=images, text=nested)
    for text in (rows["phrases"], [np.array(group) for group in nested], [pd.Series(group) for group in nested]):
        out = processor(images=images, text=text)
        assert all(np.array_equal(out[key], expected[key]) for key in expected)
    np.testing.assert_array_equal(processor(text=np.array("cat")).input_ids, processor(text="cat").input_ids)
    table = np.array([["cat", "dog"], ["dog", "a"]])
    assert processor(images=images, text=table).image_index.tolist() == [0, 0, 1, 1]


def test_start_and_end_need_room(tiny_tokenizer, image_processor):
    with pytest.raises(ValueError, match="max_text_length is 2"):
        DetrisProcessor(image_processor, tiny_tokenizer, max_text_length=2)


def test_a_tokenizer_whose_file_is_missing_is_refused(tiny_tokenizer, image_processor, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="its tokenizer.json is missing"):
        DetrisProcessor(image_processor, CLIPTokenizer.from_pretrained(tmp_path))


# Images and phrases together


@pytest.mark.parametrize(
    "image_count, text, image_index",
    [
        (1, "cat", [0]),
        (1, ["cat", "dog", "a"], [0, 0, 0]),
        (1, [["cat", "dog"]], [0, 0]),
        (2, ["cat", "dog"], [0, 1]),
        (2, ("cat", "dog"), [0, 1]),
        (3, [["cat"], ["dog", "a", "b"], ("cat", "dog")], [0, 1, 1, 1, 2, 2]),
    ],
)
def test_phrases_find_their_images(processor, image_count, text, image_index):
    images = [picture(30 + i, 44, seed=i) for i in range(image_count)]
    out = processor(images=images, text=text, return_tensors="pt")
    assert out.image_index.tolist() == image_index and out.image_index.dtype == torch.int64
    assert out.input_ids.shape == out.attention_mask.shape == (len(image_index), 17)
    assert out.pixel_values.shape == (image_count, 3, SIDE, SIDE)
    assert out.original_sizes.tolist() == [[30 + i, 44] for i in range(image_count)]
    assert out.original_sizes.dtype == out.input_ids.dtype == torch.int64


def test_either_alone(processor):
    assert set(processor(images=picture())) == {"pixel_values", "original_sizes"}
    assert set(processor(text=[["cat"], ["dog"]])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "images, text, error, message",
    [
        (None, None, ValueError, "images is missing"),
        ([], "cat", ValueError, "images is empty"),
        (None, [], ValueError, "text is empty"),
        ([picture()], [[]], ValueError, r"text\[0\] is empty"),
        ([picture()] * 2, "cat", ValueError, "1 texts for 2 images.*one phrase for each image"),
        ([picture()] * 2, ["cat"] * 3, ValueError, "3 texts for 2 images"),
        ([picture()] * 2, [["cat"]] * 3, ValueError, "3 texts for 2 images"),
        ([picture()], ["cat", 7], TypeError, "phrase 1 of text is 7, of type int"),
        ([picture()], [["cat", None]], TypeError, "phrase 1 of text is None"),
        ("a cat", picture(), TypeError, "images holds text and text does not: they are swapped"),
        (["a cat"], [Image.new("RGB", (9, 9))], TypeError, "they are swapped"),
        ([["a cat"]], torch.zeros(3, 9, 9), TypeError, "they are swapped"),
        ("a cat", None, TypeError, r"images\[0\] is of type str"),
        ("a.jpg", "a cat", TypeError, r"images\[0\] is of type str: give a PIL image, which PIL.Image.open makes"),
        (None, picture(), TypeError, "text is of type ndarray"),
        (None, Image.new("RGB", (9, 9)), TypeError, "text is of type Image: give a phrase"),
        (picture(), b"a cat", TypeError, "text is of type bytes"),
        (picture(), [b"a cat"], TypeError, r"text\[0\] is of type bytes"),
        (picture(), ["cat", b"a dog"], TypeError, "phrase 1 of text is b'a dog', of type bytes"),
        (picture(), {"cat": 1}, TypeError, "text is of type dict"),
        (picture(), {"cat", "dog"}, TypeError, "text is of type set"),
        (picture(), 7, TypeError, "text is of type int"),
    ],
)
def test_unclear_batches_are_refused(processor, images, text, error, message):
    with pytest.raises(error, match=message):
        processor(images=images, text=text)


# Masks back


def test_sizes_of_images_and_phrases(processor):
    logits = torch.randn(3, 16, 16, generator=torch.manual_seed(1))
    sizes = torch.tensor([[30, 44], [20, 10]])

    def post_process(logits, sizes, **options):
        return processor.post_process_referring_segmentation(SimpleNamespace(logits=logits), sizes, **options)

    alone = [post_process(logits[n : n + 1], [size])[0] for n, size in enumerate([(20, 10), (30, 44), (20, 10)])]
    for index in (torch.tensor([1, 0, 1]), [1, 0, 1], np.array([1, 0, 1])):
        masks = post_process(logits, sizes, image_index=index)
        assert all(torch.equal(mask, other) for mask, other in zip(masks, alone, strict=True))
    by_phrase = post_process(logits, [(20, 10), (30, 44), (20, 10)])
    assert all(torch.equal(mask, other) for mask, other in zip(by_phrase, alone, strict=True))
    assert [mask.shape for mask in post_process(logits, [(20, 10)])] == [(20, 10)] * 3
    assert post_process(logits[:0], sizes, image_index=[]) == []


def test_default_threshold_is_a_field(processor):
    outputs = SimpleNamespace(logits=torch.randn(1, 16, 16, generator=torch.manual_seed(2)))
    (default,) = processor.post_process_referring_segmentation(outputs, [(30, 44)])
    (same,) = processor.post_process_referring_segmentation(outputs, [(30, 44)], threshold=0.35)
    processor.mask_threshold = 0.6
    (other,) = processor.post_process_referring_segmentation(outputs, [(30, 44)])
    assert torch.equal(default, same) and other.sum() < same.sum()


def test_masks_do_not_depend_on_autocast_or_gradients(processor):
    logits = torch.randn(1, 16, 16, generator=torch.manual_seed(3), requires_grad=True)
    (expected,) = processor.post_process_referring_segmentation(SimpleNamespace(logits=logits.detach()), [(90, 120)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (mask,) = processor.post_process_referring_segmentation(SimpleNamespace(logits=logits), [(90, 120)])
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    "sizes, image_index, message",
    [
        ([(30, 44)] * 2, None, r"\(3, 16, 16\) do not fit the sizes of 2 phrases"),
        ([(30, 44)] * 2, [0, 1], r"do not fit the sizes of 2 phrases"),
        ([(30, 44)] * 2, [0, 1, 2], r"image_index is \[0, 1, 2\], but original_sizes has 2 images"),
        ([(30, 44)] * 2, [0, 1, -1], "image_index"),
        ((30, 44), None, r"original_sizes is \(30, 44\)"),
        ([(0, 44)], None, "original_sizes"),
        ([(30.5, 44)], None, "original_sizes"),
        ([(30, 10**9)], None, "original_sizes .* at most 32,766"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_the_name_they_were_given(processor, sizes, image_index, message):
    outputs = SimpleNamespace(logits=torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=message):
        processor.post_process_referring_segmentation(outputs, original_sizes=sizes, image_index=image_index)
    message = message.replace("original_sizes", "target_sizes")
    with pytest.raises(ValueError, match=message):
        processor.post_process_referring_segmentation(outputs, sizes, image_index=image_index)


def test_sizes_are_given_once(processor):
    outputs, sizes = SimpleNamespace(logits=torch.randn(1, 16, 16, generator=torch.manual_seed(4))), [(30, 44)]
    first, second, third = (
        processor.post_process_referring_segmentation(outputs, *arguments, **named)[0]
        for arguments, named in [((sizes,), {}), ((), {"target_sizes": sizes}), ((), {"original_sizes": sizes})]
    )
    assert torch.equal(first, second) and torch.equal(first, third) and first.shape == (30, 44)
    with pytest.raises(ValueError, match="target_sizes and original_sizes are two names .*: give one of them"):
        processor.post_process_referring_segmentation(outputs, sizes, original_sizes=sizes)
    with pytest.raises(ValueError, match="target_sizes is missing: give the .*original_sizes"):
        processor.post_process_referring_segmentation(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_details_are_those_of_the_masks(processor, dtype):
    logits = (6 * torch.randn(4, 16, 16, generator=torch.manual_seed(5))).to(dtype)
    logits[3] = -9  # nothing is found
    sizes = [(30, 44), (9, 70), (57, 3), (12, 12)]
    for threshold in (None, 0, 0.9, 1):
        masks = processor.post_process_referring_segmentation(SimpleNamespace(logits=logits), sizes, threshold)
        details = processor.post_process_referring_segmentation(
            SimpleNamespace(logits=logits), sizes, threshold, output_details=True
        )
        for mask, found, size in zip(masks, details, sizes, strict=True):
            assert list(found) == ["mask", "probabilities", "score", "box"]
            assert torch.equal(found["mask"], mask) and mask.dtype == torch.bool
            probabilities = found["probabilities"]
            assert probabilities.shape == size and probabilities.dtype == torch.float32
            assert 0 <= probabilities.min() and probabilities.max() <= 1
            inside = [(y, x) for y in range(size[0]) for x in range(size[1]) if mask[y, x]]
            if not inside:
                assert (found["score"], found["box"]) == (0.0, None)
                continue
            rows, columns = zip(*inside)
            box = {"xmin": min(columns), "ymin": min(rows), "xmax": max(columns) + 1, "ymax": max(rows) + 1}
            assert found["box"] == box and all(type(side) is int for side in found["box"].values())
            mean = math.fsum(probabilities[place].item() for place in inside) / len(inside)
            assert found["score"] == pytest.approx(mean, rel=1e-5) and type(found["score"]) is float
            least = 0.35 if threshold is None else threshold
            assert all((probabilities[place] > least or least == 1) for place in inside)
    assert details[3]["box"] is None  # at a threshold of 1
    assert any(found["mask"].any() for found in details)  # where interpolation overshoots, as without details


def test_all_masks_of_an_image_are_restored_together(processor, monkeypatch):
    """More of them ask no more of a device, and those of other sizes between them keep their places."""
    generator, launches = torch.manual_seed(6), []
    for phrases in (1, 8):
        outputs = SimpleNamespace(logits=torch.randn(phrases, 16, 16, generator=generator))
        processor.post_process_referring_segmentation(outputs, [(30, 44)] * phrases)  # matrices are computed once
        with Operations([outputs.logits]) as operations:
            processor.post_process_referring_segmentation(outputs, [(30, 44)] * phrases)
        launches.append(operations.launches)
    assert launches[0] == launches[1] <= 10

    sizes = [(30, 44), (30, 44), (57, 3), (30, 44), (12, 12), (12, 12), (12, 12), (30, 44)]
    restore = partial(processor.post_process_referring_segmentation, threshold=0.4, output_details=True)
    alone = [
        restore(SimpleNamespace(logits=logits[None]), [size])
        for logits, size in zip(outputs.logits, sizes, strict=True)
    ]
    for at_once in (2**25, 30 * 44, 1):  # pixels
        monkeypatch.setattr("processing_detris.RESTORED_AT_ONCE", at_once)
        for found, (expected,), size in zip(restore(outputs, sizes), alone, sizes, strict=True):
            assert found["mask"].shape == size and found["box"] == expected["box"]
            assert torch.allclose(found["probabilities"], expected["probabilities"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [-1, 2, math.nan, math.inf, "0.5", True, [0.5]])
def test_thresholds_that_are_no_probability_are_refused(processor, threshold):
    outputs = SimpleNamespace(logits=torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="threshold is .*give a number from 0 to 1"):
        processor.post_process_referring_segmentation(outputs, [(30, 44)], threshold=threshold)
    processor.mask_threshold = threshold
    with pytest.raises(ValueError, match="threshold is .*give a number from 0 to 1"):
        processor.post_process_referring_segmentation(outputs, [(30, 44)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_not_finite_give_no_mask(processor, value, dtype):
    logits = torch.zeros(3, 8, 8, dtype=dtype)
    logits[1, 7, 0] = value
    with pytest.raises(ValueError, match="logits of phrase 1 are not finite"):
        processor.post_process_referring_segmentation(SimpleNamespace(logits=logits), [(30, 44)])
