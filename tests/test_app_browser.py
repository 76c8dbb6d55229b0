"""The page in a real browser: Debian's `chromium` and `chromium-driver`, driven by selenium.

    DETRIS_SHOTS=docs DETRIS_SHOTS_MODEL=runs/quickstart python -m pytest tests/test_app_browser.py -k screenshots

leaves pictures of the page in a folder: `app_start.png`, `app.png` with a result, and `app_message.png`.
"""

import io
import json
import os
import shutil
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import picture
from helpers.two_adapters import THRESHOLD, pipeline_with_two_adapters
from PIL import Image

REASON = "requirements-app.txt, requirements-dev.txt and Debian's packages chromium and chromium-driver have it"
pytest.importorskip("gradio", reason=f"gradio is not installed: {REASON}")
pytest.importorskip("selenium", reason=f"selenium is not installed: {REASON}")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=f"there is no Chromium: {REASON}"),
]

from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

import app  # noqa: E402
from load_detris import load_pipeline  # noqa: E402

PATIENCE = 30  # seconds
PHRASES = ["cat", "the red thing, left", "cat"]
UPLOADED = "#picture img[src*='/file=']"  # a picture that the server has
FLAGS = """
    --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync --window-size=1280,1100
    --use-fake-ui-for-media-stream --use-fake-device-for-media-stream
""".split()


