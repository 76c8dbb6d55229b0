"""A page in the browser: a picture and some phrases go in, the masks of what the phrases name come out.

    python app.py --model runs/quickstart [--adapter name=path ...] [--device cuda] [--port 7860] [--share]

It is a Space of Hugging Face, too: see docs/space.md. The probability maps of a visitor's last run are kept for this
visitor alone, so threshold, opacity and heat map answer without running the model again.
"""

import html
import io
import json
import logging
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import cv2
import gradio as gr
import httpx
import numpy as np
import safehttpx
import torch
from gradio import processing_utils
from gradio.utils import get_upload_folder
from PIL import Image
from transformers import HfArgumentParser

from configuration_detris import one_line, short_repr
from data.images import IMAGE_FORMATS, opened_image
from data.shapes import generate_rows
from gallery import PALETTE
from images_detris import as_rgb
from load_detris import load_pipeline, named_adapters
from processing_detris import details_of, foreground

logger = logging.getLogger(__name__)

MAX_BYTES = 20 * 2**20  # of a picture's file
MAX_PIXELS = 24_000_000  # of a picture: what good cameras take
MAX_PHRASES, MAX_PHRASE_LENGTH = 20, 300  # characters
MAX_KEPT = 64_000_000  # pixels times phrases that are kept for a visitor: four bytes of probability, one of the mask
MAX_VISITORS = 8  # whose results are kept; the one who has been away for longest is forgotten first
DISPLAY_SIDE = 1024  # pixels of a shown picture's longer side; downloads have the picture's own size
DOWNLOAD_SECONDS = 30
CACHED_FOR = 3600  # seconds that pictures which the page has shown stay on the disk
HEAT = 0.65  # share of the heat map's colour in its pixels, over the grey picture

INTRODUCTION = """
# Segment what you name

Give a picture and say what you look for, in plain words: *left cat*, *the remote next to her*. Each line is a phrase.
Each phrase gets a mask in its own colour; touch a phrase in the legend to see its mask alone.
Threshold, opacity and heat map answer at once, because the model runs only when you press **Segment**.
"""
EXAMPLE_LENGTH = 60  # characters that Gradio shows of a text among the examples
EXAMPLE_NOTE = "Examples: drawn scenes, such as the quickstart trains on"
TABLE_HEADER = ["phrase", "score", "left", "top", "width", "height", "share"]
CSS = """
#masks img, #heat img {max-height: 75vh; object-fit: contain}
#examples td {white-space: pre-line; text-align: left}
"""


# --- pictures and phrases from strangers -----------------------------------------------------------------------------


def read_picture(path: str | os.PathLike) -> Image.Image:
    """Read a stranger's picture, upright, in RGB with 8 bits a channel.

    Bytes and pixels are counted before the picture takes memory.

    Raises:
        OSError: the file is empty, no picture, or broken.
        ValueError: it is too large, or its pixels are numbers that are no colours.
    """
    size = os.path.getsize(path)
    if size == 0:
        raise OSError("This file is empty: choose another picture.")
    if size > MAX_BYTES:
        raise ValueError(f"This picture has {size / 2**20:.1f} MB; give one of at most {MAX_BYTES // 2**20} MB.")
    try:
        with opened_image(path, "image", "", IMAGE_FORMATS) as (_, image):
            width, height = image.size  # from the file's header
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"This picture is {width:,} x {height:,} pixels: make it smaller, to at most "
                f"{MAX_PIXELS // 10**6} million pixels."
            )
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return Image.fromarray(as_rgb(image, "This picture"))
    except (OSError, ValueError) as error:
        message = one_line(error).replace(os.fspath(path), Path(path).name)  # the server's folders are its own affair
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(message[0].upper() + message[1:]) from error


