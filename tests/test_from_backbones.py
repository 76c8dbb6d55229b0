"""Models built around pretrained backbones: what they take from the backbones, and which backbones are refused."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.folders import change_json, change_tensors
from helpers.models import (
    BACKBONE_FIELDS,
    assert_starts_as_the_paper_says,
    is_backbone,
    save_backbones,
    small_inputs,
    trainable,
)

from modeling_detris import DetrisForReferringSegmentation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folder with the backbones `vision` and `text`."""
    folder = tmp_path_factory.mktemp("saved")
    save_backbones(folder)
    return folder


@pytest.mark.parametrize(
    ("registers", "text", "image_size", "dtype"),
    [
        (True, "projection", 70, torch.float32),
        (False, "whole CLIP", 56, torch.float32),
        (True, "whole CLIP", 84, torch.float16),
    ],
)
def test_from_backbones_takes_their_weights_and_starts_the_rest(tmp_path, registers, text, image_size, dtype):
    vision_weights, text_weights = save_backbones(tmp_path, registers, text, dtype)
    model = DetrisForReferringSegmentation.from_backbones(
        str(tmp_path / "vision"), str(tmp_path / "text"), **BACKBONE_FIELDS | {"image_size": image_size}
    )
    expected = {f"vision_model.{name}": weight for name, weight in vision_weights.items()}
    expected |= {name: weight for name, weight in text_weights.items() if name.startswith("text_")}
    ours = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters() if is_backbone(n)}
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(ours[name], weight.float()), name
    assert model.dtype == torch.float32 and not model.training
    assert not any(is_backbone(name) for name in trainable(model)) and trainable(model)
    assert_starts_as_the_paper_says(model)
    inputs = small_inputs(2, size=image_size)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(DetrisForReferringSegmentation.from_pretrained(tmp_path / "saved")(**inputs).logits, logits)
    assert model.text_model.config._attn_implementation == model.vision_model.config._attn_implementation == "sdpa"


def test_from_backbones_refuses_what_is_no_backbone(tmp_path):
    save_backbones(tmp_path, text="no projection")
    vision, text = str(tmp_path / "vision"), str(tmp_path / "text")
    with pytest.raises(ValueError, match="text_projection"):  # which would get random numbers
        DetrisForReferringSegmentation.from_backbones(vision, text, **BACKBONE_FIELDS)
    with pytest.raises(ValueError, match="vision.* [Gg]ive .* a CLIP model for text"):
        DetrisForReferringSegmentation.from_backbones(vision, vision, **BACKBONE_FIELDS)
    save_backbones(tmp_path, text="projection")
    with pytest.raises(ValueError, match="model_type 'clip_text_model': give a DINOv2 model"):
        DetrisForReferringSegmentation.from_backbones(text, text, **BACKBONE_FIELDS)
    with pytest.raises(OSError, match="missing"):
        DetrisForReferringSegmentation.from_backbones(str(tmp_path / "missing"), text, **BACKBONE_FIELDS)


def test_a_pickled_backbone_that_claims_more_than_it_holds_is_refused(saved, tmp_path):
    vision = tmp_path / "vision"
    vision.mkdir()
    shutil.copy(saved / "vision" / "config.json", vision)
    change_json(vision / "config.json", hidden_size=24576)
    shapes = {"embeddings.cls_token": (1, 1, 24576), "encoder.layer.0.mlp.fc1.weight": (98304, 24576)}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, vision / "pytorch_model.bin")
    with pytest.raises(OSError, match="pytorch_model.bin cannot be read .its tensors claim more numbers than it has"):
        DetrisForReferringSegmentation.from_backbones(str(vision), str(saved / "text"), **BACKBONE_FIELDS)


def test_a_backbone_is_not_built_from_a_configuration_that_its_files_do_not_fill(saved, tmp_path):
    vision = Path(shutil.copytree(saved / "vision", tmp_path / "vision"))
    for values, message in (
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, but only .* tensors"),
        ({"hidden_size": 4096}, "asks for .* numbers, but .* are saved"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"model_type": "llama"}, "model_type 'llama'"),
    ):
        shutil.copy(saved / "vision" / "config.json", vision)
        change_json(vision / "config.json", **values)
        with pytest.raises(ValueError, match=message):
            DetrisForReferringSegmentation.from_backbones(str(vision), str(saved / "text"), **BACKBONE_FIELDS)


def test_backbones_that_are_no_numbers_are_refused(saved, tmp_path):
    text = Path(shutil.copytree(saved / "text", tmp_path / "text"))
    change_tensors(text / "model.safetensors", lambda t: t["text_projection.weight"].fill_(math.nan))
    with pytest.raises(ValueError, match="text_projection.weight holds NaN"):
        DetrisForReferringSegmentation.from_backbones(str(saved / "vision"), str(text), **BACKBONE_FIELDS)
