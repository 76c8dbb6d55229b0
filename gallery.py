"""Pictures of referring segmentation: masks over their image, a sample with its phrase, a sheet of many samples."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

PREDICTION_COLOR, TRUTH_COLOR = (255, 45, 120), (60, 220, 120)
# Colors of several masks in one picture. They were chosen one after the other, each as far as possible (CIELAB) from
# those before it, as people see it with and without the three kinds of colour blindness.
PALETTE = [
    (255, 45, 120),
    (0, 170, 255),
    (255, 200, 0),
    (128, 0, 255),
    (96, 96, 0),
    (160, 64, 160),
    (192, 224, 128),
    (0, 255, 224),
    (64, 96, 224),
    (224, 128, 32),
    (224, 192, 255),
    (0, 128, 96),
]
PAPER, INK, FAINT = (255, 255, 255), (28, 28, 34), (120, 120, 130)
GOOD, POOR = (20, 140, 70), (200, 40, 50)  # colors of an IoU above one half, and of one below
TINT = 0.2  # share of the mask's color in the object's pixels
FILL = 0.45  # the same where several masks share a picture, whose surroundings keep their brightness
DIM = 0.5  # brightness of the surroundings, as a share of their own
SAMPLE_SIDE = 400  # pixels of an image's longer side in the picture of one sample, at least
PANEL_SIDE = 200  # pixels of an image's longer side on a sheet
MARGIN = 14  # pixels
TEXT_SIZE, TITLE_SIZE = 17, 22  # pixels
MAX_CAPTION = 300  # characters of a phrase
LEGEND_WIDTH = 360  # pixels, at least
LEGEND_TEXT_SHARE, MAX_LEGEND_TEXT = 1 / 45, 96  # size of a legend's text: as a share of its width, and pixels at most
MAX_LEGEND = 60  # phrases in a legend
MAX_CARD_LINES = 40  # of text beneath a picture


class Sample(NamedTuple):
    """A phrase, its image (H, W), and the true and the predicted mask (H, W), which are not zero on the object."""

    image: Image.Image
    sentence: str
    truth: np.ndarray
    prediction: np.ndarray
    iou: float


class Card(NamedTuple):
    """A picture with texts beneath it, each with its colour."""

    picture: Image.Image
    texts: Sequence[tuple[str, tuple[int, int, int]]]


def _outline(pixels: np.ndarray, mask: np.ndarray, color: tuple[int, int, int]) -> None:
    """Draw the border of a mask. A dark rim keeps it visible on light ground."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width = max(2, round(max(mask.shape) / 250))
    for line_color, thickness in (((0, 0, 0), width + 2), (color, width)):
        cv2.drawContours(pixels, contours, -1, line_color, thickness, cv2.LINE_AA)


def overlay(image: Image.Image, mask: np.ndarray, color: tuple[int, int, int] = PREDICTION_COLOR) -> Image.Image:
    """Show a mask (H, W) over its image (H, W): tint and outline the object, dim the surroundings."""
    mask = np.asarray(mask) != 0
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    pixels = np.where(mask[..., None], (1 - TINT) * pixels + TINT * np.float32(color), DIM * pixels)
    pixels = np.ascontiguousarray(pixels.astype(np.uint8))
    _outline(pixels, mask, color)
    return Image.fromarray(pixels)


def draw_masks(
    image: Image.Image,
    masks: Sequence[np.ndarray | Image.Image],
    labels: Sequence[str],
    colors: Sequence[tuple[int, int, int]] | None = None,
    scores: Sequence[float | None] | None = None,
    legend: bool = True,
    fill: float = FILL,
) -> Image.Image:
    """Show `N` masks over their image, each filled and outlined in its color, with a legend beneath.

    Args:
        image: of height `H` and width `W` when it is upright, as its EXIF rotation says.
        masks: `N` masks (H, W), which are not zero on the object. Later ones lie over earlier ones.
        labels: `N` phrases for the legend, which has the first 60 of them.
        colors: red, green and blue, from 0 to 255, of each mask; those of `PALETTE` in turn by default. If there are
            fewer than masks, they are used again.
        scores: numbers from 0 to 1 that the legend shows behind the phrases; None stands for no number.
        legend: whether there is one.
        fill: share of the mask's color in its pixels.

    Returns:
        An RGB image. Its upper left part (H, W) is the image. A legend makes it higher, and a small image also wider.

    Raises:
        ValueError: there are not as many labels or scores as masks, no colors, or a mask is not as large as the image.
    """
    if len(labels) != len(masks) or (scores is not None and len(scores) != len(masks)):
        given = f"{len(labels)} labels" + ("" if scores is None else f" and {len(scores)} scores")
        raise ValueError(f"There are {given} for {len(masks)} masks: give one for each.")
    colors = PALETTE if colors is None else [tuple(color) for color in colors]
    scores = [None] * len(masks) if scores is None else scores
    if not colors:
        raise ValueError("colors is empty: give at least one, or None for those of PALETTE.")
    pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))  # (H, W, 3)
    masks = [np.asarray(mask) != 0 for mask in masks]
    for index, (mask, color) in enumerate(zip(masks, cycle(colors))):
        if mask.shape != pixels.shape[:2]:
            raise ValueError(
                f"masks[{index}] has shape {mask.shape}, but its image has {pixels.shape[:2]} when upright: give "
                "(height, width) masks of the image's size."
            )
        _fill(pixels, mask, color, fill)
    for mask, color in zip(masks, cycle(colors)):
        _outline(pixels, mask, color)
    picture = Image.fromarray(pixels)
    if not legend or not masks:
        return picture
    lines = _draw_legend(max(picture.width, LEGEND_WIDTH), labels, colors, scores)
    sheet = Image.new("RGB", (lines.width, picture.height + lines.height), PAPER)
    sheet.paste(picture)
    sheet.paste(lines, (0, picture.height))
    return sheet


