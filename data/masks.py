"""Masks as COCO stores them: the feature type `RleMask`, run lengths, the union of polygons and RLEs, and boxes.

Importing this module registers the type with `datasets`: import it before you load saved rows.
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
from letterbox_detris import BoxedMask

from .untrusted import record_errors_begin_with

MAX_PIXELS = 178_956_970  # Pillow refuses larger images, while pycocotools would allocate whatever a record says
MAX_OUTLINE = 2_000_000  # pixels around an object; pycocotools needs some 100 bytes for each
# COCO's compressed runs: bits of a character, the flags "another follows" and "negative", characters of a run at most.
RUN_BITS, RUN_MORE, RUN_SIGN, RUN_LONGEST = 5, 0x20, 0x10, 7


@dataclass
class RleMask:
    """Feature type of a binary mask, which is stored as COCO's RLE (a few hundred bytes) and read as an array.

    It takes an array (H, W), zero outside the object, or an RLE `{"size": [H, W], "counts": …}` whose counts are text,
    bytes or a list. It gives a uint8 array (H, W) of 0 and 1, or the stored RLE if `decode` is false. `run_lengths`
    checks a list of counts when it is stored, and compressed counts when they are decoded.
    """

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "numpy.ndarray"
    pa_type: ClassVar[Any] = pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()})
    _type: str = field(default="RleMask", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        """`datasets` asks for the Arrow type."""
        return self.pa_type

    def encode_example(self, value: np.ndarray | list | dict) -> dict:
        """`datasets` asks how a value is stored: as compressed RLE.

        Raises:
            ValueError: `run_lengths` refuses its list of counts.
        """
        if not isinstance(value, dict):
            value = encode_mask(value)
        elif isinstance(value["counts"], list):
            value = _compress(run_lengths(value), value["size"])
        counts = value["counts"]
        return {
            "size": [int(side) for side in value["size"]],
            "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
        }

    def decode_example(self, value: np.ndarray | dict, token_per_repo_id: dict | None = None) -> np.ndarray:
        """`datasets` asks how a stored value is read: as a uint8 array (H, W).

        Raises:
            ValueError: `run_lengths` refuses it.
        """
        if isinstance(value, np.ndarray):
            return value
        run_lengths(value)  # pycocotools trusts what it decodes
        return coco_mask.decode(value)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        """`datasets` asks for a column of this type: of RLEs, or of the nested lists that `map` makes of arrays."""
        if pa.types.is_list(storage.type):
            masks = [None if mask is None else self.encode_example(mask) for mask in storage.to_pylist()]
            storage = pa.array(masks, self.pa_type)
        return array_cast(storage, self.pa_type)


with warnings.catch_warnings():  # `datasets` warns that feature types of others are experimental
    warnings.simplefilter("ignore")
    register_feature(RleMask, "RleMask")


def encode_mask(mask: np.ndarray | list) -> dict:
    """Encode a mask (H, W), zero outside the object, as COCO's compressed RLE with its counts as bytes."""
    return coco_mask.encode(np.asfortranarray(np.asarray(mask) != 0, dtype=np.uint8))


def run_lengths(rle: dict) -> np.ndarray:
    """The lengths of the runs of a COCO RLE, compressed or not: pixels of 0 and of 1 by turns, down the columns.

    Every RLE of a stranger must pass here before pycocotools gets it. pycocotools reads on past compressed runs that
    are cut off, writes past its memory for runs of over 30 bits, divides by sides of 0, and leaves pixels undefined
    that no run covers.

    Raises:
        ValueError: its size is no height and width, or its counts are not runs of as many pixels.
    """
    size, counts = mask_size(rle), rle["counts"]
    if isinstance(counts, list):
        if not all(type(length) is int and 0 <= length <= MAX_PIXELS for length in counts):
            raise ValueError(
                f"the mask's runs {short_repr(counts)} are no numbers of pixels; give the "
                "lengths of the runs as whole numbers."
            )
        lengths = np.asarray(counts, dtype=np.int64)
    else:
        lengths = _decompress(counts if isinstance(counts, bytes) else counts.encode())
        if lengths is None or (lengths < 0).any():
            raise ValueError(
                f"the mask's runs {short_repr(counts)} are not COCO's compressed counts; write them "
                "with pycocotools, or give the lengths as a list."
            )
    total, pixels = int(lengths.sum()), size[0] * size[1]
    if total != pixels:
        raise ValueError(
            f"the mask's runs are {'more' if total > pixels else 'fewer'} than {size[0]} x {size[1]} pixels."
        )
    return lengths


