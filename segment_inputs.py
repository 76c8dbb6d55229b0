"""What segment.py is given: which pictures, on the disk or elsewhere, and which phrases are about them."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils import httpx  # the client that it and transformers use, httpx or its successor
from PIL import Image

from configuration_detris import errors_begin_with, one_line, read_regular, short_repr
from data.images import decode_image
from data.untrusted import checked_text
from images_detris import as_rgb

STANDARD_INPUT = "-"
SUFFIXES = tuple(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .gif .tif .tiff .heic .heif .avif .jxl .jp2".split()
)  # what counts as a picture in a folder; the last five cannot be read, which is then said
MAX_BYTES = 2**30  # of a picture's file
MAX_PHRASE = 10_000  # characters
MAX_FOLDER_NAME = 200  # characters, of a name that is not a file's own
ANSWER_SECONDS, DOWNLOAD_SECONDS = 60, 300  # to wait for a server's next answer, and for the whole picture
LINE_FIELDS = ("image", "text", "adapter_name")


class Phrase(NamedTuple):
    """What to segment, and by which adapter; None for the model's active one."""

    text: str
    adapter_name: str | None = None


class Picture(NamedTuple):
    """A picture and what to segment in it.

    `source` is a path, an address or `STANDARD_INPUT`, `folder` the path of its folder in the output folder, `content`
    what came on standard input.
    """

    source: str
    folder: str
    phrases: list[Phrase]
    content: bytes | None = None


# --- which pictures, and which phrases ------------------------------------------------------------------------------


def find_pictures(source: str, output: Path) -> dict[str, str]:
    """Find the pictures that the first argument means.

    Args:
        source: a path, a folder, a pattern, an address or `STANDARD_INPUT`.
        output: if this folder lies among the pictures, nothing below it counts, because earlier results lie there.

    Returns:
        The name of each picture by its source, sorted: its path below the folder, or below the part of the pattern
        that is fixed.

    Raises:
        OSError: there is none.
    """
    if source == STANDARD_INPUT:
        return {source: "standard-input"}
    if is_address(source):
        return {source: _name_in_address(source)}
    if os.path.isdir(source):
        root, paths = source, _files_below(source)
        paths = [path for path in paths if path.lower().endswith(SUFFIXES)]
        missing = f"The folder {source} holds no picture ({' '.join(SUFFIXES[:6])} …): name another."
    elif os.path.lexists(source):
        return {source: os.path.basename(source)}
    elif has_magic(source):
        root = os.path.join(".", *takewhile(lambda part: not has_magic(part), Path(source).parts[:-1]))
        paths = [path for path in glob(source, recursive=True) if not os.path.isdir(path)]
        missing = f"No file is called as the pattern {source} says: correct it."
    else:
        raise FileNotFoundError(
            f"There is no picture or folder {source}: correct the first argument; addresses begin with http:// or "
            "https://."
        )
    results, base = Path(output).resolve(), Path(root).resolve()
    if results != base and results.is_relative_to(base):
        paths = [path for path in paths if not Path(path).resolve().is_relative_to(results)]
    if not paths:
        raise FileNotFoundError(missing)
    return {path: os.path.relpath(path, root) for path in sorted(paths)}


def _files_below(folder: str) -> Iterator[str]:
    """The paths of all files below a folder, hidden ones left out. Raises OSError if a folder cannot be read."""

    def refuse(error: OSError) -> None:
        raise OSError(f"The folder {error.filename} cannot be read ({error.strerror}): name others.") from error

    for path, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(path, name) for name in names if not name.startswith("."))


def is_address(source: str) -> bool:
    """Whether a source is a URL."""
    return source.lower().startswith(("http://", "https://"))


def _name_in_address(address: str) -> str:
    try:
        name = unquote(urlsplit(address).path.rpartition("/")[2])
    except ValueError:  # it is no address, which is said when its turn comes
        name = ""
    name = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip(".-")
    return name[:MAX_FOLDER_NAME] or "picture"


