"""Rows of the synthetic set: `load_shapes` draws its splits in memory."""

from collections.abc import Iterator
from itertools import groupby

import cv2
import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from PIL import Image

from ..records import FEATURES
from .composition import check_arguments, draw_scene
from .drawing import render
from .scenes import DEFAULT_SIZES, ID_STRIDE, MAX_IMAGES, MAX_OBJECTS, REFERENCE_SIZE


def load_shapes(
    seed: int = 0,
    sizes: dict[str, int] | None = None,
    image_size: int = REFERENCE_SIZE,
    max_objects: int = MAX_OBJECTS,
    object_scale: float = 1.0,
) -> datasets.DatasetDict:
    """Draw the synthetic set in memory: a row of `data/records.py` for each object that phrases refer to.

    The splits are train and val, testA (attributes and positions), testB (relations, superlatives and ordinals), and
    unseen (objects of the pairs in `HELD_OUT`).

    Args:
        seed: each seed gives another set.
        sizes: numbers of images of the splits that shall differ from `DEFAULT_SIZES`.
        image_size: side of the square images in pixels; the scenes scale with it.
        max_objects: the largest number of objects in a scene; the smallest is two.
        object_scale: factor on the objects' size in the image.

    Raises:
        ValueError: a split is unknown, a size negative, or a number out of range or of another type.
    """
    if type(seed) is not int:
        raise ValueError(f"seed is {seed!r}; give a whole number.")
    if not isinstance(sizes, dict | None):
        raise ValueError(f"sizes is {sizes!r}; give a mapping of splits to numbers of images.")
    sizes = DEFAULT_SIZES | (sizes or {})
    for split, count in sizes.items():
        check_arguments(split, image_size, max_objects, object_scale, count)
    splits = {}
    for split, count in sizes.items():
        tables = [FEATURES.arrow_schema.empty_table()]
        images = generate_rows(seed, split, count, image_size, max_objects, object_scale)
        for _, group in groupby(images, key=lambda row: row["image_id"]):
            rows = list(group)
            image = {"bytes": _png(rows[0]["image"]), "path": None}
            rows = [FEATURES.encode_example(row | {"image": image}) for row in rows]
            tables.append(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema))
        # Without a given fingerprint, `datasets` would pickle all pictures to compute one. It need not change with
        # this code, because rows in memory have no cache files.
        fingerprint = Hasher.hash(("shapes", seed, split, count, image_size, max_objects, object_scale))
        splits[split] = datasets.Dataset(pa.concat_tables(tables), fingerprint=fingerprint)
    return datasets.DatasetDict(splits)


def generate_rows(
    seed: int,
    split: str,
    count: int,
    image_size: int = REFERENCE_SIZE,
    max_objects: int = MAX_OBJECTS,
    object_scale: float = 1.0,
) -> Iterator[dict]:
    """Rows of the split's first `count` images, one for each object that phrases refer to; columns as in `FEATURES`.

    `image` is a PIL image, the same object in all rows of an image; `mask` (S, S) uint8 of 0 and 1; `category` the
    shape. `image_id`, `ann_id` and `ref_id` are unique over the splits and do not depend on `count`.
    """
    check_arguments(split, image_size, max_objects, object_scale, count)
    offset = list(DEFAULT_SIZES).index(split) * MAX_IMAGES
    for image_index in range(count):
        scene = draw_scene(seed, split, image_index, image_size, max_objects, object_scale)
        pixels, labels = render(scene)
        image = Image.fromarray(pixels)
        for index, phrases in enumerate(scene.phrases):
            if not phrases:
                continue
            mask = (labels == index + 1).astype(np.uint8)
            image_id = offset + image_index
            ann_id = image_id * ID_STRIDE + index
            yield {
                "image": image,
                "mask": mask,
                "sentences": [phrase.text for phrase in phrases],
                "ref_id": ann_id,
                "ann_id": ann_id,
                "image_id": image_id,
                "category": scene.objects[index].shape,
                "bbox": [float(side) for side in cv2.boundingRect(mask)],
            }


def _png(image: Image.Image) -> bytes:
    return cv2.imencode(".png", np.asarray(image)[..., ::-1])[1].tobytes()