class GuardedTransport(httpx.AsyncHTTPTransport):
    """How Gradio fetches what an address of a stranger names: no private host, no file that is too large or too slow.

    Gradio checks hosts, too, but reads answers of any size into memory, and waits for them as long as it takes.
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request to the public address of its host; redirects come here, too, one by one.

        Raises:
            ValueError: the host has no public address, or the answer is too large.
        """
        host = request.url.host
        extensions = request.extensions | {"sni_hostname": host}
        url = request.url
        if not safehttpx.matches_domain_whitelist(host, processing_utils.PUBLIC_HOSTNAME_WHITELIST):
            url = url.copy_with(host=await safehttpx.async_validate_url(host))
        answer = await super().handle_async_request(
            httpx.Request(request.method, url, headers=request.headers, extensions=extensions)
        )
        answer.stream = _LimitedStream(answer.stream)
        return answer


class _LimitedStream(httpx.AsyncByteStream):
    """An answer that breaks off when it has become too large or has taken too long."""

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self.stream = stream

    async def __aiter__(self):
        size, started = 0, time.monotonic()
        async for chunk in self.stream:
            size += len(chunk)
            if size > MAX_BYTES:
                raise ValueError(f"it has over {MAX_BYTES // 2**20} MB")
            if time.monotonic() - started > DOWNLOAD_SECONDS:
                raise ValueError(f"it takes over {DOWNLOAD_SECONDS} seconds")
            yield chunk

    async def aclose(self) -> None:
        """Close the connection."""
        await self.stream.aclose()


def fetch_picture(url: str, folder: str) -> Path:
    """Fetch the picture that a stranger's address names, into a folder of its own; return its path.

    It is a `Path`, because Gradio would read the file that a text ending in .svg names and write it into the page.

    Raises:
        ValueError: this is no address, or no picture can be had there.
    """
    url = url.strip()
    if not url.startswith(("http://", "https://")):
        raise ValueError("Give the address of a picture; it begins with https://.")
    try:
        path = processing_utils.ssrf_protected_download(url, folder)
    except Exception as error:  # httpx, httpcore, safehttpx and Gradio raise many types
        raise ValueError(f"Nothing could be fetched from {short_repr(url)}: {one_line(error)}.") from error
    try:
        read_picture(path)
    except (OSError, ValueError):
        os.remove(path)
        raise
    return Path(path)


def read_phrases(text: str) -> list[str]:
    """Read phrases, one a line; spaces around them and empty lines do not count.

    Raises:
        ValueError: there is none, there are too many, or one is too long.
    """
    phrases = [phrase for line in (text or "").splitlines() if (phrase := " ".join(line.split()))]
    if not phrases:
        raise ValueError("Say what to look for: write at least one phrase, each on a line of its own.")
    if len(phrases) > MAX_PHRASES:
        raise ValueError(f"These are {len(phrases)} phrases: give at most {MAX_PHRASES} at a time.")
    for phrase in phrases:
        if len(phrase) > MAX_PHRASE_LENGTH:
            raise ValueError(
                f"The phrase {short_repr(phrase)} has {len(phrase):,} characters; give at most {MAX_PHRASE_LENGTH}."
            )
    return phrases


