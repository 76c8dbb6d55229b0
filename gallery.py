"""Pictures of referring segmentation: a mask over its image, a sample with its phrase, a sheet of many samples."""

from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

PREDICTION_COLOR, TRUTH_COLOR = (255, 45, 120), (60, 220, 120)
PAPER, INK, FAINT = (255, 255, 255), (28, 28, 34), (120, 120, 130)
GOOD, POOR = (20, 140, 70), (200, 40, 50)  # colors of an IoU above one half, and of one below
TINT = 0.2  # share of the mask's color in the object's pixels
DIM = 0.5  # brightness of the surroundings, as a share of their own
SAMPLE_SIDE = 400  # pixels of an image's longer side in the picture of one sample, at least
PANEL_SIDE = 200  # pixels of an image's longer side on a sheet
MARGIN = 14  # pixels
TEXT_SIZE, TITLE_SIZE = 17, 22  # pixels
MAX_CAPTION = 300  # characters of a phrase


class Sample(NamedTuple):
    """A phrase, its image (H, W), and the true and the predicted mask (H, W), which are not zero on the object."""

    image: Image.Image
    sentence: str
    truth: np.ndarray
    prediction: np.ndarray
    iou: float


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


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _draw_caption(sheet: Image.Image, sample: Sample, left: int, top: int, width: int) -> None:
    """Write the phrase, in as many lines as it takes, and the IoU on its right."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT_SIZE)
    iou = f"IoU {sample.iou:.2f}"
    draw.text((left + width, top), iou, GOOD if sample.iou > 0.5 else POOR, font, anchor="ra")
    for line in _caption_lines(sample, width):
        draw.text((left, top), line, INK, font)
        top += _line_height()


def _line_height() -> int:
    return round(1.35 * TEXT_SIZE)


def _caption_lines(sample: Sample, width: int) -> list[str]:
    font = ImageFont.load_default(TEXT_SIZE)
    sentence = sample.sentence if len(sample.sentence) <= MAX_CAPTION else sample.sentence[:MAX_CAPTION] + " …"
    return _wrap(f"“{sentence}”", font, width - round(font.getlength("IoU 0.00")) - MARGIN)


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
