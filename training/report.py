"""The page that a run leaves beside its table: curves, figures, and phrases with their masks, in one file.

`pages.py` at the root makes pages; `report.html` beside this file is the template of this one.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator
from PIL import Image

from data.decoding import read_whole_mask
from data.masks import RleMask
from gallery import MAX_CAPTION, PREDICTION_COLOR, SAMPLE_SIDE, TRUTH_COLOR, Sample, draw_sample, fit_mask
from pages import (
    COLORS,
    MAX_LINES,
    NUMBERS,
    Plot,
    bin_numbers,
    draw_bins,
    format_figure,
    is_finite,
    mask_size_bins,
    new_figure,
    render,
    shortened,
    small_jpeg,
    write_whole,
)

from .evaluating_trainer import PADDING

REPORT = "report.html"
MAX_POINTS = 500  # of a curve
KINDS = ("best", "middle", "worst")
MAX_SHOWN, MAX_SHOWN_OF_KIND = 72, 4  # phrases with a picture in the whole page, and of a kind in one split
HISTOGRAM_BINS = 10


class SplitResults(NamedTuple):
    """What the page tells of a split's `N` phrases, in the order of `results.jsonl`.

    An IoU is intersection / union, as in gIoU: where a phrase names nothing, it is 1 if nothing is predicted, else 0.
    """

    name: str
    rows: datasets.Dataset
    places: np.ndarray  # (N, 2): the row, and the phrase's number in it
    ious: np.ndarray  # (N,)
    mask_sizes: np.ndarray  # (N,): share of the image that the true mask covers; 0 for a phrase without target
    words: np.ndarray  # (N,)


class ShownPhrase(NamedTuple):
    """A phrase of the gallery."""

    sentence: str
    iou: float
    ref_id: int
    picture: str  # a data URI
    alt: str
    note: str  # what the picture cannot show: that a mask is empty


def split_results(name: str, rows: datasets.Dataset, counts: np.ndarray, metric: evaluate.Metric) -> SplitResults:
    """Put together what the page tells of a split.

    Args:
        name: the split's, for people.
        rows: its `R` objects.
        counts (`(R, K, 3)`): pixels in intersection, in union and in the truth of up to `K` phrases, padded.
        metric: turns counts into IoU.
    """
    places = np.argwhere(counts[..., 0] != PADDING)  # (N, 2)
    intersection, union, area = counts[places[:, 0], places[:, 1]].T
    columns = rows.select_columns(["mask", "sentences"]).cast_column("mask", RleMask(decode=False))[:]
    pixels = np.array([math.prod(mask["size"]) for mask in columns["mask"]])  # (R,)
    words = [len(columns["sentences"][row][phrase].split()) for row, phrase in places]
    ious = np.where(union == 0, 1.0, metric.iou(intersection, union))
    return SplitResults(name, rows, places, ious, area / pixels[places[:, 0]], np.array(words))


# --- the gallery ----------------------------------------------------------------------------------------------------


def choose_phrases(split: SplitResults, most: int) -> dict[str, list[int]]:
    """The phrases with the highest, middle and lowest IoU: at most `most` of each, and one of an object in each.

    Those that name nothing and for which nothing is predicted are left out: there is nothing to see.

    Returns:
        For each kind that has any, the numbers of its phrases.
    """
    empty = (split.mask_sizes == 0) & (split.ious == 1)
    order = [phrase for phrase in np.argsort(-split.ious, kind="stable").tolist() if not empty[phrase]]
    most = min(most, max(1, len(order) // len(KINDS)))
    middle = (len(order) - 1) / 2
    from_middle = [order[place] for place in sorted(range(len(order)), key=lambda place: abs(place - middle))]
    chosen, taken = {}, set()
    for kind, candidates in zip(("best", "worst", "middle"), (order, order[::-1], from_middle)):
        by_object = {}
        for phrase in candidates:
            if len(by_object) == most:
                break
            if phrase not in taken:
                by_object.setdefault(int(split.places[phrase, 0]), phrase)
        taken.update(by_object.values())
        chosen[kind] = sorted(by_object.values(), key=order.index)
    return {kind: chosen[kind] for kind in KINDS if chosen[kind]}


def show_phrase(split: SplitResults, number: int, segment: Callable[[dict], np.ndarray]) -> ShownPhrase:
    """Draw a phrase's image with the predicted and the true mask outlined.

    Args:
        number: the phrase's, in the split.
        segment: gives the mask (H, W) of a row with this phrase alone.
    """
    index, phrase = split.places[number].tolist()
    row = split.rows[index]
    row |= {"sentences": [row["sentences"][phrase]]}
    sentence, iou = row["sentences"][0], float(split.ious[number])
    prediction, truth, image = segment(row), read_whole_mask(row), datasets.Image().decode_example(row["image"])
    picture = _thumbnail(Sample(image, "", truth, prediction, iou))
    note = "" if truth.any() else "It names nothing in the image. "
    note += "" if prediction.any() else "Nothing is predicted."
    sentence = shortened(sentence, MAX_CAPTION)
    alt = f"The image, in which the prediction and the truth for “{sentence}” are outlined"
    return ShownPhrase(sentence, iou, row["ref_id"], small_jpeg(picture), alt, note.strip())


def _thumbnail(sample: Sample) -> Image.Image:
    """A small picture of a sample, without the caption, which the page writes as text."""
    image = sample.image.convert("RGB")
    image.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    truth, prediction = fit_mask(sample.truth, image.size), fit_mask(sample.prediction, image.size)
    sheet = draw_sample(sample._replace(image=image, truth=truth, prediction=prediction))
    scale = SAMPLE_SIDE / max(image.size)
    return sheet.crop((0, 0, *(max(1, round(side * scale)) for side in image.size)))


# --- plots ----------------------------------------------------------------------------------------------------------


def curve(history: Iterable[dict[str, Any]], name: str) -> np.ndarray:
    """The points (P, 2) of a figure in Trainer's log history: step and value, one for each step, finite ones only."""
    points = {}
    for entry in history:
        step, value = entry.get("step"), entry.get(name)
        if is_finite(step) and step > 0 and is_finite(value):
            points.setdefault(step, value)  # what comes later at the last step is of the best checkpoint
    return np.array(sorted(points.items()), dtype=float).reshape(-1, 2)


