"""What the splits of a data set hold: figures and plots, rows that cannot be read, and rows that are worth a look.

All rows are looked at, but no image is decoded here.
"""

import os
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from datasets.utils import tqdm
from PIL import Image

from pages import COLORS, MAX_LINES, NO_TARGET, NUMBERS, Plot, bin_numbers, draw_bins, mask_size_bins, new_figure

from .decoding import read_image_file, read_mask, read_phrases, read_whole_mask
from .prepare import split_figures

GRID = 48  # cells of a side of the mean mask
MAX_MASKS, MAX_PIXELS_OF_MASKS = 2_000, 1_000_000_000  # of which the mean is taken in a split
THIRDS = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
PROGRESS_DELAY = 2  # seconds without a progress bar
BROKEN, AT_RANDOM = "Rows that cannot be read", "Drawn at random"
MAX_BROKEN = 6  # rows that cannot be read and are shown


class Survey(NamedTuple):
    """What a split holds: `N` rows that are sound as far as can be told without their images, with `P` phrases."""

    split: str
    rows: datasets.Dataset
    problems: dict[int, str]  # by the number of a row that cannot be read, the reason
    sound: np.ndarray  # (N,): numbers of the other rows
    shares: np.ndarray  # (N,): share of the image that the mask covers; 0 where the phrases name nothing
    phrases: np.ndarray  # (N,): how many a row has
    longest: np.ndarray  # (N,): characters of a row's longest phrase
    words: np.ndarray  # (P,): of each phrase
    objects: np.ndarray  # (I,): rows of each of `I` images
    mean_mask: np.ndarray  # (GRID, GRID): of values from 0 to 1, all images being stretched to the same square
    masks: int  # how many it is the mean of
    figures: dict[str, float]  # a line of a table


def survey(split: str, rows: datasets.Dataset, seed: int = 0) -> Survey:
    """Look at all rows of a split.

    Args:
        split: its name.
        rows: the rows, with images and masks as they are stored.
        seed: draws the masks of which the mean is taken, if there are many.
    """
    # In this format embedded images stay on the disk.
    table = rows.select_columns(["image", "mask", "sentences", "ref_id", "image_id"]).with_format("arrow")[:]
    paths = pa.compute.struct_field(table["image"], "path").to_pylist()
    embedded = pa.compute.struct_field(table["image"], "bytes").is_valid().to_pylist()
    table = table.drop_columns(["image"])
    there = {path for path in set(paths) if path is not None and os.path.isfile(path)}
    light, problems, sound, shares = table.to_pylist(), {}, [], []
    for index, row in enumerate(tqdm(light, split, unit="row", delay=PROGRESS_DELAY, leave=False)):
        try:
            read_phrases(row)
            mask = read_mask(row)
            if not embedded[index] and paths[index] not in there:
                image = None if paths[index] is None else {"path": paths[index], "bytes": None}
                read_image_file(row | {"image": image})
        except (OSError, ValueError) as error:
            problems[index] = str(error)
            continue
        sound.append(index)
        shares.append(int(mask.values.sum()) / (mask.size[0] * mask.size[1]))
    light = [light[index] for index in sound]
    phrases = np.array([len(row["sentences"]) for row in light], dtype=int)
    _, objects = np.unique([row["image_id"] or 0 for row in light], return_counts=True)
    figures = {}
    if sound:
        # An embedded image may have no path. Then its number tells it from others.
        names = [{"path": paths[index] or f"image_id {row['image_id']}"} for index, row in zip(sound, light)]
        figures = split_figures(table.take(sound).append_column("image", pa.array(names)))
        figures |= {"object_phrases_max": int(phrases.max()), "image_objects_max": int(objects.max())}
    mean_mask, masks = _mean_mask([row for row, share in zip(light, shares) if share], seed)
    return Survey(
        split=split,
        rows=rows,
        problems=problems,
        sound=np.array(sound, dtype=int),
        shares=np.array(shares, dtype=float),
        phrases=phrases,
        longest=np.array([max(map(len, row["sentences"])) for row in light], dtype=int),
        words=np.array([len(phrase.split()) for row in light for phrase in row["sentences"]], dtype=int),
        objects=objects,
        mean_mask=mean_mask,
        masks=masks,
        figures=figures | {"broken_rows": len(problems)},
    )


