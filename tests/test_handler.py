"""The handler of Inference Endpoints: what it answers, what it refuses, and that it loads as the service loads it."""

import base64
import io
import json
import os
import socket
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.elsewhere import run_elsewhere
from helpers.pictures import picture
from helpers.tiny_folders import save_tiny_folders
from PIL import Image

import handler
from handler import MAX_IMAGE_BYTES, MAX_PHRASE_LENGTH, MAX_PHRASES, MAX_PIXELS, EndpointHandler
from load_detris import load_pipeline

PHRASES = ["the bed", "a", "the thing that is red"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tiny_backbones, tmp_path_factory) -> Path:
    return save_tiny_folders(tiny_backbones, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder / "whole", device="cpu")


@pytest.fixture
def endpoint(pipe, monkeypatch):
    """A handler around a pipeline in memory."""
    monkeypatch.setattr(handler, "pipeline", lambda *arguments, **options: pipe)
    return EndpointHandler("somewhere")


def in_base64(image: Image.Image, **options) -> str:
    file = io.BytesIO()
    image.save(file, **{"format": "PNG"} | options)
    return base64.b64encode(file.getvalue()).decode()


IMAGE = Image.fromarray(picture())
PNG = in_base64(IMAGE)


def check(answer: list[dict], results: list[dict]) -> None:
    """Check that an answer can be sent and says the same as the pipeline."""
    assert json.loads(json.dumps(answer)) == answer
    for given, expected in zip(answer, results, strict=True):
        mask = Image.open(io.BytesIO(base64.b64decode(given["mask"], validate=True)))
        assert mask.format == "PNG" and mask.mode == "L"
        assert np.array_equal(np.asarray(mask), np.asarray(expected["mask"]))
        assert {**given, "mask": None} == {**expected, "mask": None, "score": pytest.approx(expected["score"])}


@pytest.mark.parametrize(
    "data",
    [
        {"inputs": IMAGE, "parameters": {"text": PHRASES}},
        {"inputs": PNG, "parameters": {"text": PHRASES}},
        {"inputs": f"data:image/png;base64,{PNG}", "parameters": {"text": PHRASES, "threshold": None}},
        {"inputs": base64.encodebytes(base64.b64decode(PNG)).decode(), "parameters": {"text": PHRASES}},
        {"inputs": {"image": PNG, "text": PHRASES}},
        {"inputs": {"image": IMAGE, "text": PHRASES}, "parameters": {"threshold": 0.5}},
        {"inputs": {"image": PNG}, "parameters": {"text": PHRASES, "threshold": "0.5"}},
    ],
)
def test_requests_of_all_forms_get_the_pipelines_results(endpoint, pipe, data):
    check(endpoint(data), pipe(picture(), PHRASES, threshold=0.5))


def test_one_phrase_another_threshold_another_format(endpoint, pipe):
    for threshold in (0, 0.3, "0.3", 1):
        data = {"inputs": PNG, "parameters": {"text": "a", "threshold": threshold}}
        check(endpoint(data), pipe(picture(), "a", threshold=float(threshold)))
    for format in ("JPEG", "WEBP", "GIF", "BMP"):
        text = in_base64(IMAGE, format=format)
        image = Image.open(io.BytesIO(base64.b64decode(text)))
        check(endpoint({"inputs": {"image": text, "text": "a"}}), pipe(image, "a"))


def test_many_phrases_come_back_in_their_order(endpoint, pipe):
    phrases = [f"the {n}" for n in range(MAX_PHRASES)]
    answer = endpoint({"inputs": {"image": PNG, "text": phrases}})
    assert [result["label"] for result in answer] == phrases
    check(answer[95:], pipe(picture(), phrases[95:]))


# --- what is refused -------------------------------------------------------------------------------------------------


def png_of_size(width: int, height: int) -> str:
    """A small file that claims to be a large image."""
    content = bytearray(base64.b64decode(PNG))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return base64.b64encode(content).decode()


