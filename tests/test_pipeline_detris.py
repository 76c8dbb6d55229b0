"""The pipeline of the task "referring-image-segmentation", compared with model and processor by hand.

`tests/test_pipeline_elsewhere.py` tests that it travels with saved models.
"""

import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import GeneratorType, SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers.pictures import picture
from helpers.tiny_folders import save_tiny_folders
from PIL import EpsImagePlugin, Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from load_detris import load_processor
from modeling_detris import DetrisForReferringSegmentation
from pipeline_detris import ReferringImageSegmentationPipeline

PHRASES = ["the bed", "a", "the thing that is red"]
IMAGES = [picture(30, 44, 0), picture(25, 20, 1), picture(40, 31, 2), picture(30, 44, 3), picture(9, 50, 4)]
NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.03}  # how far batches of another size move a probability
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tiny_backbones, tmp_path_factory) -> Path:
    return save_tiny_folders(tiny_backbones, tmp_path_factory.mktemp("saved"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ReferringImageSegmentationPipeline:
    """A model with the adapters `default`, which are active, and `other`."""
    model = DetrisForReferringSegmentation.from_pretrained(folder / "whole")
    model.load_adapter(folder / "adapter", adapter_name="other")
    model.set_adapter("default")
    processor = load_processor(str(folder / "whole"))
    return ReferringImageSegmentationPipeline(model=model.to(dtype), processor=processor, device="cpu")


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


@torch.no_grad()
def by_hand(pipe, image, phrases, adapter_name=None) -> list[np.ndarray]:
    """The probabilities that the model gives for each phrase alone, at the image's size."""
    maps = []
    for phrase in phrases:
        inputs = pipe.processor(images=image, text=phrase, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(pipe.model.dtype)
        outputs = pipe.model(**inputs, adapter_names=adapter_name and [adapter_name])
        (details,) = pipe.processor.post_process_referring_segmentation(
            outputs, inputs["original_sizes"], output_details=True
        )
        maps.append(details["probabilities"].numpy())
    return maps


def check(results, phrases, probabilities, dtype=torch.float32, threshold=0.5) -> None:
    """Check the results for an image, each by its own probabilities, and these by those that were made by hand."""
    assert [result["label"] for result in results] == list(phrases)
    for result, expected in zip(results, probabilities, strict=True):
        given, mask = result["probabilities"], result["mask"]
        assert given.dtype == np.float32 and isinstance(mask, Image.Image) and mask.mode == "L"
        assert np.abs(given - expected).max() < NEAR[dtype]
        inside = given > threshold
        assert (np.asarray(mask) == np.where(inside, 255, 0)).all()
        if inside.any():
            assert result["score"] == pytest.approx(given[inside].mean(), abs=1e-6)
            rows, columns = inside.nonzero()
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert result["box"] == dict(zip(("xmin", "ymin", "xmax", "ymax"), box))
        else:
            assert (result["score"], result["box"]) == (0.0, None)


def test_masks_are_neither_full_nor_empty(pipe):
    for adapter in ("default", "other"):
        shares = [(p > 0.5).mean() for image in IMAGES for p in by_hand(pipe, image, PHRASES, adapter)]
        assert sum(0.05 < share < 0.95 for share in shares) > 6, shares


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_image_with_many_phrases(folder, dtype):
    pipe = load(folder, dtype)
    results = pipe(IMAGES[0], PHRASES, return_probabilities=True)
    assert pipe.model.dtype == dtype
    check(results, PHRASES, by_hand(pipe, IMAGES[0], PHRASES), dtype)
    check(pipe(IMAGES[0], "a", return_probabilities=True), ["a"], by_hand(pipe, IMAGES[0], ["a"]), dtype)
    high = pipe(IMAGES[0], PHRASES, threshold=0.9, return_probabilities=True)
    check(high, PHRASES, by_hand(pipe, IMAGES[0], PHRASES), dtype, threshold=0.9)
    (empty,) = pipe(IMAGES[0], "a", threshold=1)
    assert (empty["box"], empty["score"], empty["mask"].size) == (None, 0.0, (44, 30))
    assert pipe(IMAGES[0], "a")[0].keys() == {"label", "score", "mask", "box"}


def ways(images: list[np.ndarray], texts: list[list[str]]) -> dict[str, tuple[type, dict]]:
    """How many images may be given: the type of what is returned, and arguments. `texts` are of each image."""
    pictures = [Image.fromarray(image) for image in images]
    dicts = [{"image": image, "text": text} for image, text in zip(pictures, texts)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    rows = datasets.Dataset.from_list(dicts, features=features)
    return {
        "list": (list, {"image": pictures, "text": texts}),
        "tuple": (list, {"image": tuple(images), "text": tuple(texts)}),
        "dicts": (list, {"image": dicts}),
        "generator": (GeneratorType, {"image": (image for image in images), "text": texts}),
        "generator of dicts": (GeneratorType, {"image": (row for row in dicts)}),
        "column": (object, {"image": rows["image"], "text": texts}),
        "KeyDataset": (object, {"image": KeyDataset(rows, "image"), "text": texts}),
        "data set": (object, {"image": rows}),
        "streamed data set": (object, {"image": rows.to_iterable_dataset()}),
    }


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_many_images_however_they_are_given(pipe, batch_size):
    texts = [PHRASES, ["a"], PHRASES[1:], ["the"], PHRASES * 4]
    expected = [by_hand(pipe, image, text) for image, text in zip(IMAGES, texts)]
    for way, (kind, arguments) in ways(IMAGES, texts).items():
        all_results = pipe(**arguments, batch_size=batch_size, return_probabilities=True)
        assert isinstance(all_results, kind) and (kind is list or not isinstance(all_results, list)), way
        for results, text, probabilities in zip(all_results, texts, expected, strict=True):
            check(results, text, probabilities)


def test_phrases_that_hold_for_every_image(pipe):
    same_size = [IMAGES[0], IMAGES[3]]
    for text in (PHRASES, tuple(PHRASES), PHRASES[0]):
        phrases = [text] if isinstance(text, str) else list(text)
        expected = [by_hand(pipe, image, phrases) for image in same_size]
        for images in (same_size, np.stack(same_size), torch.from_numpy(np.stack(same_size)).permute(0, 3, 1, 2)):
            all_results = pipe(images, text, return_probabilities=True)
            assert isinstance(all_results, list)
            for results, probabilities in zip(all_results, expected, strict=True):
                check(results, phrases, probabilities)
    assert pipe([], "a") == [] and list(pipe(iter([]), "a")) == []


def test_an_adapter_for_each_phrase(pipe):
    names = ["other", "__base__", "default"]
    expected = [by_hand(pipe, IMAGES[0], [phrase], name)[0] for phrase, name in zip(PHRASES, names)]
    for one, other in ((0, 1), (0, 2), (1, 2)):  # so that a wrong one is noticed
        maps = [by_hand(pipe, IMAGES[0], ["a"], names[n])[0] for n in (one, other)]
        assert np.abs(maps[0] - maps[1]).max() > 0.01
    check(pipe(IMAGES[0], PHRASES, adapter_name=names, return_probabilities=True), PHRASES, expected)
    dicts = [
        {"image": IMAGES[1], "text": PHRASES},
        {"image": IMAGES[0], "text": PHRASES, "adapter_name": names},
        {"image": IMAGES[1], "text": "a", "adapter_name": None},
    ]
    own = pipe(dicts, batch_size=3, return_probabilities=True)
    check(own[0], PHRASES, by_hand(pipe, IMAGES[1], PHRASES))
    check(own[1], PHRASES, expected)
    check(own[2], ["a"], by_hand(pipe, IMAGES[1], ["a"]))
    each = pipe(IMAGES[:2], [PHRASES, ["a"]], adapter_name=[names, ["other"]], return_probabilities=True)
    check(each[0], PHRASES, expected)
    check(each[1], ["a"], by_hand(pipe, IMAGES[1], ["a"], "other"))
    assert pipe.model.active_adapters() == ["default"]


def test_many_phrases_go_through_the_model_by_parts(pipe, monkeypatch):
    sizes, forward = [], pipe.model.forward

    def counted(**inputs):
        sizes.append((len(inputs["pixel_values"]), len(inputs["input_ids"])))
        return forward(**inputs)

    monkeypatch.setattr(pipe.model, "forward", counted)
    phrases = [f"the {n}" for n in range(20)]
    assert [result["label"] for result in pipe(IMAGES[0], phrases)] == phrases
    assert sizes == [(1, 8), (1, 8), (1, 4)]
    sizes.clear()
    pipe(IMAGES[:3], [phrases, ["a"], ["a"] * 9], batch_size=15)
    assert sizes == [(1, 15), (3, 15)]


def test_a_generator_is_read_when_its_images_are_wanted(pipe):
    read = []

    def images():
        for index, image in enumerate(IMAGES):
            read.append(index)
            yield image

    results = pipe(images(), PHRASES, batch_size=2)
    assert len(read) <= 1
    next(results)
    assert read == [0, 1]
    assert len(list(results)) == 4


def test_results_of_a_data_set_have_a_length(pipe):
    _, arguments = ways(IMAGES, [["a"]] * 5)["column"]
    results = pipe(**arguments, batch_size=2)
    assert len(results) == 5 and next(results)[0]["label"] == "a" and len(list(results)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("way", ["list", "column", "generator"])
def test_workers_read_ahead(pipe, way):
    texts = [["a"], PHRASES, ["the"], ["a"], ["bed"]]
    _, arguments = ways(IMAGES, texts)[way]
    all_results = pipe(**arguments, batch_size=2, num_workers=2, return_probabilities=True)
    for results, image, text in zip(all_results, IMAGES, texts, strict=True):
        check(results, text, by_hand(pipe, image, text))


def test_a_model_and_a_processor_in_memory_are_enough(pipe):
    pipe.model.train()
    made = pipeline("referring-image-segmentation", model=pipe.model, processor=pipe.processor, threshold=0.5)
    assert type(made) is ReferringImageSegmentationPipeline and not pipe.model.training
    check(made(IMAGES[0], PHRASES, return_probabilities=True), PHRASES, by_hand(pipe, IMAGES[0], PHRASES))


# --- images from files and addresses ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """Serves `/image.png` and `/text`, and does not answer for `/slow`."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow":
                ended.wait(30)
                return
            self.send_response(200 if self.path == "/image.png" else 404)
            self.end_headers()
            self.wfile.write(Path("image.png").read_bytes() if self.path == "/image.png" else b"no such page")

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        ended.set()
        server.shutdown()


def test_images_from_anywhere(pipe, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(IMAGES[0]).save("image.png")
    expected = by_hand(pipe, IMAGES[0], PHRASES)
    places = ["image.png", Path("image.png").absolute(), f"{server}/image.png", Image.open("image.png"), IMAGES[0]]
    for results in [*map(lambda place: pipe(place, PHRASES, return_probabilities=True), places)]:
        check(results, PHRASES, expected)
    for results in pipe(places, PHRASES, batch_size=2, return_probabilities=True):
        check(results, PHRASES, expected)


def test_a_turned_photograph_is_upright_in_the_results(pipe, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(IMAGES[0]).save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(IMAGES[0], -1).copy()
    for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        results = pipe(image, PHRASES, return_probabilities=True)
        assert results[0]["mask"].size == (30, 44)
        check(results, PHRASES, by_hand(pipe, upright, PHRASES))


def test_an_image_of_16_bits_is_not_clipped(pipe, tmp_path):
    deep = IMAGES[0][..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = by_hand(pipe, IMAGES[0][..., 0], PHRASES)
    check(pipe(tmp_path / "deep.png", PHRASES, return_probabilities=True), PHRASES, expected)


def write_bad_files(folder: Path) -> dict[str, Path]:
    Image.fromarray(picture(200, 200)).save(folder / "good.png")
    content = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    huge = bytearray(content)
    huge[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height, which Pillow takes for a bomb
    (folder / "huge.png").write_bytes(huge)
    os.mkfifo(folder / "pipe.png")
    return {name: folder / f"{name}.png" for name in ("cut", "text", "empty", "huge", "pipe", "missing")} | {
        "folder": folder
    }


def test_images_that_cannot_be_read_are_named(pipe, tmp_path, server, in_time):
    for path in write_bad_files(tmp_path).values():
        for place in (path, str(path)):
            with pytest.raises(OSError, match=f"^{re.escape(str(path))} cannot be read as an image") as raised:
                pipe(place, "a")
            assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
        with pytest.raises(OSError, match=rf"^images\[1\]: {re.escape(str(path))} cannot be read"):
            pipe([IMAGES[0], path], "a")
    for address in (f"{server}/text", "http://127.0.0.1:9/x.png", "data:image/png;base64,AAAA", "x" * 100_000):
        with pytest.raises(OSError, match="cannot be read as an image") as raised:
            pipe(address, "a")
        assert address[:20] in str(raised.value) and len(str(raised.value)) < 500
    with pytest.raises(OSError, match="/slow cannot be read as an image.*timed out"):
        pipe(f"{server}/slow", "a", timeout=0.2)
    with pytest.raises(OSError, match="cut.png cannot be read"):
        pipe(Image.open(tmp_path / "cut.png"), "a")


def test_postscript_is_not_run(pipe, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("PostScript was run"))
    with pytest.raises(OSError, match="a.eps cannot be read as an image: EPS files are programs"):
        pipe(tmp_path / "a.eps", "a")


# --- what is refused -------------------------------------------------------------------------------------------------

ONE, TWO = IMAGES[0], IMAGES[:2]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((ONE, ""), ValueError, "phrase 0 of text is '', which has no words"),
        ((TWO, ["a", " "]), ValueError, r"images\[0\]: phrase 1 of text is ' ', which has no words"),
        ((ONE,), ValueError, "text is missing"),
        ((TWO,), ValueError, r"images\[0\]: text is missing"),
        (([{"image": ONE, "text": "a"}, {"image": ONE}],), ValueError, r"images\[1\]: text is missing"),
        ((ONE, []), ValueError, "text is empty"),
        ((ONE, ["a", 3]), TypeError, "phrase 1 of text is 3, of type int: give a string"),
        ((ONE, [["a"]]), TypeError, r"phrase 0 of text is \['a'\], of type list"),
        ((ONE, {"a"}), TypeError, "text is of type set"),
        ((TWO, [["a"]]), ValueError, "text holds 1 lists for 2 images"),
        ((iter(TWO), [["a"]]), ValueError, "text holds 1 lists, but there are more images"),
        ((iter(TWO), [["a"]] * 3), ValueError, "text holds 3 lists, but there were only 2 images"),
        ((TWO, [["a"], "a"]), ValueError, "text mixes strings with lists"),
        (({"image": ONE, "text": "a"}, "a"), ValueError, "text is given twice"),
        (({"image": ONE, "txt": "a"},), TypeError, "unknown keys 'txt': give image, text, adapter_name"),
        (({"text": "a"},), TypeError, "has no image"),
        ((b"abc", "a"), TypeError, r"images\[0\] is of type bytes"),
        ((None, "a"), TypeError, r"images\[0\] is of type NoneType"),
        (([ONE, 3], "a"), TypeError, r"images\[1\] is of type int"),
        (([ONE, np.zeros((3, 5, 5, 5))], "a"), ValueError, r"images\[1\] has shape \(3, 5, 5, 5\)"),
    ],
)
def test_images_and_texts_that_do_not_fit_are_refused(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        list(pipe(*arguments))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"threshold": 1.5}, ValueError, "threshold is 1.5: it is a probability"),
        ({"threshold": "high"}, ValueError, "threshold is 'high'"),
        ({"adapter_name": "third"}, ValueError, r"no adapters \['third'\]: the model has \['default', 'other'\]"),
        ({"adapter_name": ["other"]}, ValueError, "1 adapter_name for 2 phrases"),
        ({"adapter_name": 3}, TypeError, "adapter_name is of type int"),
        ({"treshold": 0.5}, TypeError, "treshold"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"num_workers": -1}, ValueError, "num_workers"),
    ],
)
def test_options_that_cannot_work_are_refused(pipe, options, error, message, monkeypatch):
    monkeypatch.setattr(pipe.model, "forward", None)  # before the model runs
    with pytest.raises(error, match=message):
        list(pipe(ONE, ["a", "the"], **options))


def test_what_a_pipeline_cannot_be_made_of_is_refused(pipe):
    with pytest.raises(ValueError, match="processor is missing"):
        ReferringImageSegmentationPipeline(model=pipe.model)
    for options, error in (({"threshold": 2}, ValueError), ({"treshold": 0.5}, TypeError)):
        with pytest.raises(error, match="threshold is 2|takes no treshold"):
            ReferringImageSegmentationPipeline(model=pipe.model, processor=pipe.processor, **options)


def test_a_model_with_infinite_weights_is_told_by_the_phrase(pipe, monkeypatch):
    monkeypatch.setattr(
        pipe.model, "forward", lambda **inputs: SimpleNamespace(logits=torch.full((2, 8, 8), torch.nan))
    )
    with pytest.raises(ValueError, match="'left cat': The logits of phrase 0 are not finite"):
        pipe(ONE, ["left cat", "a"])
