"""Rows as strangers save them: made one by one, sound or broken, and written as data sets."""

import io
import json

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import torch

from data.masks import RleMask
from data.records import FEATURES

OUT_OF_MEMORY = [
    MemoryError("no room"),
    torch.OutOfMemoryError("CUDA out of memory"),
    pa.lib.ArrowMemoryError("no room"),
]


def make_row(ref_id, size=(6, 8), **changes):
    """A row of an image of `size` (height, width), embedded as PNG, with columns changed as asked for."""
    file = io.BytesIO()
    PIL.Image.new("RGB", size[::-1]).save(file, "PNG")
    return {
        "image": {"path": None, "bytes": file.getvalue()},
        "mask": RleMask().encode_example(np.eye(*size)),
        "sentences": ["a cat"],
        "ref_id": ref_id,
        "ann_id": ref_id,
        "image_id": 0,
        "category": "",
        "bbox": [0.0, 0.0, 1.0, 1.0],
    } | changes


SOUND = make_row(7, size=(48, 64))


def make_rows(*rows):
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def save(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def write_prepared(folder, **splits):
    """Parquet as data.prepare leaves it, whatever is in it."""
    folder.mkdir()
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    files = sorted(path.name for path in folder.iterdir())
    (folder / "summary.json").write_text(json.dumps({"files": files}))
    return str(folder)