def mask_size(rle: dict) -> tuple[int, int]:
    """The (height, width) of an RLE in pixels.

    Raises:
        ValueError: there is no RLE, or its size is no height and width.
    """
    if rle is None:
        raise ValueError("the mask is null; give an empty mask where the phrases name nothing")
    size = rle["size"]
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"the mask's size is {short_repr(size)}; give its height and width in pixels.")
    return tuple(size)


def _decompress(counts: bytes) -> np.ndarray | None:
    """Run lengths that COCO compressed (cocoapi, `maskApi.c`, `rleToString`); None if these bytes are not any.

    A run is a signed number of 5 bits a character, the lowest bits first. From the fourth run on, the number is the
    difference from the run two places before.
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


def _compress(lengths: np.ndarray, size: Sequence[int]) -> dict:
    """COCO's compressed RLE, its counts as bytes, of checked run lengths."""
    return coco_mask.frPyObjects({"size": size, "counts": lengths.tolist()}, *size)


def union_of_parts(segmentation: list | dict, size: tuple[int, int], name: str) -> dict:
    """The union of polygons, RLEs and compressed RLEs as one compressed RLE.

    pycocotools trusts its input: corners that are far away or not finite crash it, and so does an outline that is too
    long for the memory. Both are refused here first.

    Args:
        segmentation: COCO's, a list of polygons and RLEs or one RLE.
        size: (height, width) of the image in pixels.
        name: what to call the object in errors.

    Raises:
        ValueError: there is no part, or one is no polygon near the image or no RLE of its size.
    """
    if not (parts := mask_parts(segmentation)):
        raise ValueError(f"{name} has no mask; give polygons or RLE.")
    runs, outline = [], 0.0
    for part in parts:
        if isinstance(part, dict):
            runs.append(_checked_rle(part, size, name))
            continue
        try:
            corners = np.asarray(part, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):  # refused below
            corners = np.empty(0)
        # COCO's corners lie a little outside at times: as far as the image is long is allowed. pycocotools would take
        # two corners for a box.
        if corners.ndim != 1 or corners.size < 6 or corners.size % 2 or not (np.abs(corners) <= 2 * max(size)).all():
            raise ValueError(f"{name}: {short_repr(part)} is no polygon x1, y1, x2, y2, x3, y3 … near its image.")
        outline += np.abs(np.diff(corners.reshape(-1, 2), axis=0)).max(axis=1).sum()
        if outline > MAX_OUTLINE:
            raise ValueError(
                f"{name}: the outline of {short_repr(parts)} is over {MAX_OUTLINE:,} pixels long; no object's outline "
                "is that long: correct the polygons or leave the record out."
            )
        runs += coco_mask.frPyObjects([corners.tolist()], *size)
    return RleMask().encode_example(coco_mask.merge(runs))


def _checked_rle(rle: dict, size: tuple[int, int], name: str) -> dict:
    """The RLE compressed and without runs of no length, if it is one of (height, width); ValueError if not.

    pycocotools' `merge` writes past its memory where there are more runs than pixels, which takes runs of no length.
    """
    height, width = size
    if tuple(rle["size"]) != size:
        raise ValueError(
            f"{name}: the mask is {short_repr(rle['size'])}, but its image is {[height, width]} (height, width)."
        )
    with record_errors_begin_with(name, "COCO"):
        lengths = run_lengths(rle)
    filled = np.flatnonzero(lengths)
    values = filled % 2
    starts = np.flatnonzero(np.diff(values, prepend=1 - values[0]))
    lengths = np.add.reduceat(lengths[filled], starts)
    return _compress(lengths if values[0] == 0 else np.concatenate(([0], lengths)), size)


