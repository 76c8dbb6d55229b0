"""What pages with plots and pictures are made of: figures, bins, pictures that fit, templates, whole files.

Such a page is one file that needs neither a network nor scripts. Phrases and names in it are strangers': Jinja2
escapes them, and no plot has them. `page.html` beside this file holds what the templates of all pages share.
"""

import base64
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

MAX_LINES = 8  # splits in one plot
COLORS = [to_hex(color) for color in color_sequences["petroff10"]]
MAX_PICTURE = 30_000  # bytes, to which the quality of a picture is lowered; 72 of them are 2.9 MB as text
QUALITIES = (85, 70, 50, 30, 15)  # of a JPEG, from the best that is tried to the last
MASK_SIZES = {  # lower bound of each bin, as a share of the image
    "under 1 %": 0.0,
    "1 to 3 %": 0.01,
    "3 to 10 %": 0.03,
    "10 to 30 %": 0.1,
    "30 % or more": 0.3,
}
NO_TARGET = "no target"
NUMBERS = {"1": 1, "2": 2, "3": 3, "4": 4, "5 to 6": 5, "7 to 9": 7, "10 or more": 10}  # of words, objects and so on


class Plot(NamedTuple):
    """A figure, what to call it, how to read it, and its numbers."""

    title: str
    how_to_read: str
    figure: Figure
    alt: str
    bins: Sequence[str] = ()
    numbers: Sequence[tuple[str, Sequence[tuple[str, int]]]] = ()  # for each split a value and a count for each bin
    splits: Sequence[tuple[str, str]] = ()  # colour and name of each split in the picture
    counted: str = "phrases"  # what the counts are of


# --- figures --------------------------------------------------------------------------------------------------------


def new_figure() -> tuple[Figure, Axes]:
    """A figure of its own: pyplot would keep it, and choose a backend for the whole process."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def bin_numbers(values: np.ndarray, bins: dict[str, float]) -> np.ndarray:
    """The number of each value's bin (N,). A value on a bound belongs to the bin above it."""
    return (np.digitize(values, list(bins.values())) - 1).clip(0)


def mask_size_bins(shares: Sequence[np.ndarray]) -> tuple[list[str], list[np.ndarray]]:
    """Sort masks by the share of the image that they cover.

    Args:
        shares: for each split those of its masks (N,), 0 where a phrase names nothing.

    Returns:
        The names of the bins, and for each split the numbers (N,) of its masks' bins. `NO_TARGET` is the last bin if
        there are such masks.
    """
    labels, bins = list(MASK_SIZES), [bin_numbers(split, MASK_SIZES) for split in shares]
    if any((split == 0).any() for split in shares):
        labels.append(NO_TARGET)
        bins = [np.where(split == 0, len(MASK_SIZES), numbers) for split, numbers in zip(shares, bins)]
    return labels, bins


def draw_bins(
    values: np.ndarray, counts: np.ndarray, labels: Sequence[str], shown: Sequence[tuple[str, str]]
) -> tuple[Figure, Axes]:
    """Draw a value for each bin: bars if there is one split, a line for each otherwise.

    Args:
        values (`(S, B)`): of `S` splits in `B` bins; NaN where there is none.
        counts (`(S, B)`): how many stand behind each value. Their sums stand above the bins.
        labels: what the bins are called.
        shown: colour and name of the splits that are drawn.
    """
    figure, axes = new_figure()
    ordered = labels.index(NO_TARGET) if NO_TARGET in labels else len(labels)  # a line to it would mean nothing
    for row, (color, _) in zip(values, shown):
        if len(values) == 1:
            axes.bar(range(len(labels)), np.nan_to_num(row), color=color, width=0.7)
        else:
            axes.plot(range(ordered), row[:ordered], marker="o", markersize=5, color=color)
            axes.plot(range(ordered, len(labels)), row[ordered:], marker="o", markersize=5, color=color)
    axes.set_xticks(range(len(labels)), [label.replace(" or ", "\nor ") for label in labels], fontsize=8)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    for place, count in enumerate(counts.sum(axis=0).tolist()):
        axes.annotate(
            f"{count:,}",
            (place, 1),
            (0, 2),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    return figure, axes


def svg(figure: Figure) -> str:
    """A figure as the address of an SVG picture."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return data_uri(file.getvalue(), "svg+xml")


# --- pictures and pages ---------------------------------------------------------------------------------------------


def small_jpeg(picture: Image.Image) -> str:
    """A picture as the address of a JPEG of at most `MAX_PICTURE` bytes, as far as its quality can be lowered."""
    for quality in QUALITIES:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= MAX_PICTURE:
            break
    return data_uri(file.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """The address that holds a picture itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def shortened(text: str, most: int) -> str:
    """The first `most` characters of a text, with dots if there are more."""
    return text if len(text) <= most else f"{text[:most]} …"


def render(template: Path, **values: Any) -> str:
    """Fill a template, which may import from `page.html`. Texts are escaped; a value that is missing is an error."""
    folders = [template.resolve().parent, Path(__file__).resolve().parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": format_figure, "svg": svg}
    return environment.get_template(template.name).render(max_lines=MAX_LINES, **values)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all. Half a character of a text, which is no UTF-8, becomes a question mark."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # is nobody else's file
    try:
        scratch.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def format_figure(value: Any, digits: int = 2) -> str:
    """A cell of a table: numbers with so many digits, whole ones and texts as they are, what is missing as a dash."""
    if isinstance(value, int) or isinstance(value, str) and value:
        return str(value)
    return f"{value:.{digits}f}" if is_finite(value) else "–"


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and neither infinite nor NaN."""
    return isinstance(value, (int, float)) and math.isfinite(value)