def plot_curves(history: Sequence[dict[str, Any]], eval_split: str) -> list[Plot]:
    """The curves of loss and mIoU, as far as they were logged."""
    plots = []
    for name, title, what in (
        ("loss", "Loss", "It should fall, fast at first. Where it rises for long, the learning rate may be too high."),
        (
            "eval_mean_iou",
            f"mIoU on {eval_split}",
            "It should rise. Where it falls while the loss goes on falling, the model only learns its training "
            "phrases by heart.",
        ),
    ):
        points = curve(history, name)
        if not len(points):
            continue
        shown = points
        if len(points) > MAX_POINTS:
            shown = np.array([part.mean(axis=0) for part in np.array_split(points, MAX_POINTS)])
            what += f" Each of its {MAX_POINTS} points is the mean of neighbouring ones."
        figure, axes = new_figure()
        (line,) = axes.plot(*shown.T, marker="o" if len(shown) <= 40 else "", markersize=4, color=COLORS[0])
        line.set_gid("curve")
        axes.set_xlabel("step")
        axes.set_ylabel("loss" if name == "loss" else "mIoU")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        first, last = points[0], points[-1]
        count = f"{len(points):,} value" + "s" * (len(points) > 1)
        summary = f"{count}, from {first[1]:.3f} at step {first[0]:.0f} to {last[1]:.3f} at step {last[0]:.0f}"
        if name != "loss":
            highest = points[points[:, 1].argmax()]
            summary += f"; the highest is {highest[1]:.3f} at step {highest[0]:.0f}"
        plots.append(Plot(title, f"{summary}. {what}", figure, f"Curve over the steps of training: {summary}"))
    return plots


def plot_results(splits: Sequence[SplitResults]) -> list[Plot]:
    """The histogram of IoU, and mean IoU by the true mask's size and by the phrase's length."""
    if not splits:
        return []
    shown = [(COLORS[index], split.name) for index, split in enumerate(splits[:MAX_LINES])]
    plots = [_plot_histogram(splits, shown)]
    sizes, size_bins = mask_size_bins([split.mask_sizes for split in splits])
    how_to_read = "The mean IoU of the phrases whose true mask covers so much of the image. Small objects are harder."
    plots.append(_plot_means("Mean IoU by mask size", how_to_read, splits, size_bins, sizes, shown))
    lengths, length_bins = list(NUMBERS), [bin_numbers(split.words, NUMBERS) for split in splits]
    how_to_read = "The mean IoU of the phrases with that many words."
    plots.append(_plot_means("Mean IoU by words of the phrase", how_to_read, splits, length_bins, lengths, shown))
    return plots


