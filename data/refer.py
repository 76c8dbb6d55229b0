"""Referring expressions as Hugging Face datasets: the row schema, and a reader of the official REFER layout.

A row is one referred object: an image, the object's mask and every phrase written for it. Importing this module
registers the mask's feature type with `datasets`, which is what makes `load_from_disk` and Parquet decode it again.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
from datasets.features.features import register_feature
from datasets.table import array_cast
from pycocotools import mask as coco_mask


@dataclass
class RleMask:
    """Feature type of a binary mask: stored as COCO RLE (a few hundred bytes), read as an array.

    Takes an array (H, W), zero outside the object, or an RLE `{"size": [H, W], "counts": str, bytes or list of int}`;
    gives a uint8 array (H, W) of 0 and 1, or the RLE itself when `decode=False`.
    """

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "numpy.ndarray"
    pa_type: ClassVar[Any] = pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()})
    _type: str = field(default="RleMask", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: np.ndarray | dict) -> dict:
        if not isinstance(value, dict):
            value = coco_mask.encode(np.asfortranarray(np.asarray(value) != 0, dtype=np.uint8))
        elif isinstance(value["counts"], list):
            value = coco_mask.frPyObjects(value, *value["size"])
        counts = value["counts"]
        return {
            "size": [int(side) for side in value["size"]],
            "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
        }

    def decode_example(self, value: dict | np.ndarray, token_per_repo_id: dict | None = None) -> np.ndarray:
        return coco_mask.decode(value) if isinstance(value, dict) else value  # (H, W)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        if pa.types.is_list(storage.type):  # `Dataset.map` hands back the arrays it decoded as nested lists
            masks = [None if mask is None else self.encode_example(mask) for mask in storage.to_pylist()]
            storage = pa.array(masks, self.pa_type)
        return array_cast(storage, self.pa_type)


with warnings.catch_warnings():  # `datasets` calls the function experimental each time it is used
    warnings.simplefilter("ignore")
    register_feature(RleMask, "RleMask")

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "mask": RleMask(),
        "sentences": datasets.List(datasets.Value("string")),
        "ref_id": datasets.Value("int64"),
        "ann_id": datasets.Value("int64"),
        "image_id": datasets.Value("int64"),
        "category": datasets.Value("string"),
        "bbox": datasets.List(datasets.Value("float32"), length=4),  # x, y, width, height, in pixels
    }
)
