"""Masks as COCO stores them: the feature type `RleMask`, run lengths, and the union of polygons and RLEs.

Importing this module registers the type with `datasets`, so it must be imported before saved rows are loaded again.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasets.features.features import register_feature
from datasets.table import array_cast
from pycocotools import mask as coco_mask

from configuration_detris import short_repr

from .untrusted import naming

MAX_PIXELS = 178_956_970  # Pillow refuses larger images; pycocotools would allocate whatever a record says
MAX_OUTLINE = 2_000_000  # pixels around an object; pycocotools keeps some 100 bytes for each
RUN_BITS, RUN_MORE, RUN_SIGN, RUN_LONGEST = 5, 0x20, 0x10, 7  # COCO's compressed runs: bits a character, its flags


@dataclass
class RleMask:
    """Feature type of a binary mask: stored as COCO RLE (a few hundred bytes), read as an array.

    Takes an array (H, W), zero outside the object, or an RLE `{"size": [H, W], "counts": str, bytes or list of int}`;
    gives a uint8 array (H, W) of 0 and 1, or the stored RLE when `decode=False`. What `run_lengths` refuses raises its
    ValueError: a list of counts when it is stored, compressed counts when they are decoded.
    """

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "numpy.ndarray"
    pa_type: ClassVar[Any] = pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()})
    _type: str = field(default="RleMask", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: np.ndarray | list | dict) -> dict:
        if not isinstance(value, dict):
            value = coco_mask.encode(np.asfortranarray(np.asarray(value) != 0, dtype=np.uint8))
        elif isinstance(value["counts"], list):
            value = _compressed(run_lengths(value), value["size"])
        counts = value["counts"]
        return {
            "size": [int(side) for side in value["size"]],
            "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
        }

    def decode_example(self, value: np.ndarray | dict, token_per_repo_id: dict | None = None) -> np.ndarray:
        if isinstance(value, np.ndarray):
            return value  # (H, W)
        run_lengths(value)
        return coco_mask.decode(value)  # (H, W)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        if pa.types.is_list(storage.type):  # `Dataset.map` hands back the arrays it decoded as nested lists
            masks = [None if mask is None else self.encode_example(mask) for mask in storage.to_pylist()]
            storage = pa.array(masks, self.pa_type)
        return array_cast(storage, self.pa_type)


with warnings.catch_warnings():  # `datasets` calls third-party feature types experimental, each time
    warnings.simplefilter("ignore")
    register_feature(RleMask, "RleMask")


def run_lengths(rle: dict) -> np.ndarray:
    """How many pixels of 0 and of 1 follow each other by turns, down the columns, in COCO's RLE, compressed or not.

    No RLE of strangers may reach pycocotools before it was here: pycocotools reads on behind compressed runs that are
    cut off, writes behind its memory for runs of over 30 bits, divides by sides of 0, and leaves pixels undefined
    that no run covers.

    Raises:
        ValueError: the size is none, or the counts are none or not as many as the size has pixels.
    """
    size, counts = mask_size(rle), rle["counts"]
    if isinstance(counts, list):
        if not all(type(length) is int and 0 <= length <= MAX_PIXELS for length in counts):
            raise ValueError(f"the mask's runs {short_repr(counts)} are no numbers of pixels.")
        lengths = np.asarray(counts, dtype=np.int64)
    else:
        lengths = _decompressed(counts if isinstance(counts, bytes) else counts.encode())
        if lengths is None or (lengths < 0).any():
            raise ValueError(f"the mask's runs {short_repr(counts)} are not COCO's compressed counts.")
    total, pixels = int(lengths.sum()), size[0] * size[1]
    if total != pixels:
        raise ValueError(
            f"the mask's runs are {'more' if total > pixels else 'fewer'} than {size[0]} x {size[1]} pixels."
        )
    return lengths


def mask_size(rle: dict) -> tuple[int, int]:
    """The (height, width) of an RLE; ValueError if it has none."""
    if rle is None:
        raise ValueError("the mask is null; give an empty mask where nothing answers to the phrases")
    size = rle["size"]
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"the mask's size is {short_repr(size)}; give its height and width in pixels.")
    return tuple(size)


def _decompressed(counts: bytes) -> np.ndarray | None:
    """Run lengths that COCO compressed (cocoapi, `maskApi.c`, `rleToString`); None if these are not any.

    Each is a signed number, 5 bits a character and the lowest first; from the fourth on, what it adds to the one two
    before it.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(codes & RUN_MORE == 0)
    if not codes.size or not ends.size or codes.min() < 0 or codes.max() > 63 or ends[-1] != codes.size - 1:
        return None
    starts = np.concatenate(([0], ends[:-1] + 1))
    digits = ends - starts + 1
    if digits.max() > RUN_LONGEST:
        return None
    places = np.arange(codes.size) - np.repeat(starts, digits)
    values = np.add.reduceat((codes % RUN_MORE) << RUN_BITS * places, starts)
    values -= (codes[ends] & RUN_SIGN != 0).astype(np.int64) << RUN_BITS * digits
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values