class Page:
    """The page as somebody sees and uses it in a browser of their own."""

    def __init__(self, driver: webdriver.Chrome, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def find(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition: Callable[[], object]):
        """Wait until the condition holds, and return what it returned."""
        wait = WebDriverWait(self.driver, PATIENCE, 0.05, [StaleElementReferenceException, IndexError, StopIteration])
        return wait.until(lambda _: condition())

    def open(self, url: str) -> "Page":
        self.driver.get(url)
        self.until(lambda: self.find("#segment"))
        self.until(lambda: self.find("#picture input[type=file]"))
        return self

    def upload(self, path: Path) -> None:
        for button in self.find("#picture button[aria-label='Remove Image']"):
            button.click()
        self.until(lambda: not self.find("#picture img"))
        self.find("#picture input[type=file]")[0].send_keys(str(path))
        self.until(lambda: self.find(UPLOADED))

    def type(self, selector: str, text: str) -> None:
        box = self.find(selector)[0]
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(Keys.DELETE, text)

    def set_slider(self, name: str, value: float) -> None:
        self.type(f"#{name} input[type=number]", f"{value}\t")

    def segment(self, path: Path, phrases: list[str]) -> None:
        """Upload, type, press the button, and wait for the masks."""
        before = self.sources()
        self.upload(path)
        self.type("#phrases textarea", "\n".join(phrases))
        self.find("#segment")[0].click()
        self.until(lambda: len(self.sources()) == len(phrases) + 1 and self.sources() != before)

    def sources(self) -> list[str]:
        """The addresses of the shown picture and its masks."""
        return [image.get_attribute("src") for image in self.find("#masks img")]

    def images(self) -> list[np.ndarray]:
        """The shown picture and its masks, which have an alpha channel."""
        images = []
        for address in self.sources():
            with urllib.request.urlopen(address) as answer:
                images.append(np.asarray(Image.open(io.BytesIO(answer.read()))))
        return images

    def alphas(self) -> np.ndarray:
        """How opaque each pixel of each mask is, from 0 to 255."""
        return np.stack([image[..., 3] for image in self.images()[1:]])

    def message(self, containing: str) -> str:
        """Wait for a message, close it, and return what it said."""
        text = self.until(
            lambda: next((body.text for body in self.find(".toast-body") if containing in body.text), "")
        )
        for button in self.find(".toast-close"):
            button.click()
        self.until(lambda: not self.find(".toast-body"))
        return text

    def download(self, name: str) -> bytes:
        """Press a button that downloads a file, and return the file."""
        for path in self.downloads.iterdir():
            path.unlink()
        self.until(lambda: self.find(f"#{name}")[0].is_enabled())
        self.find(f"#{name}")[0].click()
        self.until(lambda: [path.suffix in (".zip", ".json") for path in self.downloads.iterdir()] == [True])
        (path,) = self.downloads.iterdir()
        return path.read_bytes()


@pytest.fixture(scope="module")
def browsers(tmp_path_factory):
    """Opens browsers that know nothing of each other."""
    drivers = []

    def make() -> Page:
        folder = tmp_path_factory.mktemp("browser")
        (folder / "downloads").mkdir()
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
        drivers.append(webdriver.Chrome(options, webdriver.ChromeService(DRIVER)))
        return Page(drivers[-1], folder / "downloads")

    yield make
    for driver in drivers:
        driver.quit()


@pytest.fixture(scope="module")
def pipeline(tiny_backbones, tmp_path_factory, gradio_folder):
    return pipeline_with_two_adapters(tiny_backbones, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def runs(pipeline):
    """Grows by one whenever the model runs."""
    counted = []
    handle = pipeline.model.register_forward_hook(lambda *_: counted.append(1))
    yield counted
    handle.remove()


def serve(pipeline):
    page = app.build_page(pipeline)
    _, url, _ = app.serve(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    return page, url


@pytest.fixture(scope="module")
def url(pipeline):
    page, url = serve(pipeline)
    yield url
    page.close()


@pytest.fixture(scope="module")
def page(browsers):
    return browsers()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in (0, 1):
        Image.fromarray(picture(60, 44 + 4 * seed, seed)).save(folder / f"{seed}.png")
    return [folder / "0.png", folder / "1.png"]


@pytest.fixture
def segmented(page, url, pictures, runs) -> Page:
    """The page after one run, with all sliders as they are at first."""
    page.open(url).segment(pictures[0], PHRASES)
    return page


def expected_masks(pipeline, path: Path, phrases: list[str], **options) -> np.ndarray:
    return np.stack([np.asarray(entry["mask"]) == 255 for entry in pipeline(str(path), phrases, **options)])


def test_the_page_asks_nothing_of_other_machines(page, url):
    page.open(url)
    page.until(lambda: page.find("#examples img"))
    names = page.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(names) > 10 and all(name.startswith((url, "data:", "blob:")) for name in names)
    assert page.driver.title == "DETRIS"


def test_what_is_shown_are_the_pipelines_masks(segmented, pipeline, pictures, runs):
    before = len(runs)
    shown = segmented.images()
    assert np.array_equal(shown[0], Image.open(pictures[0]))
    masks = expected_masks(pipeline, pictures[0], PHRASES)
    assert np.array_equal(segmented.alphas() > 0, masks) and 0 < masks.mean() < 1
    assert set(np.unique(segmented.alphas())) == {0, int(255 * np.float32(0.6))}
    for image, color in zip(shown[1:], app.PALETTE):
        assert (image[image[..., 3] > 0][:, :3] == color).all()
    assert len(runs) == before + 1  # this test's own
    assert all(image.is_displayed() and image.size["width"] > 200 for image in segmented.find("#masks img"))


def test_a_touched_legend_entry_shows_its_mask_alone(segmented):
    entries = segmented.find("#masks .legend-item")
    assert [entry.text for entry in entries] == ["1. cat", "2. the red thing, left", "3. cat"]
    ActionChains(segmented.driver).move_to_element(entries[1]).perform()

    def opacities() -> list[float]:
        return [float(mask.value_of_css_property("opacity")) for mask in segmented.find("#masks .mask")]

    segmented.until(lambda: opacities() == [0, 1, 0])


def test_the_table_and_the_summary_say_what_was_found(segmented, pipeline, pictures):
    text = segmented.find("#table")[0].text
    for entry in pipeline(str(pictures[0]), PHRASES):
        assert entry["label"] in text and f"{entry['score']:.3f}" in text
    summary = " ".join(segmented.until(lambda: segmented.find("#summary")[0].text).split())
    assert "3 phrases in " in summary and " s on cpu, by " in summary and "adapter default" in summary


def test_threshold_and_opacity_answer_without_the_model(segmented, pipeline, pictures, runs):
    before = len(runs)
    first = segmented.alphas()
    segmented.set_slider("threshold", 0.1)
    started = time.monotonic()
    segmented.until(lambda: (segmented.alphas() > 0).sum() != (first > 0).sum())
    assert time.monotonic() - started < 5
    lower = segmented.alphas()
    segmented.set_slider("opacity", 0.2)
    segmented.until(lambda: segmented.alphas().max() == int(255 * np.float32(0.2)))
    assert np.array_equal(segmented.alphas() > 0, lower > 0)
    assert len(runs) == before
    assert np.array_equal(lower > 0, expected_masks(pipeline, pictures[0], PHRASES, threshold=0.1))
    segmented.type("#threshold input[type=number]", "")
    time.sleep(0.5)
    assert not segmented.find(".toast-body")  # an empty box is no error


def test_downloads_hold_what_is_shown(segmented, pipeline, pictures):
    for threshold in (THRESHOLD, 0.1):
        if threshold != THRESHOLD:
            shown = segmented.sources()
            segmented.set_slider("threshold", threshold)
            segmented.until(lambda shown=shown: segmented.sources() != shown)
            segmented.until(lambda: segmented.find("#zip")[0].is_enabled())
        found = pipeline(str(pictures[0]), PHRASES, threshold=threshold)
        records = json.loads(segmented.download("json"))
        with zipfile.ZipFile(io.BytesIO(segmented.download("zip"))) as files:
            assert json.loads(files.read("results.json")) == records
            for record, entry in zip(records, found, strict=True):
                assert np.array_equal(Image.open(io.BytesIO(files.read(record["mask"]))), entry["mask"])
                assert (record["label"], record["box"]) == (entry["label"], entry["box"])
                assert record["score"] == pytest.approx(entry["score"], abs=1e-6)
                assert (record["threshold"], record["size"]) == (threshold, [60, 44])
                assert record["model"] == Path(pipeline.model.name_or_path).name


def test_the_heat_map_is_the_chosen_phrases(segmented, pipeline, pictures, runs):
    before = len(runs)
    next(tab for tab in segmented.find("button[role=tab]") if tab.text == "Heat map").click()
    first = segmented.until(lambda: segmented.find("#heat img")[0].get_attribute("src"))
    segmented.find("#heat-phrase input")[0].click()
    segmented.until(lambda: segmented.find("[role=option]")[1]).click()
    second = segmented.until(
        lambda: (source := segmented.find("#heat img")[0].get_attribute("src")) != first and source
    )
    assert len(runs) == before
    result = app.run(pipeline, Image.open(pictures[0]), PHRASES, None)
    with urllib.request.urlopen(second) as answer:
        assert np.array_equal(Image.open(io.BytesIO(answer.read())), app.draw_heat_map(result, 1)[0])


def test_an_adapter_is_chosen(segmented, pipeline, pictures):
    shown = segmented.sources()
    segmented.find("#adapter input")[0].click()
    segmented.until(lambda: segmented.find("[role=option]")[1]).click()
    segmented.find("#segment")[0].click()
    segmented.until(lambda: segmented.sources() != shown)
    masks = expected_masks(pipeline, pictures[0], PHRASES, adapter_name="other")
    assert np.array_equal(segmented.alphas() > 0, masks)
    assert not np.array_equal(masks, expected_masks(pipeline, pictures[0], PHRASES))
    segmented.until(lambda: "adapter other" in segmented.find("#summary")[0].text)
    assert {record["adapter"] for record in json.loads(segmented.download("json"))} == {"other"}


def test_an_example_is_taken(page, url, pipeline):
    page.open(url)
    page.until(lambda: page.find("#examples tbody tr")[0]).click()
    page.until(lambda: page.find(UPLOADED))
    phrases = page.until(lambda: page.find("#phrases textarea")[0].get_attribute("value")).split("\n")
    page.find("#segment")[0].click()
    page.until(lambda: len(page.sources()) == len(phrases) + 1)
    with urllib.request.urlopen(page.find("#picture img")[0].get_attribute("src")) as answer:
        image = Image.open(io.BytesIO(answer.read()))
    masks = np.stack([np.asarray(entry["mask"]) == 255 for entry in pipeline(image, phrases)])
    assert np.array_equal(page.alphas() > 0, masks)


def test_the_camera_takes_a_picture(page, url):
    page.open(url)
    page.type("#phrases textarea", "cat")
    page.find("#picture button[aria-label='Capture from camera']")[0].click()
    page.until(lambda: next(button for button in page.find("#picture button") if "Webcam" in button.text)).click()
    shoot = page.until(lambda: page.find("#picture button[aria-label='capture photo']")[0])
    page.until(lambda: page.driver.execute_script("return document.querySelector('#picture video').readyState") == 4)
    shoot.click()
    page.until(lambda: page.find(UPLOADED))
    page.find("#segment")[0].click()
    page.until(lambda: len(page.sources()) == 2)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "This file is empty"),
        (b"no picture", "cannot be read (it is no JPEG or PNG"),
    ],
)
def test_bad_pictures_get_a_message(segmented, tmp_path, content, message):
    (tmp_path / "x.png").write_bytes(content)
    segmented.upload(tmp_path / "x.png")
    segmented.find("#segment")[0].click()
    text = segmented.message(message)
    assert "Traceback" not in text and "/tmp" not in text
    segmented.until(lambda: not segmented.sources())  # masks of another picture do not stay beside it


