"""A data set in the REFER layout, written as the Hub's tables with pixels: in each schema, as Parquet and as folders.

A schema is a function that gives the rows of each split, and the types of its columns as public copies show them.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import PIL.Image
from datasets import Image, List, Value
from pycocotools import mask as coco_mask

from .other_layouts import ReferSet
from .refer_folder import HEIGHT, WIDTH, A, pixels, rectangle, rle

INT, TEXT, NUMBERS, NUMBERS_32 = Value("int64"), Value("string"), List(Value("float64")), List(Value("float32"))
RLE = {"size": List(Value("int32")), "counts": TEXT}
TRUTHS = List(List(Value("bool")))
SENTENCE = {"raw": TEXT, "sent": TEXT, "sent_id": INT, "tokens": List(TEXT)}
REF_INFO = {
    "ann_id": INT,
    "category_id": INT,
    "file_name": TEXT,
    "image_id": INT,
    "ref_id": INT,
    "sent_ids": List(INT),
    "sentences": List(SENTENCE),
    "split": TEXT,
}
ANN_INFO = {
    "area": Value("float64"),
    "bbox": NUMBERS,
    "category_id": INT,
    "id": INT,
    "image_id": INT,
    "iscrowd": INT,
    "segmentation": List(NUMBERS),
}
IMAGE_INFO = {"file_name": TEXT, "height": INT, "width": INT, "id": INT}
SAMPLE = {
    "id": INT,
    "image_id": INT,
    "category": TEXT,
    "supercategory": TEXT,
    "label": TEXT,
    "sentences": List(TEXT),
    "bbox": NUMBERS_32,
    "mask": RLE,
}
Rows = dict[str, list[dict]]  # by split


class Schema(NamedTuple):
    rows: Callable[[ReferSet], Rows]
    features: dict


def image_of(refer_set, ref):
    path = refer_set.images / refer_set.of_image[ref["image_id"]]["file_name"]
    return {"path": path.name, "bytes": path.read_bytes()}


def union(refer_set, ref):
    return np.any(refer_set.parts(ref), axis=0).astype(np.uint8)


def as_rle(mask):
    rle = coco_mask.encode(np.asfortranarray(mask))
    return rle | {"counts": rle["counts"].decode()}


def by_image(refer_set, split):
    """The refs of a split, those of an image together."""
    images = {}
    for ref in (ref for ref in refer_set.refs if ref["split"] == split):
        images.setdefault(ref["image_id"], []).append(ref)
    return list(images.values())


def by_ref(row_or_rows):
    """A schema with a row, or several, for each object."""

    def rows(refer_set):
        return {
            split: [
                row
                for ref in refer_set.refs
                if ref["split"] == split
                for row in (lambda made: made if isinstance(made, list) else [made])(row_or_rows(refer_set, ref))
            ]
            for split in refer_set.splits
        }

    return rows


def refcoco_benchmark(refer_set):
    def entry(ref):
        annotation = refer_set.of_ann[ref["ann_id"]]
        parts = annotation["segmentation"]
        polygons = None if isinstance(parts, dict) or isinstance(parts[0], dict) else parts
        sentences = [
            {"raw": one["raw"], "sent": one["sent"], "sent_id": index, "tokens": one["sent"].split()}
            for index, one in enumerate(ref["sentences"])
        ]
        return {
            "ann_info": {"area": 1.5, "iscrowd": int(polygons is None), "segmentation": polygons}
            | {"category_id": ref["category_id"]}
            | {key: annotation[key] for key in ("bbox", "id", "image_id")},
            "ref_info": {key: ref[key] for key in REF_INFO if key in ref} | {"sentences": sentences},
        }

    def row(refs):
        return {
            "image": image_of(refer_set, refs[0]),
            "image_info": refer_set.of_image[refs[0]["image_id"]],
            "ref_list": [entry(ref) for ref in refs],
        }

    return {split: [row(refs) for refs in by_image(refer_set, split)] for split in refer_set.splits}


def refcoco_m(refer_set):
    categories = {category["id"]: category["name"] for category in refer_set.instances["categories"]}

    def sample(ref):
        return {
            "id": ref["ref_id"],
            "image_id": ref["image_id"],
            "category": categories[ref["category_id"]],
            "supercategory": "thing",
            "label": ref["sentences"][0]["sent"],
            "sentences": [sentence["sent"] for sentence in ref["sentences"]],
            "bbox": refer_set.of_ann[ref["ann_id"]]["bbox"],
            "mask": as_rle(union(refer_set, ref)),
        }

    def row(refs):
        image = image_of(refer_set, refs[0])
        samples = [sample(ref) for ref in refs]
        return {"image": image, "image_id": refs[0]["image_id"], "file_name": image["path"], "samples": samples}

    return {split: [row(refs) for refs in by_image(refer_set, split)] for split in refer_set.splits}


def pbench(refer_set, ref):
    parts = [as_rle(part) for part in refer_set.parts(ref) if part.any()]
    return [
        {
            "image": image_of(refer_set, ref),
            "expression": sentence["sent"],
            "masks": parts,
            "count": len(parts),
            "id": f"{ref['ref_id']}_{index}",
        }
        for index, sentence in enumerate(ref["sentences"])
    ]


def bool_masks(refer_set, ref):
    left, top, width, height = refer_set.of_ann[ref["ann_id"]]["bbox"]
    mask = union(refer_set, ref).astype(bool).tolist()
    return [
        {
            "image": image_of(refer_set, ref),
            "text": sentence["sent"],
            "mask": mask,
            "image_id": ref["image_id"],
            "ann_id": ref["ann_id"],
            "img_height": len(mask),
            "img_width": len(mask[0]),
            "bbox": [left, top, left + width, top + height],
        }
        for sentence in ref["sentences"]
    ]


def lmms(refer_set, ref):
    parts = refer_set.of_ann[ref["ann_id"]]["segmentation"]
    crowd = isinstance(parts, dict) or isinstance(parts[0], dict)
    image = image_of(refer_set, ref)
    stem, dot, suffix = image["path"].rpartition(".")
    return {
        "question_id": str(ref["ref_id"]),
        "image": image,
        "question": "What is this?",
        "answer": [sentence["sent"] for sentence in ref["sentences"]],
        "segmentation": [0.0, 5.0, 7.0] if crowd else parts[0],
        "bbox": refer_set.of_ann[ref["ann_id"]]["bbox"],
        "iscrowd": int(crowd),
        "file_name": f"{stem}_{ref['ref_id']}{dot}{suffix}",
    }


MASK_FORMS = {  # for tables whose columns the user names: the type of a mask, and a mask (H, W) in this form
    "image": (Image(), lambda mask: {"path": None, "bytes": png(mask * np.uint8(255))}),
    "bytes": (Value("binary"), lambda mask: png(mask)),
    "rle": (RLE, as_rle),
    "rles": (List(RLE), lambda mask: [as_rle(mask)]),
    "json": (TEXT, lambda mask: json.dumps(as_rle(mask))),
    "truths": (TRUTHS, lambda mask: mask.astype(bool).tolist()),
    "digits": (List(List(Value("uint8"))), lambda mask: mask.tolist()),
}
COLUMNS = {"image": "photo", "mask": "region", "text": "captions", "ref_id": "number", "category": "kind"} | {
    name: f"the {name}" for name in ("ann_id", "image_id", "bbox")
}


def png(pixels):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def columns(form):
    """The schema of a table whose columns are those of `COLUMNS`, with masks in one of `MASK_FORMS`."""
    kind, write = MASK_FORMS[form]

    def row(refer_set, ref):
        categories = {category["id"]: category["name"] for category in refer_set.instances["categories"]}
        cells = {key: ref[key] for key in ("ref_id", "ann_id", "image_id")} | {
            "image": image_of(refer_set, ref),
            "mask": write(union(refer_set, ref)),
            "text": [sentence["sent"] for sentence in ref["sentences"]],
            "category": categories[ref["category_id"]],
            "bbox": refer_set.of_ann[ref["ann_id"]]["bbox"],
        }
        return {COLUMNS[part]: cell for part, cell in cells.items()}

    types = {"image": Image(), "mask": kind, "text": List(TEXT), "category": TEXT, "bbox": NUMBERS}
    types |= dict.fromkeys(("ref_id", "ann_id", "image_id"), INT)
    return Schema(by_ref(row), {COLUMNS[part]: feature for part, feature in types.items()})


SCHEMAS = {
    "refcoco_benchmark": Schema(
        refcoco_benchmark,
        {"image": Image(), "image_info": IMAGE_INFO, "ref_list": List({"ann_info": ANN_INFO, "ref_info": REF_INFO})},
    ),
    "refcoco_m": Schema(refcoco_m, {"image": Image(), "image_id": INT, "file_name": TEXT, "samples": List(SAMPLE)}),
    "pbench": Schema(
        by_ref(pbench),
        {"image": Image(), "expression": TEXT, "masks": List(RLE), "count": INT, "id": TEXT},
    ),
    "bool_masks": Schema(
        by_ref(bool_masks),
        {"image": Image(), "text": TEXT, "mask": TRUTHS, "bbox": NUMBERS}
        | dict.fromkeys(("image_id", "ann_id", "img_height", "img_width"), INT),
    ),
    "lmms": Schema(
        by_ref(lmms),
        {"image": Image(), "segmentation": NUMBERS_32, "bbox": NUMBERS_32, "iscrowd": Value("int8")}
        | {"answer": List(TEXT)}
        | dict.fromkeys(("question_id", "question", "file_name"), TEXT),
    ),
}


def tables(schema: Schema, rows: Rows) -> datasets.DatasetDict:
    """The rows of each split as `datasets` holds them."""
    features = datasets.Features(schema.features)
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(split_rows, features) for split, split_rows in rows.items()}
    )


def write(schema: Schema, rows: Rows, folder: Path, form: str) -> Path:
    """Write the rows as `parquet` files or as `saved` by `save_to_disk`; the path to open them by."""
    if form == "saved":
        tables(schema, rows).save_to_disk(folder)
        return folder
    (folder / "data").mkdir(parents=True)
    for split, table in tables(schema, rows).items():
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


BOX = [3.0, 4.0, 17.0, 11.0]  # of A


def sound(kind):
    """A record of A in a schema."""
    image = {"path": "COCO_train2014_000000000001.jpg", "bytes": png(np.zeros((HEIGHT, WIDTH), np.uint8))}
    mask, polygon = rle(pixels(A), compressed=True), [float(side) for side in rectangle(*A)]
    ref = {"ref_id": 7, "ann_id": 8, "image_id": 1, "category_id": 17, "sentences": [{"sent": "a cat"}]}
    annotation = {"id": 8, "image_id": 1, "category_id": 17, "segmentation": [polygon], "bbox": BOX}
    sample = {"id": 7, "image_id": 1, "category": "cat", "sentences": ["a cat"], "bbox": BOX, "mask": mask}
    cells = {
        "refcoco_benchmark": {
            "image_info": {"height": HEIGHT, "width": WIDTH},
            "ref_list": [{"ann_info": annotation, "ref_info": ref}],
        },
        "refcoco_m": {"image_id": 1, "file_name": image["path"], "samples": [sample]},
        "pbench": {"expression": "a cat", "masks": [mask], "count": 1, "id": "x"},
        "bool_masks": {"text": "a cat", "mask": pixels(A).astype(bool).tolist(), "image_id": 1, "ann_id": 8},
        "lmms": {"answer": ["a cat"], "segmentation": polygon, "bbox": BOX, "iscrowd": 0, "file_name": image["path"]},
    }
    return {"image": image} | cells[kind]


def changed(record, place, value):
    """The record with another value at a place such as `samples.0.mask.size`, or, as `...`, without it."""
    first, _, rest = place.partition(".")
    copy = list(record) if isinstance(record, list) else dict(record)
    key = int(first) if isinstance(record, list) else first
    if rest:
        copy[key] = changed(record[key], rest, value)
    elif value is ...:
        del copy[key]
    else:
        copy[key] = value
    return copy
