"""Look at a data set before training on it: rows with their masks and phrases, and what the set is made of, as plots.

    python -m data.view path/to/mine
    python -m data.view refcoco/unc --data_root path/to/refer --split val --output val.png

The set is named as for `train_hf.py --dataset`. The output is a page for a browser (.html), which is one file and
needs no network, or a picture (.png). Half of the rows are drawn at random by --seed. The others are those with the
smallest and largest masks, the longest phrases, and phrases that name nothing.

The status is 0 if all rows can be read. It is 1 if some cannot: they are named on the screen and on the page, and the
page is written all the same. All rows are looked at, but only the images of the rows that are shown are decoded.
"""

import argparse
import io
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import matplotlib
import numpy as np
from matplotlib.colors import to_hex, to_rgb
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from configuration_detris import one_line
from gallery import (
    FAINT,
    INK,
    MARGIN,
    MAX_CAPTION,
    PALETTE,
    POOR,
    SAMPLE_SIDE,
    TRUTH_COLOR,
    Card,
    draw_cards,
    draw_masks,
    fit_mask,
)
from pages import Plot, render, small_jpeg, write_whole

from .decoding import read_phrases, read_thumbnail, read_whole_mask
from .mixture import public_name
from .opening import load_splits
from .prepare import format_summary
from .records import training_first
from .survey import Survey, choose_rows, format_plots, plot_surveys, survey
from .tables import parse_columns

MAKER = "python -m data.view"  # stands in each output, which may therefore be replaced
PAGE, SHEET = (".html", ".htm"), ".png"
COUNT, MAX_COUNT = 24, 200  # rows
MAX_PHRASES_SHOWN = 30  # of a row
MAX_NAME = 80  # characters of a category, of a file's name, and of the set's name in the output's
MAX_LISTED = 20  # rows that cannot be read, on the screen
FILL = 0.25  # share of the mask's colour in its pixels, so that phrases of colours can be checked
MASK_COLOR, BOX_COLOR, NO_PICTURE = TRUTH_COLOR, PALETTE[2], (225, 225, 230)
COLUMNS = 4  # of a sheet
TURNS_TEXT = re.compile("[\u202a-\u202e\u2066-\u2069]")  # characters that turn the writing of what follows, quotes too
HOW_TO_READ = "The mask is tinted and outlined in green. The thin yellow line is the box of the annotation."


class ShownRow(NamedTuple):
    """A row to look at. What strangers wrote in it is short and has no control characters."""

    phrases: list[str]
    left_out: int  # phrases that are not among these
    about: str  # where it is from
    picture: Image.Image | None
    alt: str  # what the picture shows
    reason: str  # why there is no picture; otherwise empty