def read_phrases(path: str) -> Iterator[tuple[str, list[Phrase]]]:
    """Read a file of phrases, line by line: an image's name and its phrases.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is not as it must be; the message has its number.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"The file of phrases {path} does not exist: correct --phrases.")
    with errors_begin_with(path):
        lines = read_regular(path).decode("utf-8-sig").split("\n")
        if not any(map(str.strip, lines)):
            raise ValueError("it is empty: write a line for each picture.")
        for number, line in enumerate(lines, 1):
            if line.strip():
                with errors_begin_with(f"line {number}"):
                    yield _read_line(line)


def _read_line(line: str) -> tuple[str, list[Phrase]]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        form = '{"image": "photo.jpg", "text": ["left cat", "the remote"]}'
        raise ValueError(f"it is no JSON ({one_line(error)}): write lines such as {form}.") from error
    if not isinstance(fields, dict) or not {"image", "text"} <= fields.keys() <= {*LINE_FIELDS}:
        raise ValueError(f"it is {short_repr(fields)}: give image, text and, if wanted, adapter_name.")
    text, adapter_name = fields["text"], fields.get("adapter_name")
    if adapter_name is not None:
        checked_text(adapter_name, "adapter_name", MAX_PHRASE)
    phrases = check_phrases([text] if isinstance(text, str) else text)
    return checked_text(fields["image"], "image", MAX_PHRASE), [Phrase(phrase, adapter_name) for phrase in phrases]


def check_phrases(phrases: Any) -> list[str]:
    """Return phrases as they are; raises ValueError if there are none, or one is no text or empty."""
    if not isinstance(phrases, list) or not phrases:
        raise ValueError(f"text is {short_repr(phrases)}: give a phrase or a list of phrases.")
    for phrase in phrases:
        if not checked_text(phrase, "a phrase", MAX_PHRASE).strip():
            raise ValueError("a phrase is empty: say what to segment.")
    return phrases


def match_phrases(path: str, found: dict[str, str], folder: str) -> tuple[dict[str, list[Phrase]], dict[str, str]]:
    """Bring the phrases of a file together with the pictures that they are about.

    Args:
        path: the file of phrases.
        found: names by sources, as `find_pictures` returns them.
        folder: where the paths of further pictures begin.

    Returns:
        The phrases of each source, in the file's order, and the name of each.

    Raises:
        OSError, ValueError: the file cannot be read, or a name fits several pictures.
    """
    phrases, names, called = {}, {}, {}
    for source, name in found.items():
        for key in {source, name, os.path.basename(name)}:
            called.setdefault(os.path.normpath(key), []).append(source)
    for image, texts in read_phrases(path):
        fitting = [image] if image in found else called.get(os.path.normpath(image), [])
        if len(fitting) > 1:
            raise ValueError(f"{path}: {image} fits {len(fitting)} pictures, such as {fitting[0]}: write its path.")
        if fitting:
            source, name = fitting[0], found[fitting[0]]
        elif is_address(image):
            source, name = image, _name_in_address(image)
        else:  # if nothing is there, this is said when its turn comes
            source = os.path.normpath(os.path.join(folder, image))
            inside = not os.path.isabs(image) and ".." not in Path(image).parts
            name = os.path.normpath(image) if inside else os.path.basename(source)
        names[source] = name
        phrases.setdefault(source, []).extend(texts)
    return phrases, names


# --- pictures of strangers ------------------------------------------------------------------------------------------


def read_bytes(source: str) -> bytes:
    """Read a picture's file, from the disk, an address or standard input.

    Raises:
        OSError: it cannot be had, or is empty or larger.
    """
    try:
        if source == STANDARD_INPUT:
            content = sys.stdin.buffer.read(MAX_BYTES + 1)
        elif is_address(source):
            content = _download(source)
        elif os.path.exists(source) and not os.path.isfile(source):  # reading a pipe could wait for ever
            raise OSError("it is no regular file")
        else:
            with open(source, "rb") as file:
                content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"image {source} does not exist.") from None
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
        raise OSError(f"image {source} cannot be read ({reason}).") from error
    if not content:
        raise OSError(f"image {source} is empty.")
    if len(content) > MAX_BYTES:
        raise OSError(f"image {source} has over {MAX_BYTES:,} bytes: make it smaller.")
    return content


def _download(address: str) -> bytes:
    content, deadline = bytearray(), time.monotonic() + DOWNLOAD_SECONDS
    with httpx.stream("GET", address, timeout=ANSWER_SECONDS, follow_redirects=True) as answer:
        if answer.is_error:
            raise OSError(f"the server answers {answer.status_code} {answer.reason_phrase}")
        for chunk in answer.iter_bytes():
            content += chunk
            if len(content) > MAX_BYTES:
                break
            if time.monotonic() > deadline:
                raise OSError(f"the server has not sent all of it within {DOWNLOAD_SECONDS} seconds")
    return bytes(content)


def decode(content: bytes, name: str) -> Image.Image:
    """Decode a picture: upright, in RGB with 8 bits a channel. Raises OSError or ValueError if it is none."""
    return Image.fromarray(as_rgb(decode_image(content, name), f"image {name}"))