def _fill(pixels: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], share: float) -> None:
    """Tint a mask's pixels by a table of values, because a huge image takes four times the memory in floats."""
    values = np.arange(256, dtype=np.float32)[:, None]
    table = ((1 - share) * values + share * np.float32(color)).round().astype(np.uint8)  # (256, 3)
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    box = pixels[top : top + height, left : left + width]
    inside = mask[top : top + height, left : left + width, None]
    for channel in range(3 if width else 0):
        plane = box[..., channel : channel + 1]
        np.copyto(plane, table[plane, channel], where=inside)


def _draw_legend(
    width: int, labels: Sequence[str], colors: Sequence[tuple[int, int, int]], scores: Sequence[float | None]
) -> Image.Image:
    """Write a line or more for each phrase: a swatch of its color, the phrase, and its score on the right."""
    size = min(max(round(LEGEND_TEXT_SHARE * width), TEXT_SIZE), MAX_LEGEND_TEXT)
    font, margin, line_height = ImageFont.load_default(size), size, _line_height(size)
    left, right = margin + 2 * size, width - margin
    phrase_width = right - left - round(font.getlength(" 0.00"))
    texts = [_wrap(_shortened(label), font, phrase_width) for label in labels[:MAX_LEGEND]]
    left_out = len(labels) - len(texts)
    height = sum(map(len, texts)) * line_height + bool(left_out) * line_height + 2 * (margin // 2)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, top = ImageDraw.Draw(sheet), margin // 2
    for lines, color, score in zip(texts, cycle(colors), scores):
        swatch = (margin, top + line_height // 6, margin + round(1.4 * size), top + line_height - line_height // 4)
        draw.rounded_rectangle(swatch, size // 5, color, outline=INK)
        if score is not None:
            draw.text((right, top), f"{score:.2f}", FAINT, font, anchor="ra")
        for line in lines:
            draw.text((left, top), line, INK, font)
            top += line_height
    if left_out:
        draw.text((left, top), f"and {left_out:,} more", FAINT, font)
    return sheet


def _resize(sample: Sample, side: int) -> Sample:
    """Resize a sample so that its image's longer side has `side` pixels."""
    scale = side / max(sample.image.size)
    size = tuple(max(1, round(length * scale)) for length in sample.image.size)

    def resize_mask(mask: np.ndarray) -> np.ndarray:
        mask = Image.fromarray((np.asarray(mask) != 0).astype(np.uint8) * 255)
        return np.asarray(mask.resize(size, Image.Resampling.BICUBIC)) > 127

    return sample._replace(
        image=sample.image.convert("RGB").resize(size, Image.Resampling.BICUBIC),
        truth=resize_mask(sample.truth),
        prediction=resize_mask(sample.prediction),
    )


def fit_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) resized to `size` (width, height). A single pixel stays in up to 500 times fewer."""
    whole = Image.fromarray((np.asarray(mask) != 0).astype(np.uint8) * 255)
    return np.asarray(whole.resize(size, Image.Resampling.BOX)) > 0


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels, within a word only if it is longer than a line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width and len(word) > 1:
            fits = bisect_right(range(1, len(word)), width, key=lambda length: font.getlength(word[:length]))
            lines.append(word[: max(fits, 1)])
            word = word[max(fits, 1) :]
        lines.append(word)
    return lines if lines[0] else lines[1:] or lines


def _shortened(text: str) -> str:
    """A text of at most `MAX_CAPTION` characters, without halves of characters, which no font can draw."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_CAPTION else text[:MAX_CAPTION] + " …"


def _draw_caption(sheet: Image.Image, sample: Sample, left: int, top: int, width: int) -> None:
    """Write the phrase, in as many lines as it takes, and the IoU on its right."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT_SIZE)
    iou = f"IoU {sample.iou:.2f}"
    draw.text((left + width, top), iou, GOOD if sample.iou > 0.5 else POOR, font, anchor="ra")
    for line in _caption_lines(sample, width):
        draw.text((left, top), line, INK, font)
        top += _line_height()


def _line_height(text_size: int = TEXT_SIZE) -> int:
    return round(1.35 * text_size)


def _caption_lines(sample: Sample, width: int) -> list[str]:
    font = ImageFont.load_default(TEXT_SIZE)
    return _wrap(f"“{_shortened(sample.sentence)}”", font, width - round(font.getlength("IoU 0.00")) - MARGIN)


def draw_sample(sample: Sample) -> Image.Image:
    """Draw one sample: the prediction over the image, the truth as an outline, and phrase and IoU beneath."""
    sample = _resize(sample, max(SAMPLE_SIDE, *sample.image.size))
    pixels = np.array(overlay(sample.image, sample.prediction))
    _outline(pixels, sample.truth, TRUTH_COLOR)
    _outline(pixels, sample.prediction, PREDICTION_COLOR)
    width, height = sample.image.size
    lines = _caption_lines(sample, width - MARGIN)
    sheet = Image.new("RGB", (width, height + len(lines) * _line_height() + MARGIN), PAPER)
    sheet.paste(Image.fromarray(pixels))
    _draw_caption(sheet, sample, MARGIN // 2, height + MARGIN // 2, width - MARGIN)
    return sheet


def draw_gallery(sections: dict[str, list[Sample]], columns: int = 3) -> Image.Image:
    """Draw a sheet of many samples, each as image, truth and prediction side by side.

    Args:
        sections: the samples of each section, by its title.
        columns: how many samples stand in a row.
    """
    card_width = 3 * PANEL_SIDE + 2 * (MARGIN // 2)
    width = columns * (card_width + 2 * MARGIN)
    rows = [
        (title if first == 0 else "", [_resize(sample, PANEL_SIDE) for sample in samples[first : first + columns]])
        for title, samples in sections.items()
        for first in range(0, len(samples), columns)
    ]
    title_height = 2 * TITLE_SIZE
    panel_heights = [max(sample.image.height for sample in samples) for _, samples in rows]
    captions = [max(len(_caption_lines(sample, card_width)) for sample in samples) for _, samples in rows]
    heights = [
        bool(title) * title_height + lines * _line_height() + panel_height + 2 * MARGIN
        for (title, _), panel_height, lines in zip(rows, panel_heights, captions, strict=True)
    ]
    sheet = Image.new("RGB", (width, sum(heights) + title_height), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TITLE_SIZE)
    draw.text((MARGIN, MARGIN), "each with image, truth and prediction", FAINT, ImageFont.load_default(TEXT_SIZE))
    top = title_height
    for (title, samples), height, lines in zip(rows, heights, captions, strict=True):
        inner_top = top
        if title:
            draw.text((MARGIN, top), title, INK, font)
            draw.line((MARGIN, top + 1.5 * TITLE_SIZE, width - MARGIN, top + 1.5 * TITLE_SIZE), FAINT)
            inner_top += title_height
        for column, sample in enumerate(samples):
            left = column * (card_width + 2 * MARGIN) + MARGIN
            _draw_caption(sheet, sample, left, inner_top, card_width)
            panels = (
                sample.image,
                overlay(sample.image, sample.truth, TRUTH_COLOR),
                overlay(sample.image, sample.prediction),
            )
            for index, panel in enumerate(panels):
                place = (left + index * (PANEL_SIDE + MARGIN // 2), inner_top + lines * _line_height())
                sheet.paste(panel, place)
        top += height
    return sheet


def draw_cards(
    title: str,
    sections: dict[str, Sequence[Card]],
    width: int,
    load_font: Callable[[int], ImageFont.FreeTypeFont] = ImageFont.load_default,
) -> Image.Image:
    """Draw a sheet of pictures with texts beneath them.

    Args:
        title: stands above all of it.
        sections: the cards of each section, by its title. They stand in columns as wide as its widest picture.
        width: of the sheet in pixels.
        load_font: gives the font of a size in pixels.
    """
    font, title_font = load_font(TEXT_SIZE), load_font(TITLE_SIZE)
    placed = []  # (left, top, what): pictures, and texts with font and colour
    top = MARGIN
    for line in _wrap(title, title_font, width - 2 * MARGIN):
        placed.append((MARGIN, top, (line, title_font, INK)))
        top += _line_height(TITLE_SIZE)
    for heading, cards in sections.items():
        top += MARGIN
        placed.append((MARGIN, top, (heading, title_font, INK)))
        top += _line_height(TITLE_SIZE) + MARGIN // 2
        card_width = max(card.picture.width for card in cards)
        columns = max(1, (width - MARGIN) // (card_width + MARGIN))
        for first in range(0, len(cards), columns):
            bottom = top
            for column, card in enumerate(cards[first : first + columns]):
                left, below = MARGIN + column * (card_width + MARGIN), top + card.picture.height + MARGIN // 2
                placed.append((left, top, card.picture))
                lines = [(line, color) for text, color in card.texts for line in _wrap(text, font, card_width)]
                if len(lines) > MAX_CARD_LINES:
                    lines = [*lines[:MAX_CARD_LINES], ("…", FAINT)]
                for line, color in lines:
                    placed.append((left, below, (line, font, color)))
                    below += _line_height()
                bottom = max(bottom, below)
            top = bottom + MARGIN
    sheet = Image.new("RGB", (width, top + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, top, what in placed:
        if isinstance(what, Image.Image):
            sheet.paste(what, (left, top))
        else:
            text, text_font, color = what
            draw.text((left, top), text, color, text_font)
    return sheet