def _plot_histogram(splits: Sequence[SplitResults], shown: Sequence[tuple[str, str]]) -> Plot:
    edges = np.arange(HISTOGRAM_BINS + 1) / HISTOGRAM_BINS
    counts = [np.histogram(split.ious, edges)[0] for split in splits]
    numbers = [
        (split.name, [(f"{100 * count / sum(row):.1f} %", count) for count in row.tolist()])
        for split, row in zip(splits, counts)
    ]
    figure, axes = new_figure()
    for row, (color, _) in zip(counts, shown):
        axes.stairs(100 * row / row.sum(), edges, color=color, linewidth=1.8, fill=len(splits) == 1)
    axes.set_xlim(0, 1)
    axes.set_xlabel("IoU")
    axes.set_ylabel("% of the phrases")
    how_to_read = (
        "How many phrases have which IoU. A peak at 0 are objects that were missed or taken for others; the further "
        "right the rest lies, the closer the outlines are."
    )
    bins = [f"{low:.1f} to {high:.1f}" for low, high in zip(edges, edges[1:])]
    missed = np.mean(np.concatenate([split.ious for split in splits]) < 0.5)
    alt = f"Histogram of IoU: {100 * missed:.0f} % of the phrases of all splits are below 0.5"
    return Plot("IoU histogram", how_to_read, figure, alt, bins, numbers, shown)


def _plot_means(
    title: str,
    how_to_read: str,
    splits: Sequence[SplitResults],
    bins: Sequence[np.ndarray],
    labels: Sequence[str],
    shown: Sequence[tuple[str, str]],
) -> Plot:
    """Plot the mean IoU of each split's phrases by bins.

    Args:
        bins: for each split, its phrases' numbers of bins (N,).
        labels: what the `B` bins are called.
    """
    counts = np.array([np.bincount(row, minlength=len(labels)) for row in bins])  # (S, B)
    sums = np.array([np.bincount(row, split.ious, len(labels)) for row, split in zip(bins, splits)])
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    numbers = [
        (split.name, [(format_figure(mean, 3), count) for mean, count in zip(row.tolist(), row_counts.tolist())])
        for split, row, row_counts in zip(splits, means, counts)
    ]
    figure, axes = draw_bins(means, counts, labels, shown)
    axes.set_ylim(0, 1)
    axes.set_ylabel("mean IoU")
    alt = f"{title}: " + ", ".join(
        f"{label} {format_figure(total / max(count, 1) if count else None, 2)}"
        for label, total, count in zip(labels, sums.sum(axis=0).tolist(), counts.sum(axis=0).tolist())
    )
    how_to_read += " Above each bin stands the number of its phrases in all splits."
    return Plot(title, how_to_read, figure, alt, labels, numbers, shown)


# --- the page -------------------------------------------------------------------------------------------------------


def write_page(
    folder: Path,
    history: Sequence[dict[str, Any]],
    eval_split: str,
    table: Sequence[dict[str, Any]],
    splits: Sequence[SplitResults],
    segment: Callable[[dict], np.ndarray],
) -> Path:
    """Write `report.html`, whole or not at all.

    Args:
        folder: the run's, which exists.
        history: Trainer's log history; empty if nothing was trained.
        eval_split: the split that `eval_mean_iou` in it is of.
        table: for each line its cells, by their heads.
        splits: the test splits.
        segment: gives the mask (H, W) of a row with one phrase. It is called for the phrases in the gallery, at most
            72 however many splits there are.

    Returns:
        The page's path.
    """
    most = min(MAX_SHOWN_OF_KIND, max(1, MAX_SHOWN // (len(KINDS) * max(len(splits), 1))))
    galleries = []
    for split in splits[: MAX_SHOWN // len(KINDS)]:
        chosen = choose_phrases(split, most).items()
        shown = {kind: [show_phrase(split, number, segment) for number in numbers] for kind, numbers in chosen}
        galleries.append((split.name, len(split.ious), split.ious.mean(), shown))
    page = render(
        Path(__file__).with_name(REPORT),
        title=folder.resolve().name,
        curves=plot_curves(history, eval_split),
        heads=list(dict.fromkeys(head for line in table for head in line)),
        table=table,
        plots=plot_results(splits),
        no_target=any((split.mask_sizes == 0).any() for split in splits),
        splits=len(splits),
        galleries=galleries,
        prediction_color=to_hex(np.divide(PREDICTION_COLOR, 255)),
        truth_color=to_hex(np.divide(TRUTH_COLOR, 255)),
    )
    path = folder / REPORT
    write_whole(path, page)
    return path
