"""Models that the last release saved still load, and give the logits that the release computed.

`fixtures/released/whole` is a model with its processor. `fixtures/released/adapter` holds adapters and head of another
model with the same backbones; its configuration names backbones that are no longer there. `figures.safetensors` holds
inputs, and the logits that the release computed for them on one thread.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.warm_python import warm_python
from safetensors.torch import load_file

import backbones_detris
import convert_detris_checkpoint
from modeling_detris import DetrisForReferringSegmentation

ROOT = Path(__file__).parents[1]
RELEASED = Path(__file__).parent / "fixtures" / "released"
WHOLE, ADAPTER, FIGURES = RELEASED / "whole", RELEASED / "adapter", RELEASED / "figures.safetensors"
BACKBONES = {"vision_backbone": str(WHOLE), "text_backbone": str(WHOLE)}
IN_AUTO_MAP = ("configuration_detris.py", "modeling_detris.py", "processing_detris.py")  # of the released folders
LOAD_ELSEWHERE = """
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

torch.set_num_threads(1)
whole, adapter, figures = sys.argv[1:]
figures = load_file(figures)
inputs = {name: figures[name] for name in ("pixel_values", "input_ids", "image_index")}
backbones = {"vision_backbone": whole, "text_backbone": whole}
for kind, model in (
    ("whole", AutoModel.from_pretrained(whole, trust_remote_code=True)),
    ("adapter", AutoModel.from_pretrained(adapter, trust_remote_code=True, **backbones)),
):
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, figures[f"{kind}_logits"])

processor = AutoProcessor.from_pretrained(whole, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules."), type(processor).__module__
assert processor.mask_threshold == 0.35
out = processor(images=torch.zeros(3, 20, 40), text=["the bed", "a"], return_tensors="pt")
assert out.pixel_values.shape == (1, 3, 32, 32)
# Tokens: the 256 bytes from "!" on, the same at a word's end, the merges "ed", "th" and "the", start, end.
assert out.input_ids.tolist() == [[515, 514, 65, 512, 516, 0, 0, 0, 0], [515, 256 + 64, 516, 0, 0, 0, 0, 0, 0]]
"""
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def figures() -> dict[str, torch.Tensor]:
    return load_file(FIGURES)


@torch.no_grad()
def logits_of(model: DetrisForReferringSegmentation, figures: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**{name: figures[name] for name in ("pixel_values", "input_ids", "image_index")}).logits


def test_a_whole_model(figures):
    model = DetrisForReferringSegmentation.from_pretrained(WHOLE)
    torch.testing.assert_close(logits_of(model, figures), figures["whole_logits"])


def test_adapters_around_backbones_that_are_named_when_loading(figures):
    model = DetrisForReferringSegmentation.from_pretrained(ADAPTER, **BACKBONES)
    torch.testing.assert_close(logits_of(model, figures), figures["adapter_logits"])


def test_adapters_as_the_second_ones_of_a_whole_model(figures):
    model = DetrisForReferringSegmentation.from_pretrained(WHOLE)
    model.load_adapter(str(ADAPTER), adapter_name="second")  # and activates them
    torch.testing.assert_close(logits_of(model, figures), figures["adapter_logits"])
    model.set_adapter("default")
    torch.testing.assert_close(logits_of(model, figures), figures["whole_logits"])
    model.delete_adapter("second")
    torch.testing.assert_close(logits_of(model, figures), figures["whole_logits"])


def code_files() -> set[str]:
    """The files of the repository that those in the folders' auto_map import, one by another."""
    files, unread = set(), set(IN_AUTO_MAP)
    while unread:
        files |= unread
        sources = [(ROOT / name).read_text(encoding="utf-8") for name in unread]
        unread = {
            f"{name}.py" for text in sources for name in re.findall(r"^\s+from \.(\w+) import", text, re.M)
        } - files
    return files


@pytest.mark.slow
def test_the_auto_classes_without_the_repository(tmp_path):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in (WHOLE, ADAPTER)]
    for folder in folders:
        for name in code_files():
            shutil.copy(ROOT / name, folder)
    (tmp_path / "empty").mkdir()
    subprocess.run(
        [warm_python(), "-I", "-c", LOAD_ELSEWHERE, *map(str, folders), str(FIGURES)],
        cwd=tmp_path / "empty",
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        check=True,
        timeout=300,
    )


def test_the_converter_still_has_what_released_code_imports_from_it():
    # In a folder of adapters, `modeling_detris.py` of the last release reads original files of the backbones by these.
    assert convert_detris_checkpoint.read_dinov2 is backbones_detris.read_dinov2
    assert convert_detris_checkpoint.read_clip_text is backbones_detris.read_clip_text