def _mean_mask(rows: Sequence[dict], seed: int) -> tuple[np.ndarray, int]:
    """The mean (GRID, GRID) of masks that are not empty, and of how many: all of them, or so many drawn at random."""
    total, masks, pixels = np.zeros((GRID, GRID)), 0, 0
    for index in np.random.default_rng(seed).permutation(len(rows))[:MAX_MASKS].tolist():
        mask = read_whole_mask(rows[index])
        pixels += mask.size
        if masks and pixels > MAX_PIXELS_OF_MASKS:
            break
        small = Image.fromarray(mask * np.uint8(255)).resize((GRID, GRID), Image.Resampling.BOX)
        total += np.asarray(small) / 255
        masks += 1
    return total / max(masks, 1), masks


# --- rows to look at ------------------------------------------------------------------------------------------------


def choose_rows(surveys: Sequence[Survey], count: int, seed: int = 0) -> dict[str, list[tuple[int, int]]]:
    """Choose rows to look at: special ones, up to a half, and others at random, in turn from each split.

    Args:
        surveys: the splits.
        count: how many rows to choose in all. Rows that cannot be read come on top of them, `MAX_BROKEN` at most.
        seed: draws the others.

    Returns:
        For each kind that there is, its rows: the split's number and the row's. No row is of two kinds.
    """
    random = np.random.default_rng(seed)
    rows = [(number, row) for number, split in enumerate(surveys) for row in split.sound.tolist()]
    shares = np.concatenate([split.shares for split in surveys])
    by_share = [index for index in np.argsort(shares, kind="stable").tolist() if shares[index]]
    special = {
        "Phrases that name nothing": [index for index in random.permutation(len(rows)).tolist() if not shares[index]],
        "Smallest masks": by_share,
        "Largest masks": by_share[::-1],
        "Longest phrases": np.argsort(-np.concatenate([split.longest for split in surveys]), kind="stable").tolist(),
    }
    chosen, taken = {kind: [] for kind in special}, set()
    for place in range(min(count, len(rows)) // 2):
        kind = list(special)[place % len(special)]
        for index in (index for index in special[kind] if index not in taken):
            taken.add(index)
            chosen[kind].append(rows[index])
            break
    left = {rows[index] for index in range(len(rows)) if index not in taken}
    drawn = [
        [(number, row) for row in random.permutation(split.sound).tolist() if (number, row) in left]
        for number, split in enumerate(surveys)
    ]
    in_turn = [pair for turn in zip_longest(*drawn) for pair in turn if pair is not None]
    broken = [(number, row) for number, split in enumerate(surveys) for row in split.problems]
    kinds = {BROKEN: broken[:MAX_BROKEN], AT_RANDOM: sorted(in_turn[: count - len(taken)])} | chosen
    return {kind: pairs for kind, pairs in kinds.items() if pairs}


# --- plots ----------------------------------------------------------------------------------------------------------


def plot_surveys(surveys: Sequence[Survey]) -> list[Plot]:
    """Plots of the splits that have sound rows: words, mask sizes, phrases of an object, objects of an image, and
    where masks lie."""
    surveys = [split for split in surveys if len(split.sound)]
    if not surveys:
        return []
    sizes, size_bins = mask_size_bins([split.shares for split in surveys])

    def numbers(values: Callable[[Survey], np.ndarray]) -> list[np.ndarray]:
        return [bin_numbers(values(split), NUMBERS) for split in surveys]

    plots = [
        _plot_bins("Words of a phrase", "phrases", surveys, list(NUMBERS), numbers(lambda split: split.words)),
        _plot_bins("Mask's share of the image", "objects", surveys, sizes, size_bins),
        _plot_bins("Phrases of an object", "objects", surveys, list(NUMBERS), numbers(lambda split: split.phrases)),
        _plot_bins("Objects of an image", "images", surveys, list(NUMBERS), numbers(lambda split: split.objects)),
    ]
    surveys = [split for split in surveys if split.masks]
    return plots + ([_plot_mean_mask(surveys)] if surveys else [])


def _plot_bins(
    title: str, counted: str, surveys: Sequence[Survey], labels: Sequence[str], bins: Sequence[np.ndarray]
) -> Plot:
    """Plot how many of a split's phrases, objects or images are in which bin.

    Args:
        counted: what is in the bins.
        labels: what the bins are called.
        bins: for each split, the numbers of the bins (N,).
    """
    counts = np.array([np.bincount(split, minlength=len(labels)) for split in bins])  # (S, B)
    values = 100 * counts / counts.sum(axis=1, keepdims=True)
    shown = [(COLORS[number], split.split) for number, split in enumerate(surveys[:MAX_LINES])]
    figure, axes = draw_bins(values, counts, labels, shown)
    axes.set_ylim(0)
    axes.set_ylabel(f"% of the {counted}")
    numbers = [
        (split.split, [(f"{value:.1f} %", count) for value, count in zip(row, row_counts)])
        for split, row, row_counts in zip(surveys, values.tolist(), counts.tolist())
    ]
    shares = 100 * counts.sum(axis=0) / counts.sum()
    alt = f"{title}: " + ", ".join(f"{label} {share:.0f} %" for label, share in zip(labels, shares.tolist()))
    how_to_read = f"How many of the {counted} are in which bin. Above each bin stands their number in all splits."
    if NO_TARGET in labels:
        how_to_read += " The phrases of the last bin name nothing."
    return Plot(title, how_to_read, figure, alt, labels, numbers, shown, counted)


def _plot_mean_mask(surveys: Sequence[Survey]) -> Plot:
    """Plot the mean of the masks of all splits, each split counting by its masks."""
    masks = sum(split.masks for split in surveys)
    mean = sum(split.mean_mask * split.masks for split in surveys) / masks  # (GRID, GRID)
    figure, axes = new_figure()
    axes.grid(False)
    picture = axes.imshow(100 * mean, cmap="viridis", vmin=0, extent=(0, 100, 100, 0), aspect="auto")
    figure.colorbar(picture, label="% of the masks")
    axes.set_xlabel("% of the image's width")
    axes.set_ylabel("% of its height")
    numbers = []
    for split in surveys:
        thirds = split.mean_mask.reshape(3, GRID // 3, 3, GRID // 3).sum(axis=(1, 3)).ravel()
        shares = (100 * thirds / thirds.sum()).tolist()
        numbers.append((split.split, [(f"{share:.1f} %", round(share * split.masks / 100)) for share in shares]))
    centre = [float((mean.sum(axis=axis) * (np.arange(GRID) + 0.5)).sum() / mean.sum() / GRID) for axis in (0, 1)]
    alt = (
        f"Mean of {masks:,} masks: its centre is at {100 * centre[0]:.0f} % of the width and {100 * centre[1]:.0f} % "
        f"of the height, and its highest value {100 * mean.max():.0f} %"
    )
    how_to_read = (
        f"The mean of {masks:,} masks, with all images stretched to one square. Photographs have most objects in the "
        "middle; edges, stripes or an empty part are a sign of masks that were shifted or cut."
    )
    return Plot("Where masks lie", how_to_read, figure, alt, THIRDS, numbers, counted="masks")


def format_plots(plots: Sequence[Plot]) -> str:
    """The numbers of all plots as text: a table for each, with a line for each split."""
    tables = []
    for plot in plots:
        lines = {split: [value for value, _ in cells] for split, cells in plot.numbers}
        table = pd.DataFrame.from_dict(lines, orient="index", columns=list(plot.bins))
        tables.append(f"{plot.title} ({plot.counted})\n{table.to_string()}")
    return "\n\n".join(tables)
