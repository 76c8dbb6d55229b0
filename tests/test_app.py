"""What the page does with pictures, phrases and results; `test_app_browser.py` looks at it in a browser."""

import asyncio
import http.server
import io
import json
import re
import socket
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import picture
from helpers.two_adapters import THRESHOLD, pipeline_with_two_adapters
from PIL import Image

gr = pytest.importorskip("gradio", reason="gradio is not installed: requirements-app.txt has it")

import httpx  # noqa: E402
from gradio import processing_utils  # noqa: E402

import app  # noqa: E402
from gallery import PALETTE  # noqa: E402

PHRASES = ["cat", "the red thing, left", "cat"]


@pytest.fixture(scope="module")
def pipeline(tiny_backbones, tmp_path_factory, gradio_folder):
    return pipeline_with_two_adapters(tiny_backbones, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(picture(60, 44, seed=3))


@pytest.fixture(scope="module")
def result(pipeline, image):
    return app.run(pipeline, image, PHRASES, None)


# --- pictures and phrases from strangers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.gif", "x.bmp", "x.tiff"])
def test_pictures_of_many_formats_are_read(tmp_path, image, name):
    image.save(tmp_path / name)
    with Image.open(tmp_path / name) as expected:
        assert np.array_equal(app.read_picture(tmp_path / name), expected.convert("RGB"))


def test_pictures_are_read_upright(tmp_path, image):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    image.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(app.read_picture(tmp_path / "x.png"), np.rot90(np.asarray(image), -1))


def test_pictures_of_16_bits_lose_the_lower_eight(tmp_path):
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.array_equal(app.read_picture(tmp_path / "x.png"), np.repeat(values[..., None] // 256, 3, 2))


def whole(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda image: b"", "This file is empty"),
        (lambda image: b"no picture", "Image x.png cannot be read .it is no JPEG or PNG"),
        (lambda image: whole(image)[:-600], "x.png.*Repair|x.png cannot be read"),
        (lambda image: b"\0\0\0\x18ftypheic" + bytes(20), "it is HEIC or AVIF.; convert it"),
        (lambda image: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
        (lambda image: whole(image) + bytes(app.MAX_BYTES), "has 20.0 MB; give one of at most 20 MB"),
        (lambda image: whole(Image.new("1", (6000, 5000))), "6,000 x 5,000 pixels: make it smaller"),
        (lambda image: whole(Image.new("1", (40_000, 2))), "2 x 40000 pixels .*at most"),
        (lambda image: whole(Image.new("I", (20, 30), 70_000), "TIFF"), "holds int32 values from 70000 to 70000"),
    ],
)
def test_what_is_no_good_picture_is_refused_without_the_servers_folders(tmp_path, image, content, message):
    (tmp_path / "x.png").write_bytes(content(image))
    with pytest.raises((OSError, ValueError), match=message) as caught:
        app.read_picture(tmp_path / "x.png")
    assert str(tmp_path) not in str(caught.value)


def test_large_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("1", (6000, 5000)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="make it smaller"):
        app.read_picture(tmp_path / "x.png")


def test_phrases_stand_one_on_a_line():
    assert app.read_phrases("  left   cat\n\n\tthe remote, on it \r\n") == ["left cat", "the remote, on it"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "at least one phrase"),
        (" \n\t\n", "at least one phrase"),
        (None, "at least one phrase"),
        ("cat\n" * 21, "21 phrases: give at most 20"),
        ("c" * 301, "301 characters; give at most 300"),
    ],
)
def test_phrases_that_are_missing_too_many_or_too_long_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        app.read_phrases(text)


def test_errors_become_messages_without_markup():
    with pytest.raises(gr.Error) as caught, app.messages_on_the_page():
        raise ValueError("<img src=x onerror=alert(1)>\nis no phrase")
    assert caught.value.message == "&lt;img src=x onerror=alert(1)&gt; is no phrase"


def test_faults_of_the_server_are_logged_and_not_shown(caplog):
    with pytest.raises(gr.Error, match="its log says why") as caught, app.messages_on_the_page():
        raise RuntimeError("secret")
    assert "secret" not in caught.value.message and "RuntimeError: secret" in caplog.text