def mask_parts(segmentation: list | dict | None) -> list:
    """The polygons and RLEs of COCO's segmentation, which is a list of them or one RLE; ValueError if it is null."""
    if segmentation is None:
        raise ValueError("its mask is null; give polygons or RLE.")
    return [segmentation] if isinstance(segmentation, dict) else segmentation


def checked_bbox(bbox: Any, ann_id: int) -> list[float]:
    """The box as x, y, width and height in pixels, if it is that; ValueError if not."""
    if (
        not isinstance(bbox, list)
        or len(bbox) != 4
        or not all(type(side) in (int, float) and math.isfinite(side) for side in bbox)
    ):
        raise ValueError(
            f"ann_id {short_repr(ann_id)} has the bbox {short_repr(bbox)}; give x, y, width and height in pixels."
        )
    return [float(side) for side in bbox]


def require_in_image(mask: list | dict | None, rle: dict, bbox: list[float]) -> None:
    """Refuse polygons that draw nothing, and a box that is not in the image, with a ValueError.

    COCO has a few of both, which are read all the same. In data of one's own they are in another unit or form.

    Args:
        mask: checked polygons and RLEs, or None.
        rle: their union.
        bbox: checked x, y, width and height.
    """
    polygons = [part for part in mask_parts(mask or []) if not isinstance(part, dict)]
    (height, width), (left, top, box_width, box_height) = rle["size"], bbox
    if polygons and max(height, width) > 1 and all(0 <= side <= 1 for part in polygons for side in part):
        raise ValueError(
            f"the polygons {short_repr(polygons)} are in fractions of the image, it seems; give their corners in "
            "pixels."
        )
    if polygons and not coco_mask.area(rle):
        raise ValueError(
            f"the polygons {short_repr(polygons)} cover no pixel of their image, which is {width} x {height} (width x "
            "height); give their corners in pixels, or null if the phrases name nothing."
        )
    right, bottom = left + box_width, top + box_height
    # A box may be rounded: a pixel is allowed.
    if min(box_width, box_height) < 0 or min(left, top) < -1 or right > width + 1 or bottom > height + 1:
        raise ValueError(
            f"bbox is {short_repr(bbox)}, which is not in its image of {width} x {height} (width x height); give x, "
            "y, width and height in pixels, not x1, y1, x2, y2."
        )


def box_around(boxes: list[list[float]]) -> list[float]:
    """The smallest box around boxes of x, y, width and height; a single box as it is."""
    if len(boxes) == 1:  # what is computed below would be rounded
        return boxes[0]
    left, top = (min(box[axis] for box in boxes) for axis in (0, 1))
    right, bottom = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    return [left, top, right - left, bottom - top]


def decode_in_box(rle: dict) -> BoxedMask:
    """Decode COCO's RLE inside the mask's bounding box only, since most of an image lies outside its objects.

    Raises:
        ValueError: as `run_lengths`.
    """
    lengths = run_lengths(rle)
    if not lengths[1::2].any():  # an empty mask has no box
        return BoxedMask(np.zeros((1, 1), np.uint8), 0, 0, tuple(rle["size"]))
    left, top, width, height = coco_mask.toBbox(rle).astype(int).tolist()
    rows = rle["size"][0]  # the runs go down the columns, by turns of 0 and 1
    start, stop = left * rows, (left + width) * rows
    ends = lengths.cumsum().clip(start, stop)
    values = np.repeat((np.arange(len(ends)) % 2).astype(np.uint8), np.diff(ends, prepend=start)).reshape(width, rows)
    return BoxedMask(values[:, top : top + height].T, top, left, tuple(rle["size"]))