def test_empty_phrases_and_missing_pictures_get_a_message(segmented, pictures, runs):
    before = len(runs)
    segmented.type("#phrases textarea", "  \n ")
    segmented.find("#segment")[0].click()
    segmented.message("write at least one phrase")
    segmented.type("#phrases textarea", "x" * 301)
    segmented.find("#segment")[0].click()
    segmented.message("301 characters; give at most 300")
    segmented.find("#picture button[aria-label='Remove Image']")[0].click()
    segmented.find("#segment")[0].click()
    segmented.message("Give a picture first")
    assert len(runs) == before
    segmented.segment(pictures[0], PHRASES)  # all is well again
    assert len(runs) == before + 1


def test_private_addresses_get_a_message(page, url):
    page.open(url)
    page.type("#address input, #address textarea", f"{url}theme.css\n")
    assert "127.0.0.1 failed validation" in page.message("Nothing could be fetched")


def test_files_that_are_too_large_get_a_message(page, url, tmp_path):
    (tmp_path / "x.png").write_bytes(bytes(app.MAX_BYTES + 1))
    page.open(url)
    page.find("#picture input[type=file]")[0].send_keys(str(tmp_path / "x.png"))
    page.message("exceed the maximum allowed size")


def test_two_people_at_once_get_their_own_results(browsers, page, url, pipeline, pictures, runs):
    people, phrases = [page, browsers()], [["cat", "the red thing"], ["the cat", "a cat and the thing"]]
    for person, path, texts in zip(people, pictures, phrases):
        person.open(url).upload(path)
        person.type("#phrases textarea", "\n".join(texts))
    for person in people:
        person.find("#segment")[0].click()
    for person in people:
        person.until(lambda person=person: len(person.sources()) == 3)
    for threshold in (THRESHOLD, 0.1):
        if threshold != THRESHOLD:
            for person in people:
                person.shown = person.sources()
                person.set_slider("threshold", threshold)
        for person, path, texts in zip(people, pictures, phrases):
            if threshold != THRESHOLD:
                person.until(lambda person=person: person.sources() != person.shown)
            assert np.array_equal(person.images()[0], Image.open(path))
            masks = expected_masks(pipeline, path, texts, threshold=threshold)
            person.until(lambda person=person, masks=masks: np.array_equal(person.alphas() > 0, masks))
            assert [record["label"] for record in json.loads(person.download("json"))] == texts


