"""Draw a contact sheet of the synthetic set: `python -m data.shapes --output shapes.png`."""

import argparse

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .composition import draw_scene
from .drawing import render
from .scenes import DEFAULT_SIZES, REFERENCE_SIZE


def contact_sheet(seed: int = 0, columns: int = 4, scale: int = 3) -> Image.Image:
    """Draw a row of scenes for each split. A scene is shown twice, bare and with its masks tinted; beneath stands each
    phrase in the tint of its object."""
    tints = ((255, 60, 90), (40, 190, 255), (255, 200, 0), (90, 220, 90), (210, 110, 255))
    side, font = REFERENCE_SIZE * scale, ImageFont.load_default(13)
    width, height = 2 * side + 24, side + 8 * 17 + 32
    sheet = Image.new("RGB", (width * columns, height * len(DEFAULT_SIZES)), (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    for row, split in enumerate(DEFAULT_SIZES):
        for column in range(columns):
            scene = draw_scene(seed, split, column)
            pixels, labels = render(scene)
            left, top = column * width + 8, row * height + 24
            draw.text((left, top - 18), f"{split} {column}", (230, 230, 230), font)
            large = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_NEAREST)
            large_labels = cv2.resize(labels, (side, side), interpolation=cv2.INTER_NEAREST)
            overlay, line = large // 2, 0
            for index, phrases in enumerate(scene.phrases):
                if not phrases:
                    continue
                mask = large_labels == index + 1
                overlay[mask] = large[mask] // 3 + np.array(tints[index], np.uint8) // 3 * 2
                for phrase in phrases:
                    place = (left + line % 2 * (side + 8), top + side + 6 + line // 2 * 17)
                    draw.text(place, phrase.text, tints[index], font)
                    line += 1
            sheet.paste(Image.fromarray(large), (left, top))
            sheet.paste(Image.fromarray(overlay), (left + side + 8, top))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a contact sheet of the synthetic referring set.")
    parser.add_argument("--output", default="shapes.png")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    contact_sheet(arguments.seed).save(arguments.output)