def _compressed(lengths: np.ndarray, size: Sequence[int]) -> dict:
    return coco_mask.frPyObjects({"size": size, "counts": lengths.tolist()}, *size)


def _rle(segmentation: list | dict, size: tuple[int, int], name: str) -> dict:
    """The union of COCO's polygons, RLEs and compressed RLEs as one compressed RLE of (height, width).

    pycocotools trusts its input: corners far away or not finite crash it, and so does an outline for whose points
    there is no memory. All of these are refused here.
    """
    if not (parts := _parts(segmentation)):
        raise ValueError(f"{name} has no mask; give polygons or RLE.")
    runs, outline = [], 0.0
    for part in parts:
        if isinstance(part, dict):
            runs.append(_checked_runs(part, size, name))
            continue
        try:
            corners = np.asarray(part, dtype=np.float64)
        except (ValueError, TypeError):  # said below
            corners = np.empty(0)
        # Corners may lie outside the image by its own size. Two corners would be taken for a box.
        if corners.ndim != 1 or corners.size < 6 or corners.size % 2 or not (np.abs(corners) <= 2 * max(size)).all():
            raise ValueError(f"{name}: {short_repr(part)} is no polygon x1, y1, x2, y2, x3, y3 … near its image.")
        outline += np.abs(np.diff(corners.reshape(-1, 2), axis=0)).max(axis=1).sum()
        if outline > MAX_OUTLINE:
            raise ValueError(
                f"{name}: the outline of {short_repr(parts)} is over {MAX_OUTLINE:,} pixels long; none is."
            )
        runs += coco_mask.frPyObjects([corners.tolist()], *size)
    return RleMask().encode_example(coco_mask.merge(runs))


def _checked_runs(rle: dict, size: tuple[int, int], name: str) -> dict:
    height, width = size
    if tuple(rle["size"]) != size:
        raise ValueError(
            f"{name}: the mask is {short_repr(rle['size'])}, but its image is {[height, width]} (height, width)."
        )
    with naming(name):
        lengths = run_lengths(rle)
    filled = np.flatnonzero(lengths)  # `merge` writes behind its memory where runs of no length outnumber the pixels
    values = filled % 2
    starts = np.flatnonzero(np.diff(values, prepend=1 - values[0]))
    lengths = np.add.reduceat(lengths[filled], starts)
    return _compressed(lengths if values[0] == 0 else np.concatenate(([0], lengths)), size)


def _parts(segmentation: list | dict) -> list:
    if segmentation is None:
        raise ValueError("its mask is null; give polygons or RLE.")
    return [segmentation] if isinstance(segmentation, dict) else segmentation


def checked_bbox(bbox: list[float], ann_id: int) -> list[float]:
    """The box, if it is x, y, width and height; ValueError if not."""
    if (
        not isinstance(bbox, list)
        or len(bbox) != 4
        or not all(type(side) in (int, float) and math.isfinite(side) for side in bbox)
    ):
        raise ValueError(
            f"ann_id {short_repr(ann_id)} has the bbox {short_repr(bbox)}; give x, y, width and height in pixels."
        )
    return [float(side) for side in bbox]


def _box_around(boxes: list[list[float]]) -> list[float]:
    if len(boxes) == 1:  # as it was written: right - left would round
        return boxes[0]
    left, top = (min(box[axis] for box in boxes) for axis in (0, 1))
    right, bottom = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    return [left, top, right - left, bottom - top]
