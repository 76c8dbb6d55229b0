"""Image files of strangers: which format they have, how large they are, whether they are whole; and masks as PNG."""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import PIL.ExifTags
import PIL.Image

from configuration_detris import one_line, raise_if_out_of_memory, short_repr

from .masks import RleMask

IMAGE_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
)  # to read EPS, Pillow would start a program
END_OF_JPEG, END_OF_PNG = b"\xff\xd9", b"IEND\xaeB`\x82"
FORMATS_NOT_READ = {  # by the first bytes of their files
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
EXIF_SIDEWAYS = (5, 6, 7, 8)  # orientations for which width and height change places
MIN_WRAPPED = 240  # CRIS adds overlapping polygons up in 8 bits, where 255 twice is 254 and three times 253


def check_image(image: str | os.PathLike | bytes, size: tuple[int, int], layout: str = "") -> None:
    """Make sure that an image file is whole and as large as its record says.

    Args:
        image: the image file's path, or all bytes of the file.
        size: (height, width) in pixels.
        layout: a clause on where such files belong, for the error about a missing one.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is cut short, or no image at all.
        ValueError: it has another size, or pixels of 32 bits.
    """
    found, turned = _upright_size(image, layout, whole=True)
    if found != size:
        upright = " when upright, as its EXIF orientation says" if turned else ""
        remedy = "annotate the upright image" if turned else "take the image that was annotated, or correct the record"
        raise ValueError(
            f"{_called('image', image)} is {found[0]} x {found[1]} pixels (height x width){upright}, but its record "
            f"says {size[0]} x {size[1]}: {remedy}."
        )


def image_size(image: str | os.PathLike | bytes, layout: str = "") -> tuple[int, int]:
    """Read the (height, width) of an image from its header, as it is when `datasets.Image` has turned it upright.

    Args:
        image: the image file's path, or all bytes of the file.
        layout: a clause on where such files belong, for the error about a missing one.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is no image.
        ValueError: its pixels have 32 bits.
    """
    return _upright_size(image, layout, whole=False)[0]


def _upright_size(source: str | os.PathLike | bytes, layout: str, whole: bool) -> tuple[tuple[int, int], bool]:
    """The (height, width) of the upright image, and whether that swaps the sides of the file's image.

    Args:
        whole: whether to make sure that the file does not end early.
    """
    with opened_image(source, "image", layout, IMAGE_FORMATS) as (file, image):
        size, mode = image.size[::-1], image.mode
        turned = image.getexif().get(PIL.ExifTags.Base.Orientation) in EXIF_SIDEWAYS
        if turned and image.format != "TIFF":  # Pillow has swapped the sides of a TIFF already
            size = size[::-1]
        if whole:
            file.seek(-len(END_OF_PNG), os.SEEK_END)
            if not file.read().endswith((END_OF_JPEG, END_OF_PNG)):
                image.load()  # it is likely cut short: decoding tells for sure, at 20 times the cost
    if mode in ("I", "F"):
        raise ValueError(f"{_called('image', source)} has pixels of 32 bits (mode {mode}); write 8 bits a channel.")
    return size, turned


def _called(what: str, source: str | os.PathLike | bytes) -> str:
    """What errors call an image or mask."""
    return f"the embedded {what}" if isinstance(source, bytes) else f"{what} {source}"


@contextmanager
def opened_image(
    source: str | os.PathLike | bytes, what: str, layout: str, formats: Sequence[str]
) -> Iterator[tuple[BinaryIO, PIL.Image.Image]]:
    """Open a stranger's image file: the file, and the image of which Pillow has read the header.

    Args:
        source: the image file's path, or all bytes of the file.
        what: what to call it in errors.
        layout: a clause on where such files belong, for the error about a missing one.
        formats: those that it may have.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it has none of the formats, or is broken where it is read inside the `with` block.
    """
    called = _called(what, source)
    with _opened(source, called, layout) as file, _identified_image(file, called, formats) as image:
        yield file, image


def _opened(source: str | os.PathLike | bytes, called: str, layout: str) -> BinaryIO:
    """The file of this path or of these bytes, opened to read; errors as in `opened_image`."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        if not os.path.isfile(source) and os.path.exists(source):  # reading a pipe would wait for ever
            raise OSError("it is no regular file")
        return open(source, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{called} does not exist" + (f"; {layout}." if layout else ".")) from None
    except Exception as error:
        raise_if_out_of_memory(error)
        raise OSError(f"{called} cannot be read ({one_line(error)}); copy or download it again.") from error


@contextmanager
def _identified_image(file: BinaryIO, what: str, formats: Sequence[str]) -> Iterator[PIL.Image.Image]:
    """Open a stranger's image: the image of which Pillow has read the header.

    Raises:
        OSError: it has none of the formats, or is broken where it is read inside the `with` block.
    """
    try:
        with PIL.Image.open(file, formats=formats) as image:
            yield image
    except PIL.UnidentifiedImageError as error:
        wanted = " or ".join(formats)
        file.seek(0)
        other = image_format(file)
        if other:
            raise OSError(f"{what} cannot be read (it is {other}); convert it to {wanted}.") from error
        raise OSError(f"{what} cannot be read (it is no {wanted}); copy or download it again.") from error
    except PIL.Image.DecompressionBombError as error:
        raise OSError(f"{what} has too many pixels ({one_line(error)}); make it smaller.") from error
    except Exception as error:  # Pillow's decoders raise many types
        raise_if_out_of_memory(error)
        raise OSError(f"{what} cannot be read ({one_line(error)}); copy or download it again.") from error


def decode_image(content: bytes, name: str) -> PIL.Image.Image:
    """Decode an image file of which all bytes are in memory; it is not yet turned upright.

    Args:
        content: the file's bytes.
        name: what to call it in errors.

    Raises:
        OSError: it is none of `IMAGE_FORMATS`, cut short, broken, or larger than Pillow's limit, 179 million pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # of images up to the limit
        with _identified_image(io.BytesIO(content), f"image {name}", IMAGE_FORMATS) as image:
            image.load()
            image.getexif()  # is read from the file when it is first asked for
            return image


def image_format(file: BinaryIO) -> str:
    """The format of an image file, told by its first bytes, whether we read it or not; empty if it is no image."""
    start = file.read(16)
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
        return "HEIC or AVIF"
    for first_bytes, name in FORMATS_NOT_READ.items():
        if start.startswith(first_bytes):
            return name
    file.seek(0)
    try:
        with PIL.Image.open(file, formats=IMAGE_FORMATS) as image:
            return image.format
    except Exception as error:  # Pillow's decoders raise many types
        raise_if_out_of_memory(error)
        return ""


def read_png_mask(
    source: str | os.PathLike | bytes, size: tuple[int, int], layout: str, wrapped: bool = False
) -> dict:
    """Read a mask from a PNG of one channel, which is 0 outside the object and either 1 or 255 inside.

    Args:
        source: the image file's path, or all bytes of the file.
        size: (height, width) that it must have, in pixels.
        layout: a clause on where such files belong, for the error about a missing one.
        wrapped: whether CRIS wrote it, whose pixels are a little under 255 where polygons overlap.

    Returns:
        The mask as compressed RLE.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is no PNG, or cut short.
        ValueError: it has another size, several channels, or other values.
    """
    called = _called("mask", source)
    with opened_image(source, "mask", layout, ("PNG",)) as (_, image):
        found, mode = image.size[::-1], image.mode
        one_channel = mode in ("1", "L", "P")
        pixels = np.asarray(image, dtype=np.uint8) if one_channel and found == size else None  # (H, W)
    if found != size:
        raise ValueError(
            f"{called} is {found[0]} x {found[1]} pixels (height x width), but its image is {size[0]} x {size[1]}."
        )
    if not one_channel:
        raise ValueError(f"{called} has the mode {mode}; write one channel of 8 bits, 0 outside and 255 inside.")
    values = set(np.flatnonzero(np.bincount(pixels.ravel())).tolist()) - {0}
    if not (values <= {1} or values <= {255} or (wrapped and min(values) >= MIN_WRAPPED)):
        raise ValueError(
            f"{called} holds the values {short_repr(sorted(values))}; write 0 outside the object and either 1 or "
            "255 inside."
        )
    return RleMask().encode_example(pixels)