@contextmanager
def messages_on_the_page() -> Iterator[None]:
    """Show errors as messages on the page. Visitors read what is wrong with their input, but no stack trace."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        message = html.escape(one_line(error))  # Gradio shows messages as HTML
        raise gr.Error(message, print_exception=False) from error
    except Exception as error:
        logger.exception("A run failed.")
        raise gr.Error("The run failed on the server, and its log says why.", print_exception=False) from error


# --- what a visitor's last run found ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Result:
    """What one run found, for as many phrases as there are `probabilities` (H, W)."""

    image: Image.Image
    phrases: list[str]
    probabilities: list[np.ndarray]
    model: str
    adapter: str | None
    seconds: float
    latest: tuple[float | None, list[dict]] = field(default=(None, []), init=False)  # a threshold, and what is there

    def details(self, threshold: float) -> list[dict]:
        """The mask (H, W), score and box of each phrase, as `DetrisProcessor` gives them.

        Those of the latest threshold are kept, because the picture, the table and both files ask for them in turn.
        """
        kept, details = self.latest
        if kept != threshold:
            details = [
                details_of(foreground(probabilities, threshold), probabilities)
                for probabilities in map(torch.from_numpy, self.probabilities)
            ]
            details = [{"mask": d["mask"].numpy(), "score": d["score"], "box": d["box"]} for d in details]
            self.latest = threshold, details
        return details

    def masks(self, threshold: float) -> list[np.ndarray]:
        """The pixels (H, W) of each phrase."""
        return [details["mask"] for details in self.details(threshold)]

    def labels(self) -> list[str]:
        """A name for each phrase that no other has: two phrases may be equal."""
        return [f"{number}. {phrase}" for number, phrase in enumerate(self.phrases, 1)]

    @cached_property
    def shown(self) -> Image.Image:
        """The picture as it is shown: smaller if it is large."""
        scale = min(1, DISPLAY_SIDE / max(self.image.size))
        size = tuple(max(1, round(scale * side)) for side in self.image.size)
        return self.image.resize(size, Image.Resampling.LANCZOS)


def run(pipeline: Any, image: Image.Image, phrases: list[str], adapter: str | None) -> Result:
    """Segment a picture.

    Raises:
        ValueError: picture and phrases would take too much memory together.
    """
    pixels = image.width * image.height
    if pixels * len(phrases) > MAX_KEPT:
        raise ValueError(
            f"These are {len(phrases)} phrases for {pixels / 1e6:.1f} million pixels, which is too much at a time: "
            f"give at most {MAX_KEPT // pixels}, or a smaller picture."
        )
    started = time.perf_counter()
    found = pipeline(image, phrases, adapter_name=adapter, return_probabilities=True)
    seconds = time.perf_counter() - started
    model = str(pipeline.model.name_or_path)
    model = Path(model).name if os.path.isdir(model) else model  # the server's folders are its own affair
    return Result(image, phrases, [entry["probabilities"] for entry in found], model, adapter, seconds)


def describe(result: Result, threshold: float) -> list[dict]:
    """Say for each phrase what was found above a threshold: what the JSON holds.

    `score` is the mean probability inside the mask, `size` (height, width) in pixels; `box` is None where nothing was
    found.
    """
    return [
        {
            "label": phrase,
            "score": details["score"],
            "box": details["box"],
            "size": list(details["mask"].shape),
            "threshold": threshold,
            "model": result.model,
            "adapter": result.adapter,
        }
        for phrase, details in zip(result.phrases, result.details(threshold))
    ]


def draw(result: Result, threshold: float, opacity: float) -> gr.AnnotatedImage:
    """Draw the masks over the picture, in colours and with a legend."""
    annotations, colors = [], {}
    for index, (label, mask) in enumerate(zip(result.labels(), result.masks(threshold))):
        # Gradio takes a mask's values for its opacity, so a mask that is made smaller gets soft edges.
        shown = cv2.resize(255 * mask.astype(np.uint8), result.shown.size, interpolation=cv2.INTER_AREA)
        annotations.append((shown / np.float32(255) * np.float32(opacity), label))
        colors[label] = "#{:02x}{:02x}{:02x}".format(*PALETTE[index % len(PALETTE)])
    return gr.AnnotatedImage((np.asarray(result.shown), annotations), color_map=colors)


def tabulate(result: Result, threshold: float) -> list[list[str]]:
    """The table's rows: score and box of each phrase, and how much of the picture its mask covers."""
    rows = []
    for label, details in zip(result.labels(), result.details(threshold)):
        box = details["box"]
        if box is None:
            rows.append([label, "nothing found", *[""] * 5])
        else:
            sides = box["xmin"], box["ymin"], box["xmax"] - box["xmin"], box["ymax"] - box["ymin"]
            rows.append([label, f"{details['score']:.3f}", *map(str, sides), f"{details['mask'].mean():.1%}"])
    return rows


