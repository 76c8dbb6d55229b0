"""A stored row's image, mask and phrases, decoded. What is broken is refused, and the message names the row.

Rows come from strangers, as `datasets` or Parquet files hold them: images as paths or bytes, masks as COCO's RLE.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import datasets
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from configuration_detris import one_line, raise_if_out_of_memory, short_repr
from letterbox_detris import MAX_CHANNELS, BoxedMask

from .images import END_OF_JPEG, EXIF_SIDEWAYS, IMAGE_FORMATS, image_format
from .masks import RleMask, decode_in_box, mask_size
from .records import MAX_PHRASE, is_int64


def read_image(row: dict) -> np.ndarray | Image.Image:
    """Decode a row's image.

    Returns:
        A JPEG's pixels (H, W, 3), which OpenCV decodes, as in the official code. They are equal to Pillow's, which
        would be copied once more to become an array. Other files, and JPEGs that are turned or in CMYK, are decoded
        by Pillow and returned as its image.

    Raises:
        OSError: the file is missing, broken or not as large as the mask; the message names it and the row.
        ValueError: the mask is null; the message names the row.
    """
    name, content = read_image_file(row)
    with _image_errors(name, content):
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as header:
            colours = header.format == "JPEG" and header.mode in ("L", "RGB")
            upright = header.getexif().get(ExifTags.Base.Orientation, 1) == 1
        pixels = None
        # OpenCV does not complain about a file that is cut short. An image with at most MAX_CHANNELS rows or columns
        # stays a PIL image, because in an array they could be read as channels.
        if colours and upright and content.endswith(END_OF_JPEG) and min(header.size) > MAX_CHANNELS:
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)  # (H, W, 3)
        if pixels is None:
            pixels = datasets.Image().decode_example({"path": row["image"]["path"], "bytes": content})
    _require_size_of_mask(row, name, header.size[::-1] if upright else pixels.size[::-1])
    return pixels


def read_thumbnail(row: dict, side: int) -> Image.Image:
    """Decode a row's image for people to look at: upright, RGB, its longer side at most `side` pixels.

    A JPEG is made smaller while it is decoded, so that a huge one takes little memory.

    Raises:
        OSError, ValueError: as `read_image`.
    """
    name, content = read_image_file(row)
    with _image_errors(name, content), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of images up to Pillow's limit
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            size = image.size[::-1]
            # Pillow has swapped the sides of a TIFF already.
            turned = image.getexif().get(ExifTags.Base.Orientation) in EXIF_SIDEWAYS and image.format != "TIFF"
            image.draft(None, (side, side))
            picture = ImageOps.exif_transpose(image).convert("RGB")
    _require_size_of_mask(row, name, size[::-1] if turned else size)
    picture.thumbnail((side, side))
    return picture


def read_image_file(row: dict) -> tuple[str, bytes]:
    """What errors call a row's image, and its encoded bytes, whether they are embedded or in a file.

    Raises:
        OSError: it is null or missing, or its file cannot be read; the message names it and the row.
    """
    image = row["image"]
    name = f"Image {(image or {}).get('path') or 'embedded in the data set'} of the row with ref_id {row['ref_id']}"
    with _image_errors(name, b""):
        if image is None or image["bytes"] is None and image["path"] is None:
            raise ValueError("it is null")
        if image["bytes"] is not None:
            return name, image["bytes"]
        file = Path(image["path"])
        if file.exists() and not file.is_file():  # reading a pipe would wait for ever
            raise OSError("it is no regular file")
        return name, file.read_bytes()


@contextmanager
def _image_errors(name: str, content: bytes) -> Iterator[None]:
    """Turn whatever Pillow's decoders raise, which is of many types, into an OSError that begins with `name`."""
    try:
        yield
    except Exception as error:
        raise_if_out_of_memory(error)
        other = image_format(io.BytesIO(content)) if isinstance(error, UnidentifiedImageError) else ""
        if other:
            raise OSError(f"{name} cannot be read (it is {other}); convert it to JPEG or PNG.") from error
        raise OSError(f"{name} cannot be read ({one_line(error)}): restore the file or leave the row out.") from error


def _require_size_of_mask(row: dict, name: str, size: tuple[int, int]) -> None:
    """Refuse an image whose upright `size` (height, width) is not its mask's with an OSError that names it."""
    with _row_errors_begin_with_id(row):
        found = row["mask"].shape if isinstance(row["mask"], np.ndarray) else mask_size(row["mask"])
    if size != found:
        raise OSError(
            f"{name} is {size[0]} x {size[1]} pixels, height x width, but its mask {found[0]} x {found[1]}: "
            "take the image that was annotated, or leave the row out."
        )


def read_mask(row: dict) -> BoxedMask | np.ndarray:
    """A row's mask. Only its box is decoded if the mask is still COCO's RLE; raises ValueError if that is broken."""
    rle = row["mask"]
    if isinstance(rle, np.ndarray):
        return rle
    with _row_errors_begin_with_id(row):
        return decode_in_box(rle)


def read_whole_mask(row: dict) -> np.ndarray:
    """All of a row's mask (H, W), 0 and 1; raises ValueError if it is broken."""
    with _row_errors_begin_with_id(row):
        return RleMask().decode_example(row["mask"])


def read_phrases(row: dict) -> list[str]:
    """A row's phrases; raises ValueError if there are none, one is empty or too long, or the row has no ref_id."""
    with _row_errors_begin_with_id(row):
        phrases = row["sentences"]
        if not phrases or not all(phrase.strip() and len(phrase) <= MAX_PHRASE for phrase in phrases):
            raise ValueError(f"its phrases are {short_repr(phrases)}")
        if not is_int64(row["ref_id"]):
            raise ValueError("its ref_id is no whole number")
        return phrases


@contextmanager
def _row_errors_begin_with_id(row: dict) -> Iterator[None]:
    """Turn what a row's broken parts raise into a ValueError that names the row."""
    try:
        yield
    except Exception as error:  # strangers' rows can make libraries raise anything
        raise_if_out_of_memory(error)
        raise ValueError(
            f"The row with ref_id {short_repr(row['ref_id'])} cannot be read ({one_line(error)}): get or prepare its "
            "data set again, or leave the row out."
        ) from error