def main(arguments: list[str] | None = None) -> int:
    """Write the page or sheet that the command line asks for, print its figures, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog=MAKER, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("set", help="'shapes', a folder, 'hub:<id>' or 'refcoco/unc', as train_hf.py --dataset has it")
    parser.add_argument("--split", help="the only split to look at; by default all of them")
    parser.add_argument("--output", help="file to write, .html or .png; by default view_<set>.html in this folder")
    parser.add_argument("--count", type=int, default=COUNT, help=f"rows to show, {MAX_COUNT} at most")
    parser.add_argument("--seed", type=int, default=0, help="draws the rows; by default %(default)s")
    parser.add_argument("--data_root", help="folder of the REFER layout, for 'refcoco/unc'")
    parser.add_argument("--images", help="folder of the images, as train_hf.py --images has it")
    parser.add_argument(
        "--columns", nargs="+", metavar="WHAT=COLUMN", help="which columns of a table hold what, as in train_hf.py"
    )
    parser.add_argument(
        "--shapes_config", type=json.loads, metavar="JSON", help="arguments of data.shapes.load_shapes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that was not made by data.view")
    options = parser.parse_args(arguments)
    if not 1 <= options.count <= MAX_COUNT:
        parser.error(f"--count is {options.count}: give 1 to {MAX_COUNT} rows.")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}: give 0 or more.")
    output = Path(options.output or default_output(options.set, options.split))
    if not output.name.lower().endswith((*PAGE, SHEET)):
        parser.error(f"--output is {output}: give a name that ends in .html or .png.")
    try:
        return view(options, output)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted; nothing was written.")


def view(options: argparse.Namespace, output: Path) -> int:
    """Look at the data set that the options name, write `output`, and return the exit status.

    Raises:
        OSError, ValueError: the output is in the way or cannot be written, or the data set cannot be opened.
    """
    if not options.overwrite:
        require_ours(output)
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.absolute().parent}: make it, or name another --output.")
    wanted = [options.split] if options.split else None
    columns = None if options.columns is None else parse_columns(options.columns)
    splits = load_splits(options.set, options.data_root, options.images, options.shapes_config, wanted, columns)
    surveys = survey_splits(options.set, splits, options.split, options.seed)
    plots = plot_surveys(surveys)
    sections, problems = {}, [reason for split in surveys for reason in split.problems.values()]
    for kind, places in choose_rows(surveys, options.count, options.seed).items():
        sections[kind] = [show_row(surveys[number].split, surveys[number].rows[row]) for number, row in places]
        problems += [row.reason for row in sections[kind] if row.reason and row.reason not in problems]
    # The published counts, which stand beside ours, are those of all splits.
    summary = {
        "name": "" if options.split else options.set,
        "splits": {split.split: split.figures for split in surveys},
    }
    title = one_line(public_name(options.set), MAX_NAME)
    write_view(output, title, surveys, sections, plots)
    print(f"{format_summary(summary)}\n\n{format_plots(plots)}\n")
    for reason in problems[:MAX_LISTED]:
        print(f"Not readable: {one_line(reason)}", file=sys.stderr)
    if len(problems) > MAX_LISTED:
        print(f"… and {len(problems) - MAX_LISTED:,} more rows that cannot be read.", file=sys.stderr)
    shown = sum(map(len, sections.values()))
    print(
        one_line(
            f"{shown} {'row of' if shown == 1 else 'rows of'} {title} {'is' if shown == 1 else 'are'} in {output}."
        )
    )
    return 1 if problems else 0


def survey_splits(name: str, splits: datasets.DatasetDict, wanted: str | None, seed: int) -> list[Survey]:
    """Look at all rows of the wanted split, or of all splits that have rows.

    Raises:
        ValueError: there is no such split, or no row.
    """
    if wanted and wanted not in splits:
        raise ValueError(f"{name} has no split {wanted!r}: it has {', '.join(splits)}.")
    found = sorted(splits, key=training_first)
    filled = {split: splits[split] for split in found if len(splits[split]) and wanted in (None, split)}
    if not filled:
        raise ValueError(f"{name} has no rows to look at{f' in split {wanted!r}' if wanted else ''}.")
    return [survey(split, rows, seed) for split, rows in filled.items()]


# --- the output -----------------------------------------------------------------------------------------------------


def default_output(name: str, split: str | None) -> str:
    """The name of the page of a data set, in the folder where the command runs."""
    text = public_name(name) + (f"-{split}" if split else "")
    return f"view_{re.sub(r'[^a-zA-Z0-9_+.-]+', '-', text)[:MAX_NAME].strip('-.') or 'set'}{PAGE[0]}"


def require_ours(path: Path) -> None:
    """Refuse with a FileExistsError an output that exists and was not made here."""
    if not os.path.lexists(path):
        return
    start = b""
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(1000)
    if MAKER.encode() not in start:
        raise FileExistsError(
            f"{path} exists and was not made by data.view: name another --output, or replace it by --overwrite."
        )


def write_view(
    output: Path, title: str, surveys: Sequence[Survey], sections: dict[str, list[ShownRow]], plots: Sequence[Plot]
) -> None:
    """Write the page or the sheet, as the suffix of `output` says.

    Args:
        output: the file.
        title: the data set's name, for people.
        surveys: its splits.
        sections: the rows of each kind.
        plots: of all splits.
    """
    if output.name.lower().endswith(SHEET):
        write_whole(output, draw_sheet(title, surveys, sections, plots))
        return
    page = render(
        Path(__file__).with_name("view.html"),
        maker=MAKER,
        title=title,
        figures=[(split.split, split.figures) for split in surveys],
        heads=list(dict.fromkeys(name for split in surveys for name in split.figures)),
        sections={
            kind: [(row, small_jpeg(row.picture) if row.picture else "") for row in rows]
            for kind, rows in sections.items()
        },
        plots=plots,
        splits=len(surveys),
        mask_color=to_hex([channel / 255 for channel in MASK_COLOR]),
        box_color=to_hex([channel / 255 for channel in BOX_COLOR]),
    )
    write_whole(output, page)


def draw_sheet(
    title: str, surveys: Sequence[Survey], sections: dict[str, list[ShownRow]], plots: Sequence[Plot]
) -> bytes:
    """Draw rows and plots on one PNG; arguments as in `write_view`."""
    # Of the fonts that are installed with our packages, this one has the most scripts.
    font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    counts = "; ".join(
        f"{split.split}: {len(split.sound):,} objects, {len(split.words):,} phrases, {len(split.objects):,} images"
        for split in surveys
    )
    cards = {kind: [_card(row) for row in rows] for kind, rows in sections.items()}
    width = COLUMNS * (SAMPLE_SIDE + MARGIN) + MARGIN
    if plots:
        cards["What it is made of"] = [_plot_card(plot, (width - 3 * MARGIN) // 2) for plot in plots]
    sheet = draw_cards(
        f"{title}. {counts}. {HOW_TO_READ}", cards, width, lambda size: ImageFont.truetype(str(font), size)
    )
    file, information = io.BytesIO(), PngInfo()
    information.add_text("Software", MAKER)
    sheet.save(file, "PNG", pnginfo=information)
    return file.getvalue()


def _card(row: ShownRow) -> Card:
    texts = [(f"“{phrase}”", INK) for phrase in row.phrases]
    if row.left_out:
        texts.append((f"and {row.left_out:,} more", FAINT))
    if row.reason:
        texts.append((row.reason, POOR))
    picture = row.picture or Image.new("RGB", (SAMPLE_SIDE, SAMPLE_SIDE // 4), NO_PICTURE)
    return Card(picture, [(TURNS_TEXT.sub("", text), color) for text, color in [*texts, (row.about, FAINT)]])


def _plot_card(plot: Plot, width: int) -> Card:
    file = io.BytesIO()
    plot.figure.savefig(file, format="png", dpi=width / plot.figure.get_figwidth())
    picture = Image.open(file).convert("RGB")
    texts = [(plot.title, INK)]
    if len(plot.splits) > 1:
        texts += [(split, tuple(round(255 * channel) for channel in to_rgb(color))) for color, split in plot.splits]
    return Card(picture, [*texts, (plot.alt.removeprefix(f"{plot.title}: "), FAINT)])


# --- rows -----------------------------------------------------------------------------------------------------------


def show_row(split: str, row: dict) -> ShownRow:
    """A row as it is shown. If it cannot be read, that is the reason why it has no picture."""
    phrases = [one_line(phrase, MAX_CAPTION) for phrase in (row["sentences"] or [])[:MAX_PHRASES_SHOWN]]
    left_out = len(row["sentences"] or []) - len(phrases)
    about = [split, f"ref_id {row['ref_id']}", one_line(row["category"] or "", MAX_NAME)]
    file_name = one_line(os.path.basename((row["image"] or {}).get("path") or ""), MAX_NAME)
    try:
        read_phrases(row)
        image, mask = read_thumbnail(row, SAMPLE_SIDE), read_whole_mask(row)
        picture = draw_row(image, mask, row["bbox"])
    except (OSError, ValueError) as error:
        text = " · ".join(part for part in [*about, file_name] if part)
        return ShownRow(phrases, left_out, text, None, "", one_line(error))
    percent = 100 * mask.mean()
    share = f"{percent:.1f} %" if percent >= 0.1 else "under 0.1 %"
    share = f"{share} of the image" if mask.any() else "names nothing"
    text = " · ".join(part for part in [*about, share, file_name] if part)
    what = f"the mask of “{phrases[0]}” is outlined: {share}" if mask.any() else f"“{phrases[0]}” names nothing"
    return ShownRow(phrases, left_out, text, picture, f"The image, in which {what}", "")


def draw_row(image: Image.Image, mask: np.ndarray, bbox: list[float] | None) -> Image.Image:
    """Draw the mask (H, W) and the box of the annotation over an image, whose longer side becomes `SAMPLE_SIDE`.

    Args:
        image: of any size, but with the shape of the mask.
        mask: the mask.
        bbox: x, y, width and height in pixels of the mask. It is left out if it is no box.
    """
    scale = SAMPLE_SIDE / max(mask.shape)
    size = tuple(max(1, round(side * scale)) for side in mask.shape[::-1])
    picture = image.resize(size, Image.Resampling.BICUBIC)
    picture = draw_masks(picture, [fit_mask(mask, size)], [""], [MASK_COLOR], legend=False, fill=FILL)
    if bbox and all(side is not None and math.isfinite(side) for side in bbox) and min(bbox[2:]) > 0:
        left, top, width, height = (side * scale for side in bbox)
        corners = [
            min(max(corner, -1), side) for corner, side in zip((left, top, left + width, top + height), size * 2)
        ]
        draw = ImageDraw.Draw(picture)
        draw.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=(0, 0, 0))
        draw.rectangle(corners, outline=BOX_COLOR)
    return picture


if __name__ == "__main__":
    raise SystemExit(main())
