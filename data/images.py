"""Image files of strangers: what formats they have, how large they are, whether they are whole; and masks in PNG."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import PIL.ExifTags
import PIL.Image

from configuration_detris import one_line, raise_if_out_of_memory, short_repr

from .masks import RleMask

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # for some others Pillow starts programs (EPS)
END_OF_JPEG, END_OF_PNG = b"\xff\xd9", b"IEND\xaeB`\x82"
MAX_SIDE = 32_766  # pixels; OpenCV warps no larger images
FOREIGN_FORMATS = {  # the first bytes of images in formats that are not read here
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
EXIF_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
WRAPPED = 240  # CRIS adds an object's overlapping polygons up in 8 bits: two parts give 254, three 253, …


def check_image(path: str | os.PathLike, size: tuple[int, int], layout: str = "") -> None:
    """Make sure that an image's file is whole and as large, (height, width), as its record says.

    Raises:
        FileNotFoundError: there is none; says what its layout is.
        OSError: it is truncated or no image at all.
        ValueError: it has another size.
    """
    found, turned = _image_header(path, layout, whole=True)
    if found != size:
        upright = " when upright, as its EXIF orientation says" if turned else ""
        remedy = "annotate the upright image" if turned else "take the image that was annotated, or correct the record"
        raise ValueError(
            f"image {path} is {found[0]} x {found[1]} pixels (height x width){upright}, but its record says "
            f"{size[0]} x {size[1]}: {remedy}."
        )


def image_size(path: str | os.PathLike, layout: str = "", whole: bool = False) -> tuple[int, int]:
    """The (height, width) of an image seen upright, as `datasets.Image` turns it, from its header.

    Args:
        whole: whether to make sure that the file does not end early.

    Raises:
        FileNotFoundError: there is none; says what its layout is.
        OSError: it is no image, or truncated.
        ValueError: its pixels have 32 bits.
    """
    return _image_header(path, layout, whole)[0]


def _image_header(path: str | os.PathLike, layout: str, whole: bool) -> tuple[tuple[int, int], bool]:
    """What `image_size` gives, and whether EXIF swaps the sides for that."""
    with opened_image(path, "image", layout, IMAGE_FORMATS) as (file, image):
        size, mode = image.size[::-1], image.mode
        turned = image.getexif().get(PIL.ExifTags.Base.Orientation) in EXIF_SIDEWAYS
        if turned and image.format != "TIFF":  # Pillow turns a TIFF's size itself
            size = size[::-1]
        if whole:
            file.seek(-len(END_OF_PNG), os.SEEK_END)
            if not file.read().endswith((END_OF_JPEG, END_OF_PNG)):
                image.load()  # likely cut short: decode it to be sure, at 20 times the cost
    if mode in ("I", "F"):
        raise ValueError(f"image {path} has pixels of 32 bits (mode {mode}); write 8 bits a channel.")
    return size, turned


@contextmanager
def opened_image(
    path: str | os.PathLike, what: str, layout: str, formats: Sequence[str]
) -> Iterator[tuple[BinaryIO, PIL.Image.Image]]:
    """A stranger's image file and what Pillow makes of its header.

    Args:
        what: what to call it in complaints.
        layout: a clause on where it belongs.
        formats: those that Pillow may take it for.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is none of the formats, or broken as far as it is read inside.
    """
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # reading a pipe would wait for ever
            raise OSError("it is no regular file")
        with open(path, "rb") as file, PIL.Image.open(file, formats=formats) as image:
            yield file, image
    except FileNotFoundError:
        raise FileNotFoundError(f"{what} {path} does not exist" + (f"; {layout}." if layout else ".")) from None
    except PIL.UnidentifiedImageError as error:
        wanted = " or ".join(formats)
        with open(path, "rb") as file:
            other = image_format(file)
        if other:
            raise OSError(f"{what} {path} cannot be read (it is {other}); convert it to {wanted}.") from error
        raise OSError(f"{what} {path} cannot be read (it is no {wanted}); copy or download it again.") from error
    except Exception as error:  # Pillow's decoders raise many types
        raise_if_out_of_memory(error)
        raise OSError(f"{what} {path} cannot be read ({one_line(error)}); copy or download it again.") from error


def image_format(file: BinaryIO) -> str:
    """The format of an image file by how it begins, whether it is read here or not; nothing if it is no image's."""
    start = file.read(16)
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
        return "HEIC or AVIF"
    if foreign := [name for begin, name in FOREIGN_FORMATS.items() if start.startswith(begin)]:
        return foreign[0]
    file.seek(0)
    try:
        with PIL.Image.open(file, formats=IMAGE_FORMATS) as image:
            return image.format
    except Exception as error:  # Pillow's decoders raise many types
        raise_if_out_of_memory(error)
        return ""


def read_png_mask(path: str | os.PathLike, size: tuple[int, int], layout: str, wrapped: bool = False) -> dict:
    """A PNG of one channel, 0 outside the object and either 1 or 255 inside, as RLE.

    Args:
        size: (height, width) that it must have.
        layout: a clause for the complaint about a missing file.
        wrapped: whether CRIS wrote it, whose pixels of overlapping polygons are a little under 255.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is no PNG, or truncated.
        ValueError: it has another size or other values.
    """
    with opened_image(path, "mask", layout, ("PNG",)) as (_, image):
        found, mode = image.size[::-1], image.mode
        one_channel = mode in ("1", "L", "P")
        pixels = np.asarray(image, dtype=np.uint8) if one_channel and found == size else None  # (H, W)
    if found != size:
        raise ValueError(
            f"mask {path} is {found[0]} x {found[1]} pixels (height x width), but its image is {size[0]} x {size[1]}."
        )
    if not one_channel:
        raise ValueError(f"mask {path} has the mode {mode}; write one channel of 8 bits, 0 outside and 255 inside.")
    values = set(np.flatnonzero(np.bincount(pixels.ravel())).tolist()) - {0}
    if not (values <= {1} or values <= {255} or (wrapped and min(values) >= WRAPPED)):
        raise ValueError(
            f"mask {path} holds the values {short_repr(sorted(values))}; write 0 outside the object and either 1 or "
            "255 inside."
        )
    return RleMask().encode_example(pixels)