def draw_heat_map(result: Result, index: int) -> tuple[np.ndarray, list]:
    """Draw the probabilities of a phrase in colours, from dark for 0 to bright for 1, over the grey picture.

    Returns:
        What `gr.AnnotatedImage` takes: the drawing (H, W, 3), and no masks over it.
    """
    levels = cv2.resize(result.probabilities[index], result.shown.size, interpolation=cv2.INTER_AREA)
    colors = cv2.applyColorMap(np.rint(255 * levels).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    grey = np.asarray(result.shown.convert("L").convert("RGB"))
    return cv2.addWeighted(np.ascontiguousarray(colors), HEAT, grey, 1 - HEAT, 0), []


def pack(result: Result, threshold: float) -> tuple[bytes, bytes]:
    """Write masks (PNG, 0 and 255, at the picture's size) and `results.json` into a ZIP file.

    Returns:
        The ZIP file, and `results.json` by itself.
    """
    packed = io.BytesIO()
    records = describe(result, threshold)
    with zipfile.ZipFile(packed, "w") as archive:
        for number, (record, mask) in enumerate(zip(records, result.masks(threshold)), 1):
            words = "".join(letter if letter.isalnum() else "_" for letter in record["label"])[:40]
            record["mask"] = f"{number:02d}_{words}.png"
            encoded = io.BytesIO()
            Image.fromarray(mask.astype(np.uint8) * 255).save(encoded, "PNG")
            archive.writestr(record["mask"], encoded.getvalue())
        text = json.dumps(records, indent=2, ensure_ascii=False).encode()
        archive.writestr("results.json", text)
    return packed.getvalue(), text


# --- what the page does when somebody touches it ---------------------------------------------------------------------


def segment(pipeline: Any, picture: dict | None, text: str, adapter: str | None) -> tuple:
    """Run the model: the result, the heat map's phrases, the heat map, the findings' place, and a line about the run.

    Args:
        picture: what the browser says of the picture that the visitor has given, with its `path` on this machine.
    """
    adapters = adapter_names(pipeline)
    with messages_on_the_page():
        if not (picture and picture["path"]):
            raise ValueError("Give a picture first: upload or paste one, or take one of the examples.")
        if adapters and adapter not in adapters:
            raise ValueError(f"There is no adapter {short_repr(adapter)}: choose one of {', '.join(adapters)}.")
        found = run(pipeline, read_picture(picture["path"]), read_phrases(text), adapter)
        phrases = gr.Dropdown([(label, index) for index, label in enumerate(found.labels())], value=0)
        said = f"{len(found.phrases)} phrase{'s' if len(found.phrases) > 1 else ''} in {found.seconds:.2f} s "
        said += f"on {pipeline.device}, by `{found.model}`"
        said += f", adapter {adapter}." if len(adapters) > 1 else "."
        return found, phrases, draw_heat_map(found, 0), gr.Column(visible=True), said


def clear() -> tuple:
    """Take everything away that `segment` and `show` have put onto the page."""
    return None, gr.Dropdown([], value=None), None, gr.Column(visible=False), "", None


def _are_shares(*values: Any) -> bool:
    """Whether these are numbers from 0 to 1. A slider's box is empty while somebody writes a number into it."""
    return all(isinstance(value, int | float) and 0 <= value <= 1 for value in values)


def show(found: Result | None, threshold: float | None, opacity: float | None, said: str) -> Any:
    """The masks, the table, and both files out of reach until `offer` has written them anew."""
    if found is None and said:
        gr.Warning("Many others have come since, so your result was forgotten: press Segment once more.")
    if found is None or not _are_shares(threshold, opacity):
        return gr.skip()
    old_files = [gr.DownloadButton(interactive=False)] * 2
    return draw(found, threshold, opacity), tabulate(found, threshold), *old_files


def fade(found: Result | None, threshold: float | None, opacity: float | None) -> Any:
    """The masks with another opacity."""
    return draw(found, threshold, opacity) if found and _are_shares(threshold, opacity) else gr.skip()


def choose_heat_map(found: Result | None, index: int | None) -> Any:
    """The heat map of another phrase."""
    return gr.skip() if found is None or index is None else draw_heat_map(found, index)


def offer(found: Result | None, threshold: float | None) -> Any:
    """Both files to download."""
    if found is None or not _are_shares(threshold):
        return gr.skip()
    files = zip(pack(found, threshold), ("masks.zip", "results.json"))
    paths = [processing_utils.save_bytes_to_cache(content, name, get_upload_folder()) for content, name in files]
    return [gr.DownloadButton(value=path, interactive=True) for path in paths]


def fetch(url: str) -> Path:
    """The picture that an address names."""
    with messages_on_the_page():
        return fetch_picture(url, get_upload_folder())


# --- the page --------------------------------------------------------------------------------------------------------


def draw_examples(folder: Path, count: int = 4) -> list[list[str]]:
    """Draw scenes as the quickstart's model knows them; return each one's path with its phrases, one a line."""
    scenes: dict[int, tuple[Image.Image, list[str]]] = {}
    for row in generate_rows(0, "testA", 5 * count, image_size=384, max_objects=3, object_scale=1.2):
        scenes.setdefault(row["image_id"], (row["image"], []))[1].append(row["sentences"][0])
    examples = []
    for image, phrases in scenes.values():
        text = "\n".join(phrases)
        if len(phrases) > 1 and len(text) <= EXAMPLE_LENGTH and len(examples) < count:
            path = folder / f"scene_{len(examples) + 1}.png"
            image.save(path)
            examples.append([str(path), text])
    return examples


def adapter_names(pipeline: Any) -> list[str]:
    """The names of the adapters among which visitors may choose."""
    return list(getattr(pipeline.model, "peft_config", None) or {})


def build_page(pipeline: Any) -> gr.Blocks:
    """Build the page.

    Args:
        pipeline: a `ReferringImageSegmentationPipeline`; visitors may choose among its model's adapters.
    """
    adapters = adapter_names(pipeline)
    with gr.Blocks(title="DETRIS", analytics_enabled=False, delete_cache=(CACHED_FOR, CACHED_FOR)) as page:
        result = gr.State()
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                picture = gr.Image(type="filepath", label="Picture", height=320, elem_id="picture")
                address = gr.Textbox(
                    label="or its address on the web",
                    placeholder="https://… and press Enter",
                    max_lines=1,
                    elem_id="address",
                )
                phrases = gr.Textbox(
                    label="Phrases, one a line", placeholder="left cat\nthe remote", lines=4, elem_id="phrases"
                )
                adapter = gr.Dropdown(
                    adapters,
                    value=adapters[0] if adapters else None,
                    label="Adapter",
                    visible=len(adapters) > 1,
                    elem_id="adapter",
                )
                button = gr.Button("Segment", variant="primary", elem_id="segment")
                threshold = gr.Slider(
                    0.01,
                    0.99,
                    pipeline.processor.mask_threshold,
                    step=0.01,
                    label="Threshold",
                    info="A mask has the pixels whose probability is above this.",
                    elem_id="threshold",
                )
                opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity of the masks", elem_id="opacity")
            with gr.Column(scale=7, min_width=300):
                with gr.Tabs():
                    with gr.Tab("Masks"):
                        masks = gr.AnnotatedImage(label="Masks", show_label=False, format="png", elem_id="masks")
                    with gr.Tab("Heat map"):
                        heat_phrase = gr.Dropdown([], label="Probability of", elem_id="heat-phrase")
                        heat = gr.AnnotatedImage(
                            label="Heat map", show_label=False, show_legend=False, format="png", elem_id="heat"
                        )
                with gr.Column(visible=False) as findings:
                    summary = gr.Markdown(elem_id="summary")
                    table = gr.Dataframe(
                        headers=TABLE_HEADER, interactive=False, wrap=True, buttons=[], elem_id="table"
                    )
                    with gr.Row():
                        packed = gr.DownloadButton("Masks (ZIP)", interactive=False, elem_id="zip")
                        listed = gr.DownloadButton("Scores and boxes (JSON)", interactive=False, elem_id="json")
                with tempfile.TemporaryDirectory() as folder:  # Gradio keeps copies
                    examples = draw_examples(Path(folder))
                    gr.Examples(examples, [picture, phrases], label=EXAMPLE_NOTE, elem_id="examples")

        quick = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        # Gradio would call an empty box beside a slider an error. Two movements may be on their way at once; one after
        # the other, the masks of the last one stay.
        sliding = quick | {"preprocess": False, "concurrency_limit": 1}
        found = [result, heat_phrase, heat, findings, summary]
        shown, downloads = [masks, table, packed, listed], [packed, listed]
        runs = gr.on(
            [button.click, phrases.submit],
            partial(segment, pipeline),
            [picture, phrases, adapter],
            found,
            preprocess=False,  # Gradio would open the picture without our limits
            concurrency_limit=1,
            show_progress_on=masks,
            api_visibility="private",
        )
        # Sliders may have moved during the run, so their values are read after it.
        shows = runs.success(show, [result, threshold, opacity, summary], shown, **sliding)
        shows.success(offer, [result, threshold], downloads, **sliding)
        # What an earlier picture gave is not to stand beside another one.
        runs.failure(clear, None, [*found, masks], **quick)
        shows = threshold.change(show, [result, threshold, opacity, summary], shown, **sliding)
        shows.success(offer, [result, threshold], downloads, **sliding)
        opacity.change(fade, [result, threshold, opacity], masks, **sliding)
        heat_phrase.input(choose_heat_map, [result, heat_phrase], heat, **quick)
        address.submit(fetch, address, picture, api_visibility="private", concurrency_limit=4)
    return page


def serve(page: gr.Blocks, **arguments: Any) -> tuple:
    """Start the page's server; `arguments` are those of `gr.Blocks.launch`. It asks nothing of other machines."""
    processing_utils.async_transport = GuardedTransport()
    # Fonts of the visitor's machine: others would be fetched.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="orange", neutral_hue="stone", **fonts)
    theme.set(body_background_fill="*neutral_50")
    return page.queue(max_size=64).launch(
        theme=theme,
        css=CSS,
        max_file_size=MAX_BYTES,
        state_session_capacity=MAX_VISITORS,
        footer_links=[],
        run_history=False,
        pwa=False,
        **arguments,
    )


@dataclass
class AppArguments:
    """Which model segments, where it runs, and who can reach the page."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a model or adapters; the environment variable DETRIS_MODEL by default."
        },
    )
    adapter: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Further adapters to choose from, each as name=path, or as a path whose last part is the name; "
            "they share the model's backbones.",
            "action": "extend",
        },
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1 …"})
    dtype: str | None = field(default=None, metadata={"help": "float32, bfloat16 or float16."})
    host: str | None = field(default=None, metadata={"help": "0.0.0.0 lets other machines in; else only this one."})
    port: int | None = field(default=None, metadata={"help": "By default the first free one from 7860 on."})
    share: bool = field(default=False, metadata={"help": "Whether to make a public link, through Gradio's servers."})


def main(arguments: list[str] | None = None) -> None:
    """Load a model and serve the page until Ctrl-C."""
    (args,) = HfArgumentParser(AppArguments, description=__doc__).parse_args_into_dataclasses(arguments)
    model = args.model or os.environ.get("DETRIS_MODEL")
    if not model:
        sys.exit(
            "Name a model: python app.py --model runs/quickstart (which `make quickstart` trains), or set the "
            "environment variable DETRIS_MODEL to a folder or Hub id, which a Space does in its settings."
        )
    try:
        pipeline = load_pipeline(model, named_adapters(args.adapter), args.device, args.dtype)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {one_line(error)}")
    serve(build_page(pipeline), server_name=args.host, server_port=args.port, share=args.share)


if __name__ == "__main__":
    main()
