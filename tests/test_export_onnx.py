"""Models exported to ONNX, and what onnxruntime computes from them."""

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.warm_python import warm_python
from safetensors.torch import load_file

import export_onnx
from export_onnx import INPUTS, main
from load_detris import load_pipeline
from modeling_detris import DetrisForReferringSegmentation

ROOT = Path(__file__).parents[1]
RELEASED = ROOT / "tests" / "fixtures" / "released"
WHOLE = str(RELEASED / "whole")
pytestmark = pytest.mark.usefixtures("one_thread")


def session_of(path):
    return pytest.importorskip("onnxruntime").InferenceSession(path)


def run(path, inputs) -> torch.Tensor:
    (logits,) = session_of(path).run(["logits"], {name: inputs[name].numpy() for name in INPUTS})
    return torch.from_numpy(logits)


@pytest.fixture(scope="module")
def exported(one_thread, tmp_path_factory) -> Path:
    """The model of the last release as an ONNX file, as if it were large: with its weights in a second file."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    path = tmp_path_factory.mktemp("onnx") / "detris.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
        main([WHOLE, str(path)])
    return path


@pytest.fixture
def parts():
    pipe = load_pipeline(WHOLE, device="cpu")
    return pipe.model, pipe.processor


def inputs_for(model, images, phrases) -> dict[str, torch.Tensor]:
    """Random images, and phrases of random words; the last image has the first phrase."""
    stream, config = torch.Generator().manual_seed(phrases), model.config
    end, length = config.text_config.vocab_size - 1, config.max_text_length
    input_ids = torch.zeros(phrases, length, dtype=torch.long)
    for n, phrase in enumerate(input_ids):
        words = 1 + n % (length - 2)
        phrase[0], phrase[words + 1] = end - 1, end
        phrase[1 : words + 1] = torch.randint(1, end - 1, (words,), generator=stream)
    return {
        "pixel_values": torch.randn(images, 3, config.image_size, config.image_size, generator=stream),
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "image_index": torch.arange(phrases).flip(0) % images,
    }


@pytest.mark.slow
def test_onnxruntime_computes_the_logits_of_the_last_release(exported):
    figures = load_file(RELEASED / "figures.safetensors")
    figures["attention_mask"] = (figures["input_ids"] != 0).long()
    torch.testing.assert_close(run(exported, figures), figures["whole_logits"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_numbers_of_images_and_phrases_are_free(exported):
    model = DetrisForReferringSegmentation.from_pretrained(WHOLE).eval()
    counts = [(1, 1), (1, 6), (3, 3), (5, 8)]
    assert export_onnx.EXPORTED not in counts
    for images, phrases in counts:
        inputs = inputs_for(model, images, phrases)
        with torch.no_grad():
            expected = model(**inputs).logits
        torch.testing.assert_close(run(exported, inputs), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_inputs_and_output_have_the_documented_names_types_and_shapes(exported):
    session = session_of(exported)
    found = [(value.name, value.type, value.shape) for value in (*session.get_inputs(), *session.get_outputs())]
    model = DetrisForReferringSegmentation.from_pretrained(WHOLE)
    side, length, logits_side = model.config.image_size, model.config.max_text_length, 4 * model.config.grid_size
    assert found == [
        ("pixel_values", "tensor(float)", ["images", 3, side, side]),
        ("input_ids", "tensor(int64)", ["phrases", length]),
        ("attention_mask", "tensor(int64)", ["phrases", length]),
        ("image_index", "tensor(int64)", ["phrases"]),
        ("logits", "tensor(float)", ["phrases", logits_side, logits_side]),
    ]


@pytest.mark.slow
def test_large_weights_lie_in_a_second_file_and_nothing_else_is_left(exported, parts):
    assert {path.name for path in exported.parent.iterdir()} == {"detris.onnx", "detris.onnx.data"}
    weights = 4 * sum(parameter.numel() for parameter in parts[0].parameters())
    assert exported.with_name("detris.onnx.data").stat().st_size > 0.9 * weights


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_written(exported, parts, tmp_path, monkeypatch):
    model, processor = parts
    with torch.no_grad():
        model.mask_head.kernel_projection.bias += 0.01
    program = SimpleNamespace(save=lambda path: shutil.copytree(exported.parent, path.parent, dirs_exist_ok=True))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: program)
    with pytest.raises(ValueError, match="onnxruntime's logits differ from PyTorch's by .* so nothing is written"):
        export_onnx.export_onnx(model, processor, tmp_path / "detris.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.onnx", "there.onnx exists: name a new file"),
        ("weights.onnx", "weights.onnx.data exists: name a new file"),
        ("nowhere/detris.onnx", "nowhere is no folder: name a file in a folder that exists"),
    ],
)
def test_a_place_that_is_taken_or_missing_is_refused(parts, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(export_onnx, "require_packages", lambda: None)
    mine = [tmp_path / "there.onnx", tmp_path / "weights.onnx.data"]
    for path in mine:
        path.write_text("mine")
    with pytest.raises(OSError, match=message):
        export_onnx.export_onnx(*parts, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == mine and all(path.read_text() == "mine" for path in mine)


def test_a_model_on_another_device_is_refused(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "require_packages", lambda: None)
    with pytest.raises(ValueError, match=r"model is on meta, but .*: move it by model.cpu\(\)"):
        export_onnx.export_onnx(parts[0].to("meta"), parts[1], tmp_path / "detris.onnx")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_weights_that_are_not_float32_are_refused(parts, tmp_path, monkeypatch, dtype):
    """Quantised weights are of type uint8 or int8."""
    monkeypatch.setattr(export_onnx, "require_packages", lambda: None)
    layer = parts[0].vision_model.encoder.layer[0].norm1
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"weights are of type .*{dtype}.*, but .* not quantised"):
        export_onnx.export_onnx(*parts, tmp_path / "detris.onnx")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_how_to_get_them(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    with pytest.raises(ImportError, match="needs onnx, onnxscript, onnxruntime: .*-r requirements-onnx.txt"):
        main([WHOLE, str(tmp_path / "detris.onnx")])
    assert (ROOT / "requirements-onnx.txt").is_file() and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_error_of_the_program_is_one_line(tmp_path):
    command = [warm_python(), str(ROOT / "export_onnx.py"), str(tmp_path), "detris.onnx"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("export_onnx.py: ")


def test_examples_have_as_many_images_and_phrases_as_they_are_asked_for(parts):
    for images, phrases in (export_onnx.EXPORTED, *export_onnx.COMPARED):
        inputs = export_onnx._example(parts[1], images, phrases)
        assert tuple(inputs) == INPUTS
        assert len(inputs["pixel_values"]) == images and len(inputs["input_ids"]) == phrases
        assert np.unique(inputs["image_index"]).tolist() == list(range(images))
    assert export_onnx.EXPORTED not in export_onnx.COMPARED