# --- addresses on the web --------------------------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    """A web server that has a picture, a page, a redirect, and an answer without end."""

    picture = whole(Image.fromarray(picture()))

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://10.1.2.3/picture.png")
            self.end_headers()
            return
        if self.path == "/missing.png":
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        if self.path == "/endless":
            try:
                while True:
                    self.wfile.write(bytes(2**20))
            except OSError:
                return
        self.wfile.write(self.picture if "picture" in self.path else b"<html>")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(monkeypatch):
    """Address of a web server whose host `web.test` counts as public, at port 80 of nowhere else."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    resolve = app.safehttpx.async_validate_url

    async def validate(host: str) -> str:
        return "127.0.0.1" if host == "web.test" else await resolve(host)

    monkeypatch.setattr(app.safehttpx, "async_validate_url", validate)
    monkeypatch.setattr(processing_utils, "async_transport", app.GuardedTransport())
    monkeypatch.setattr("safehttpx.async_resolve_hostname_google", no_other_resolver)
    yield server
    server.shutdown()
    server.server_close()


async def no_other_resolver(host: str) -> list[str]:
    return []


def test_a_picture_is_fetched_from_its_address(web, tmp_path):
    path = app.fetch_picture(f" http://web.test:{web.server_port}/picture.png\n", str(tmp_path))
    assert np.array_equal(app.read_picture(path), picture())


@pytest.mark.parametrize(
    "address, message",
    [
        ("", "Give the address of a picture"),
        ("file:///etc/passwd", "Give the address of a picture"),
        ("/etc/passwd", "Give the address of a picture"),
        ("http://", "Nothing could be fetched"),
        ("http://web.test:{port}/missing.png", "Status code: 404"),
        ("http://web.test:{port}/page", "cannot be read"),
        ("http://web.test:{port}/endless", "it has over 20 MB"),
        ("http://web.test:{port}/away", "10.1.2.3 failed validation"),
        ("http://127.0.0.1:{port}/picture.png", "127.0.0.1 failed validation"),
        ("http://[::1]:{port}/picture.png", "::1 failed validation"),
        ("http://[::ffff:127.0.0.1]:{port}/picture.png", "failed validation"),
        ("http://2130706433:{port}/picture.png", "failed validation|Unable to resolve"),
        ("http://localhost:{port}/picture.png", "localhost failed validation"),
        ("http://169.254.169.254/latest/meta-data", "169.254.169.254 failed validation"),
        ("http://0.0.0.0:{port}/picture.png", "0.0.0.0 failed validation"),
    ],
)
def test_addresses_without_a_picture_and_private_ones_are_refused(web, tmp_path, address, message):
    with pytest.raises((OSError, ValueError), match=message):
        app.fetch_picture(address.format(port=web.server_port), str(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not web.asked or "web.test" in address


def test_a_server_that_answers_too_slowly_is_left(web, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "DOWNLOAD_SECONDS", -1)
    with pytest.raises(ValueError, match="it takes over -1 seconds"):
        app.fetch_picture(f"http://web.test:{web.server_port}/picture.png", str(tmp_path))


def test_gradios_own_downloads_are_guarded_too(web, monkeypatch):
    monkeypatch.setattr(app, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="over 0 MB"):
        asyncio.run(processing_utils.async_ssrf_protected_get(f"http://web.test:{web.server_port}/picture.png"))
    assert isinstance(app.GuardedTransport(), httpx.AsyncBaseTransport)


# --- results ---------------------------------------------------------------------------------------------------------


def test_masks_are_the_pipelines(pipeline, image, result):
    found = pipeline(image, PHRASES)
    for mask, entry in zip(result.masks(THRESHOLD), found, strict=True):
        assert 0 < mask.mean() < 1
        assert np.array_equal(mask, np.asarray(entry["mask"]) == 255)


@pytest.mark.parametrize("threshold", [0.01, 0.2, THRESHOLD, 0.7, 0.99])
def test_descriptions_are_the_pipelines_at_every_threshold(pipeline, image, result, threshold):
    found = pipeline(image, PHRASES, threshold=threshold)
    for record, entry in zip(app.describe(result, threshold), found, strict=True):
        assert (record["label"], record["box"]) == (entry["label"], entry["box"])
        assert record["score"] == pytest.approx(entry["score"], abs=1e-6)
        assert (record["size"], record["threshold"]) == ([60, 44], threshold)
        assert record["model"] == Path(pipeline.model.name_or_path).name


def test_phrases_with_equal_words_have_labels_and_colours_of_their_own(result):
    drawn = app.draw(result, THRESHOLD, 0.5)
    _, annotations = drawn.constructor_args["value"]
    labels = [label for _, label in annotations]
    assert labels == ["1. cat", "2. the red thing, left", "3. cat"]
    colors = drawn.constructor_args["color_map"]
    assert list(colors) == labels
    assert [tuple(bytes.fromhex(color[1:])) for color in colors.values()] == PALETTE[:3]


@pytest.mark.parametrize("opacity", [0, 0.25, 1])
def test_drawn_masks_have_the_pixels_of_the_pipelines_and_the_chosen_opacity(pipeline, image, result, opacity):
    picture_drawn, annotations = app.draw(result, THRESHOLD, opacity).constructor_args["value"]
    assert np.array_equal(picture_drawn, image)
    for (values, _), entry in zip(annotations, pipeline(image, PHRASES), strict=True):
        assert np.array_equal(values, np.float32(opacity) * (np.asarray(entry["mask"]) == 255))


def test_large_pictures_are_drawn_smaller_but_kept_whole(monkeypatch, pipeline, image):
    monkeypatch.setattr(app, "DISPLAY_SIDE", 30)
    result = app.run(pipeline, image, ["cat"], None)
    picture_drawn, ((mask, _),) = app.draw(result, THRESHOLD, 1).constructor_args["value"]
    assert picture_drawn.shape == (30, 22, 3) and mask.shape == (30, 22)
    assert mask.mean() == pytest.approx(result.masks(THRESHOLD)[0].mean(), abs=0.01)
    assert app.draw_heat_map(result, 0)[0].shape == (30, 22, 3)
    assert result.masks(THRESHOLD)[0].shape == (60, 44)


def test_the_table_says_where_each_phrase_was_found(result):
    rows = app.tabulate(result, THRESHOLD)
    for row, record, mask in zip(rows, app.describe(result, THRESHOLD), result.masks(THRESHOLD), strict=True):
        left, top, width, height = map(int, row[2:6])
        assert mask[top : top + height, left : left + width].sum() == mask.sum()
        assert mask[top].any() and mask[top + height - 1].any() and mask[:, left].any()
        assert float(row[1]) == pytest.approx(record["score"], abs=5e-4)
        assert row[6] == f"{100 * mask.sum() / mask.size:.1f}%"


def test_the_table_says_where_nothing_was_found(result):
    result = replace(result, probabilities=[np.zeros((60, 44), np.float32)], phrases=["cat"])
    assert app.tabulate(result, THRESHOLD) == [["1. cat", "nothing found", "", "", "", "", ""]]
    (record,) = app.describe(result, THRESHOLD)
    assert (record["box"], record["score"]) == (None, 0.0)


def test_the_heat_map_is_brighter_where_the_probability_is_higher(result):
    ramp = np.repeat(np.linspace(0, 1, 44, dtype=np.float32)[None], 60, 0)
    black = Image.new("RGB", (44, 60))
    result = replace(result, image=black, probabilities=[ramp], phrases=["cat"])
    heat, annotations = app.draw_heat_map(result, 0)
    brightness = heat.astype(int).sum(-1)
    assert annotations == [] and (np.diff(brightness, axis=1) >= 0).all()
    assert brightness[0, 0] < 20 and brightness[0, -1] > 300


def test_the_archive_holds_masks_and_descriptions(pipeline, image, result):
    archive, text = app.pack(result, THRESHOLD)
    records = json.loads(text)
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        assert files.namelist() == ["01_cat.png", "02_the_red_thing__left.png", "03_cat.png", "results.json"]
        assert json.loads(files.read("results.json")) == records
        for record, entry in zip(records, pipeline(image, PHRASES), strict=True):
            mask = Image.open(io.BytesIO(files.read(record["mask"])))
            assert mask.mode == "L" and np.array_equal(mask, entry["mask"])
    names = ["label", "score", "box", "size", "threshold", "model", "adapter", "mask"]
    assert [list(record) for record in records] == [names] * 3


def test_hostile_phrases_name_no_other_files(result):
    result = replace(result, phrases=["../../x", "C:\\con", "ö" * 300])
    with zipfile.ZipFile(io.BytesIO(app.pack(result, THRESHOLD)[0])) as files:
        assert files.namelist()[:3] == ["01_______x.png", "02_C__con.png", f"03_{'ö' * 40}.png"]


@pytest.mark.parametrize("value", [None, -0.1, 1.1, float("nan"), "0.5"])
def test_what_is_no_number_of_a_slider_changes_nothing(result, value):
    unchanged = gr.skip()
    assert app.show(result, value, 0.5, "") == app.show(result, 0.5, value, "") == unchanged
    assert app.fade(result, 0.5, value) == app.offer(result, value) == unchanged


def test_sliders_change_nothing_before_the_first_run_and_say_when_a_result_was_forgotten(monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", said.append)
    assert app.show(None, 0.5, 0.5, "") == app.fade(None, 0.5, 0.5) == app.offer(None, 0.5) == gr.skip()
    assert app.choose_heat_map(None, 0) == gr.skip() and not said
    assert app.show(None, 0.5, 0.5, "3 phrases in 0.1 s") == gr.skip()
    assert "press Segment once more" in said[0]


def test_too_many_phrases_for_a_large_picture_are_refused(monkeypatch, image):
    monkeypatch.setattr(app, "MAX_KEPT", 60 * 44 * 2)
    with pytest.raises(ValueError, match="3 phrases for 0.0 million pixels.*at most 2"):
        app.run(None, image, PHRASES, None)


# --- the page and its command ----------------------------------------------------------------------------------------


def test_examples_are_scenes_with_their_phrases(tmp_path):
    examples = app.draw_examples(tmp_path)
    assert len(examples) == 4
    for path, text in examples:
        assert Image.open(path).size == (384, 384)
        assert len(app.read_phrases(text)) > 1 and len(text) <= app.EXAMPLE_LENGTH
    assert examples == app.draw_examples(tmp_path)


def test_the_page_offers_the_adapters(pipeline):
    def adapters_of(page: gr.Blocks) -> gr.Dropdown:
        return next(block for block in page.blocks.values() if getattr(block, "elem_id", "") == "adapter")

    dropdown = adapters_of(app.build_page(pipeline))
    assert [value for _, value in dropdown.choices] == ["default", "other"]
    assert dropdown.visible and dropdown.value == "default"


def test_serving_the_page_asks_nothing_of_other_machines(pipeline, monkeypatch):
    asked, connect = set(), socket.socket.connect

    def recorded(self, address):
        asked.add(address[0])
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    page = app.build_page(pipeline)
    _, url, _ = app.serve(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    served = httpx.get(url).text
    page.close()
    assert "DETRIS" in served and asked == {"127.0.0.1"}
    loaded = re.findall(r"""(?:src|href)=["'](https?:[^"']+)|url\((https?:[^)]+)""", served)
    assert not loaded


@pytest.fixture
def served(monkeypatch):
    """What `main` has loaded and served."""
    calls = {}
    monkeypatch.setattr(app, "load_pipeline", lambda *arguments: calls.setdefault("loaded", arguments))
    monkeypatch.setattr(app, "build_page", lambda pipeline: "the page")
    monkeypatch.setattr(app, "serve", lambda page, **options: calls.update(page=page, **options))
    monkeypatch.delenv("DETRIS_MODEL", raising=False)
    return calls


def test_the_command_loads_the_model_and_serves_the_page(served):
    app.main(
        "--model runs/x --adapter a=b c=d --adapter e=f --device cpu --dtype bfloat16 --host 0.0.0.0 "
        "--port 8001 --share".split()
    )
    assert served == {
        "loaded": ("runs/x", {"a": "b", "c": "d", "e": "f"}, "cpu", "bfloat16"),
        "page": "the page",
        "server_name": "0.0.0.0",
        "server_port": 8001,
        "share": True,
    }


def test_a_space_names_its_model_by_an_environment_variable(served, monkeypatch):
    monkeypatch.setenv("DETRIS_MODEL", "someone/detris")
    app.main([])
    assert served["loaded"] == ("someone/detris", {}, None, None) and not served["share"]


def test_without_a_model_the_command_says_how_to_name_one(served):
    with pytest.raises(SystemExit, match="--model runs/quickstart.*DETRIS_MODEL"):
        app.main([])
    assert not served


def test_a_model_that_cannot_be_loaded_is_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="^error: .*runs/nowhere"):
        app.main(["--model", str(tmp_path / "runs/nowhere")])
