"""The letterbox: the square that DETRIS sees an image in, and the way from a mask in it back to the image.

One affine map scales an image to fit and centres it. The arithmetic is the official code's (jiaqihuang01/DETRIS,
commit c94b1e1: `utils/dataset.py` on the way in, `engine/engine.py` on the way back), down to how OpenCV 4 rounds the
places where it samples. Every OpenCV reads a rounded place alike, so results do not depend on the version that is
installed. The way back does not use OpenCV at all.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

SUBPIXELS = 32  # OpenCV 4 samples at multiples of 1/32 of a pixel
REACHES = {cv2.INTER_LINEAR: 1, cv2.INTER_CUBIC: 2}  # how far from a place sampling looks, in pixels
CUBIC_COEFFICIENT = -0.75  # of the cubic kernel that OpenCV and PyTorch share
MAX_SIDE = 32_766  # pixels of an image; OpenCV warps no larger ones
MAX_CHANNELS = 4  # red, green, blue and alpha
CACHED_SIZES = 8  # of images, at 1.6 MB for a square of 448
CACHED_MATRICES = 64  # two for each size of an image


class BoxedMask(NamedTuple):
    """A mask of an image of `size` (height, width) that is 0 outside a box.

    `values` (h, w) are the mask's rows from `top` on and its columns from `left` on. They may be of any type that
    [`DetrisImageProcessor.preprocess`] takes for a map.
    """

    values: np.ndarray
    top: int
    left: int
    size: tuple[int, int]


def letterbox_image(image: np.ndarray, mean: Sequence[float], std: Sequence[float], square: np.ndarray) -> None:
    """Warp an image `(H, W, 3)` in `uint8` into the given `square (3, side, side)` of `float32`, and normalise it.

    Args:
        mean, std: of red, green and blue, for values from 0 to 1. What lies outside the image becomes the mean colour,
            rounded to whole grey levels as in the official code.
    """
    border = np.rint([255 * channel for channel in mean])
    mean, std = np.float32(mean), np.float32(std)
    factors, offsets = 1 / (255 * std), mean / std
    whole = BoxedMask(image, 0, 0, image.shape[:2])
    warped, rows, columns = _warp(whole, square.shape[-1], cv2.INTER_CUBIC, border)
    planes = cv2.split(warped) if warped.size else ()
    for plane, values, factor, offset in zip(planes, square[:, rows, columns], factors, offsets):
        np.multiply(plane, factor, out=values)
        values -= offset
    outside = (np.float32(border) * factors - offsets)[:, None, None]
    square[:, : rows.start] = square[:, rows.stop :] = outside
    square[:, rows, : columns.start] = square[:, rows, columns.stop :] = outside


def letterbox_mask(mask: BoxedMask, square: np.ndarray) -> None:
    """Warp a mask in `uint8` whose foreground is 255 into the given `square (side, side)` of zeros in `float32`.

    The square then holds numbers from 0 to 1. The mask's edges become soft.
    """
    warped, rows, columns = _warp(mask, square.shape[-1], cv2.INTER_LINEAR, 0)
    np.divide(warped, np.float32(255), out=square[rows, columns])


def undo_letterbox(probabilities: torch.Tensor, size: tuple[int, int], side: int) -> torch.Tensor:
    """Warp maps of probabilities `(…, h, w)` of the square back to their image, `(…, height, width)` of `size`.

    The official code enlarges the map to the square, bicubically and with aligned corners, and then warps it
    bicubically. Both steps are linear and treat rows and columns apart, so two matrix products do the work for all
    maps of an image, and no map of the square's size is made.
    """
    height, width = size
    scale, bias_y, bias_x = _geometry(height, width, side)
    rows = _restoring_matrix(height, scale, bias_y, side, probabilities.shape[-2], probabilities.device)
    columns = _restoring_matrix(width, scale, bias_x, side, probabilities.shape[-1], probabilities.device)
    return rows @ probabilities @ columns.T


def _warp(box: BoxedMask, side: int, interpolation: int, border: Any) -> tuple[np.ndarray, slice, slice]:
    """Warp a box of an image, or of a mask, to where it comes to lie in the square.

    Args:
        border: the value of what lies outside the box.

    Returns:
        What the square holds in the rows and columns that follow. Elsewhere it is `border`.
    """
    values, top, left, size = box
    x, y = letterbox_maps(*size, side)
    reach = REACHES[interpolation]
    rows = slice(*np.searchsorted(y[:, 0], (top - reach, top + values.shape[0] - 1 + reach)))
    columns = slice(*np.searchsorted(x[0], (left - reach, left + values.shape[1] - 1 + reach)))
    x, y = x[rows, columns], y[rows, columns]
    if not x.size:  # a large image is sampled at distances that can miss a small box
        return np.empty((*x.shape, *values.shape[2:]), values.dtype), rows, columns
    if left or top:
        x, y = x - np.float32(left), y - np.float32(top)
    return cv2.remap(values, x, y, interpolation, None, cv2.BORDER_CONSTANT, border), rows, columns


@lru_cache(maxsize=CACHED_SIZES)
def letterbox_maps(height: int, width: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in an image each pixel of the square is sampled: `x` and `y`, each `(side, side)`.

    Callers share the arrays and must not change them.
    """
    scale, bias_y, bias_x = _geometry(height, width, side)
    y = _sampling_positions(side, 1 / scale, -bias_y / scale).astype(np.float32)
    x = _sampling_positions(side, 1 / scale, -bias_x / scale).astype(np.float32)
    return tuple(np.meshgrid(x, y))


@lru_cache(maxsize=CACHED_MATRICES)
def _restoring_matrix(
    original: int, scale: float, bias: float, side: int, length: int, device: torch.device
) -> torch.Tensor:
    """One axis of the way back, `(original, length)`: from the map to the square, and from there to the image."""
    positions = torch.from_numpy(_sampling_positions(original, scale, bias))[:, None]
    neighbours = positions.floor() + torch.arange(-1, 3)  # (original, 4)
    d, a = (positions - neighbours).abs(), CUBIC_COEFFICIENT
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = (((d - 5) * d + 8) * d - 4) * a
    inside = (neighbours >= 0) & (neighbours < side)  # a sample beyond the square counts as 0
    weights = torch.where(d <= 1, near, far) * inside
    enlarged = _enlarging_matrix(side, length)[neighbours.long().clamp(0, side - 1)]  # (original, 4, length)
    return (weights[:, None] @ enlarged)[:, 0].to(device=device, dtype=torch.float32)


@lru_cache(maxsize=CACHED_SIZES)
def _enlarging_matrix(side: int, length: int) -> torch.Tensor:
    """One axis of the official enlargement `(side, length)`: the matrix of what it does to unit vectors."""
    unit_vectors = torch.eye(length, dtype=torch.float64)[None, None]
    return F.interpolate(unit_vectors, (side, length), mode="bicubic", align_corners=True)[0, 0]


def _geometry(height: int, width: int, side: int) -> tuple[float, float, float]:
    """`scale, bias_y, bias_x` of `y' = scale·y + bias_y`, from pixel indices of an image to those of the square."""
    scale = min(side / height, side / width)
    return scale, (side - height * scale) / 2, (side - width * scale) / 2


def _sampling_positions(count: int, scale: float, bias: float) -> np.ndarray:
    """Where pixels 0 … `count - 1` of an axis are sampled in the other image, rounded as OpenCV 4 does."""
    return np.floor((scale * np.arange(count) + bias) * SUBPIXELS + 0.5) / SUBPIXELS