def test_a_phone_shows_all_of_the_page(page, url, pictures):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open(url).segment(pictures[0], PHRASES)
        assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
        for selector in ("#picture", "#phrases", "#segment", "#threshold", "#masks", "#table", "#zip", "#json"):
            (element,) = page.find(selector)
            assert element.rect["x"] >= 0 and element.rect["x"] + element.rect["width"] <= 390, selector
            assert element.rect["width"] > 250, selector
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.skipif("DETRIS_SHOTS" not in os.environ, reason="DETRIS_SHOTS names no folder for pictures of the page")
def test_screenshots(browsers, pipeline):
    """Leave pictures of the page in a folder; look at them."""
    folder, model = Path(os.environ["DETRIS_SHOTS"]), os.environ.get("DETRIS_SHOTS_MODEL")
    folder.mkdir(parents=True, exist_ok=True)
    blocks, url = serve(load_pipeline(model) if model else pipeline)
    page = browsers().open(url)
    page.driver.set_window_size(1280, 1400)

    def shoot(name: str) -> None:
        time.sleep(1)  # until all is drawn and still
        page.driver.save_screenshot(str(folder / name))

    page.until(lambda: page.find("#examples img"))
    shoot("app_start.png")
    page.find("#examples tbody tr")[0].click()
    page.until(lambda: page.find(UPLOADED))
    page.find("#segment")[0].click()
    page.until(lambda: page.find("#masks .mask"))
    page.until(lambda: page.find("#zip")[0].is_enabled())
    shoot("app.png")
    page.type("#phrases textarea", " ")
    page.find("#segment")[0].click()
    page.until(lambda: page.find(".toast-body"))
    shoot("app_message.png")
    blocks.close()
