"""Images and masks of every kind that people hold, as arrays in `uint8`; whatever cannot be read as one is refused.

A PIL image, a NumPy array and a torch tensor of the same picture give the same array.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

try:
    from .letterbox_detris import MAX_CHANNELS, MAX_SIDE, BoxedMask
except ImportError:
    if __package__:
        raise
    from letterbox_detris import MAX_CHANNELS, MAX_SIDE, BoxedMask


def as_sequence(values: Any, batch_ndims: tuple[int, ...], name: str) -> Sequence:
    """Return images or maps as a sequence: a given one, a batch (an array of so many dimensions), or `[values]`."""
    listed = isinstance(values, Sequence) and not isinstance(values, (str, bytes, bytearray, BoxedMask))
    several = listed or getattr(values, "ndim", None) in batch_ndims
    if several and not len(values):
        raise ValueError(f"{name} is empty: give at least one.")
    return values if several else [values]


def _as_array(image: Any, name: str, in_colour: bool) -> np.ndarray:
    """Return the numbers of an array or tensor as they are, those of a PIL image upright and, `in_colour`, as RGB."""
    if isinstance(image, torch.Tensor):
        if image.layout != torch.strided or image.is_quantized or image.is_meta:
            kind = "a meta tensor" if image.is_meta else f"a tensor of {image.layout} and {image.dtype}"
            raise TypeError(f"{name} is {kind}: give a dense tensor of plain numbers.")
        if image.is_floating_point() and image.itemsize < 4:  # NumPy has no bfloat16
            image = image.float()
        return image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        return image
    if not isinstance(image, Image.Image):
        is_file = isinstance(image, (str, bytes, bytearray, os.PathLike))
        opened = ", which PIL.Image.open makes of a file" if is_file else ""
        raise TypeError(
            f"{name} is of type {type(image).__name__}: give a PIL image{opened}, a NumPy array or a torch tensor."
        )
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        upright = ImageOps.exif_transpose(image) if turned else image  # it would copy an image that is upright
        # In modes F and I Pillow would clip the numbers at 255.
        if in_colour and upright.mode not in ("RGB", "F") and not upright.mode.startswith("I"):
            upright = upright.convert("RGB")
        return np.asarray(upright)
    except (OSError, SyntaxError, ValueError) as error:  # for a broken file Pillow's decoders raise all three
        file = f" ({image.filename})" if getattr(image, "filename", "") else ""
        raise OSError(f"{name}{file} cannot be decoded: {error}. Repair the file or leave it out.") from error


def _as_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Return values as 0 … 255 in `uint8`, because the official code warps images and masks in this depth."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.name == "uint16":
        return (values >> 8).astype(np.uint8)
    full = 1 if values.dtype.kind in "bf" else 255
    numeric = values.dtype.kind in "bfiu"
    if not numeric or not (values.min() >= 0 and values.max() <= full):
        found = f" from {values.min()} to {values.max()}" if numeric else ""  # both are NaN if any value is
        raise ValueError(
            f"{name} holds {values.dtype} values{found}: give uint8 or uint16, other integers from 0 to 255, or "
            "floats from 0 to 1 that are not yet normalised."
        )
    return values.astype(np.uint8) if full == 255 else np.rint(values * np.float32(255)).astype(np.uint8)


def _refuse_long_sides(array: np.ndarray, name: str) -> None:
    if max(array.shape[:2]) > MAX_SIDE:
        raise ValueError(
            f"{name} is {array.shape[0]} x {array.shape[1]} pixels (height x width), but a side has at most "
            f"{MAX_SIDE:,}: cut it into parts or make it smaller."
        )


def as_rgb(image: Any, name: str) -> np.ndarray:
    """Return any image as `(H, W, 3)` in `uint8`, upright."""
    array = _as_array(image, name, in_colour=True)
    channels_last = isinstance(image, Image.Image) or array.ndim == 2
    array = array[..., None] if array.ndim == 2 else array
    channels = range(1, MAX_CHANNELS + 1)
    if array.ndim != 3 or array.size == 0 or not (array.shape[0] in channels or array.shape[-1] in channels):
        raise ValueError(
            f"{name} has shape {array.shape}: give (height, width), (height, width, channels) or (channels, height, "
            f"width) with at least one pixel and at most {MAX_CHANNELS} channels."
        )
    if not channels_last and infer_channel_dimension_format(array, tuple(channels)) == ChannelDimension.FIRST:
        array = np.moveaxis(array, 0, -1)
    _refuse_long_sides(array, name)
    array = _as_bytes(array[..., :3] if array.shape[-1] >= 3 else array[..., :1], name)
    return array if array.shape[-1] == 3 else array.repeat(3, axis=-1)


def as_mask(segmentation_map: Any, name: str) -> np.ndarray:
    """Return a mask as `(H, W)` in `uint8`, with 255 as the foreground."""
    mask = _as_array(segmentation_map, name, in_colour=False)
    if mask.ndim == 3 and (mask.shape[0] == 1) != (mask.shape[-1] == 1):  # it has an axis of one channel
        mask = mask.squeeze(0 if mask.shape[0] == 1 else -1)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"{name} has shape {mask.shape}: give one (height, width) map for each phrase or image.")
    _refuse_long_sides(mask, name)
    if mask.dtype.kind not in "iu":
        return _as_bytes(mask, name)
    if mask.min() < 0 or mask.max() not in (0, 1, 255):  # probably a map of labels, one of which the phrase means
        raise ValueError(
            f"{name} holds integers from {mask.min()} to {mask.max()}: give 0 and 1, or 0 … 255 with 255 as the "
            "foreground."
        )
    return mask.astype(np.uint8, copy=False) if mask.max() == 255 else mask.astype(np.uint8) * np.uint8(255)