TEXT = {"text": "a"}


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "The request is of type NoneType"),
        ([PNG], "The request is of type list"),
        ({}, "text is missing"),
        ({"inputs": PNG}, "text is missing"),
        ({"parameters": TEXT}, "no image"),
        ({"inputs": PNG, "parameters": TEXT, "options": {}}, r"The request has the unknown fields \['options'\]"),
        ({"inputs": PNG, "parameters": TEXT | {"treshold": 1}}, r"parameters has the unknown fields \['treshold'\]"),
        ({"inputs": {"image": PNG, "text": "a", "url": "x"}}, r"inputs has the unknown fields \['url'\]"),
        ({"inputs": {"image": PNG, "text": "a"}, "parameters": TEXT}, "text is given twice"),
        ({"inputs": PNG, "parameters": "a"}, "parameters is of type str"),
        ({"inputs": PNG, "parameters": {"text": 3}}, "neither a phrase nor a list"),
        ({"inputs": PNG, "parameters": {"text": ["a", 3]}}, "neither a phrase nor a list"),
        ({"inputs": PNG, "parameters": {"text": []}}, "text holds 0 phrases"),
        ({"inputs": PNG, "parameters": {"text": ["a"] * (MAX_PHRASES + 1)}}, "text holds 101 phrases: give 1 to 100"),
        ({"inputs": PNG, "parameters": {"text": "a" * (MAX_PHRASE_LENGTH + 1)}}, "A phrase has 1,001 characters"),
        ({"inputs": PNG, "parameters": {"text": ["a"] * 11 + [" "]}}, "phrase 11 of text is ' ', which has no words"),
        ({"inputs": PNG, "parameters": TEXT | {"threshold": "high"}}, "threshold is no number"),
        ({"inputs": PNG, "parameters": TEXT | {"threshold": 2}}, "threshold is 2: it is a probability"),
        ({"inputs": PNG, "parameters": TEXT | {"threshold": "nan"}}, "threshold is nan: it is a probability"),
        ({"inputs": PNG, "parameters": TEXT | {"threshold": True}}, "threshold is True"),
        ({"inputs": PNG, "parameters": TEXT | {"threshold": [1]}}, r"threshold is \[1\]"),
        ({"inputs": [PNG], "parameters": TEXT}, "no image"),
        ({"inputs": base64.b64decode(PNG), "parameters": TEXT}, "no image"),
        ({"inputs": "", "parameters": TEXT}, "cannot be read: send one of JPEG, PNG"),
        ({"inputs": "é", "parameters": TEXT}, "no base64 text"),
        ({"inputs": "data:image/png," + PNG, "parameters": TEXT}, "no base64 text"),
        ({"inputs": "data:image/png;base64", "parameters": TEXT}, "no base64 text"),
        ({"inputs": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode(), "parameters": TEXT}, "cannot be read"),
        ({"inputs": in_base64(IMAGE, format="TIFF"), "parameters": TEXT}, "cannot be read"),
        ({"inputs": PNG[: len(PNG) // 8 * 4], "parameters": TEXT}, "broken"),
        ({"inputs": png_of_size(8_000, 7_000), "parameters": TEXT}, "8000 x 7000 pixels: make it smaller"),
        ({"inputs": png_of_size(60_000, 60_000), "parameters": TEXT}, "cannot be read"),
        ({"inputs": Image.new("1", (10_000, 5_001)), "parameters": TEXT}, f"at most {MAX_PIXELS:,}"),
        ({"inputs": "A" * (MAX_IMAGE_BYTES * 3 // 2), "parameters": TEXT}, "at most 20,971,520 bytes"),
    ],
)
def test_requests_that_cannot_be_answered_get_one_clear_sentence(endpoint, monkeypatch, data, message):
    monkeypatch.setattr(endpoint.pipeline.model, "forward", None)  # before the model runs
    with pytest.raises(ValueError, match=message) as raised:
        endpoint(data)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_nothing_is_read_or_fetched_for_a_stranger(endpoint, tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    IMAGE.save(path)
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(os.path, "isfile", lambda place: asked.append(place))
    places = [str(path), "secret.png", "secretAA", f"file://{path}", "http://127.0.0.1/x.png", "https://a.b/c.png"]
    for place in places:
        for data in ({"inputs": place, "parameters": TEXT}, {"inputs": {"image": place, "text": "a"}}):
            with pytest.raises(ValueError, match="The image (is no base64 text|cannot be read)"):
                endpoint(data)
    assert not asked


# --- as the service loads it -----------------------------------------------------------------------------------------

# The service names the module after file and class, so that it takes `handler` for its package.
AS_THE_SERVICE = """
import importlib.util, json, sys
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
folder, name = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, f"{folder}/handler.py")
sys.path.insert(0, folder)
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
endpoint = module.EndpointHandler(folder)
many = endpoint({"inputs": PNG, "parameters": {"text": PHRASES}})
one = module.EndpointHandler()({"inputs": {"image": PNG, "text": "a"}})
json.dump([many, one], open("answers.json", "w"))
save_file({"nothing": torch.zeros(1)}, "results.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("saved, name", [("whole", "handler.EndpointHandler"), ("adapter", "handler")])
def test_it_loads_out_of_a_saved_models_folder(folder, tmp_path, saved, name):
    code = f"PNG, PHRASES = {PNG!r}, {PHRASES}\n{AS_THE_SERVICE}"
    run_elsewhere(code, tmp_path / "empty", str(folder / saved), name)
    many, one = json.loads((tmp_path / "empty" / "answers.json").read_text())
    pipe = load_pipeline(folder / saved, device="cpu", dtype=torch.float32)
    check(many, pipe(picture(), PHRASES))
    check(one, pipe(picture(), "a"))
