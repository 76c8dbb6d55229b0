"""The schemas of published tables: REFER's rows come back out of each, and broken cells are named with a remedy."""

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hub_client import run_client
from helpers.hub_server import HubServer
from helpers.other_layouts import ReferSet, assert_same_rows, small_set
from helpers.refer_folder import HEIGHT, HOSTILE_RLES, MINI, WIDTH, A, B, pixels, rectangle, rle
from helpers.table_writers import COLUMNS, MASK_FORMS, SCHEMAS, by_image, columns, png, union, write
from pycocotools import mask as coco_mask

from data.masks import union_of_parts
from data.records import FEATURES, NO_TARGET, load_records
from data.refer import load_refer
from data.sources import open_records
from data.table_layouts import TABLE_LAYOUTS, ColumnsLayout, Place, mask_of, recognised

SIZE = (HEIGHT, WIDTH)


def coco_named(refer_set):
    """The small set, with images that are named as COCO's, by which tables without an image_id tell them."""
    for image in refer_set.instances["images"]:
        path = refer_set.images / image["file_name"]
        image["file_name"] = f"COCO_train2014_{image['id']:012d}.jpg"
        PIL.Image.open(path).save(refer_set.images / image["file_name"])
    (refer_set.refer / "refcoco" / "instances.json").write_text(__import__("json").dumps(refer_set.instances))
    return refer_set


@pytest.fixture(params=["small", "refer_mini"])
def refer_set(request, tmp_path):
    if request.param == "small":
        return coco_named(small_set(tmp_path))
    if not MINI.exists():
        pytest.skip("needs the photographs of ../shared/refer_mini")
    return ReferSet(MINI, "refcoco/unc")


def only_polygons(refer_set):
    """Leave out the objects whose masks are RLE, which lists of numbers cannot hold."""
    refer_set.refs = [ref for ref in refer_set.refs if has_polygons(refer_set, ref)]
    refer_set.splits = [split for split in refer_set.splits if any(ref["split"] == split for ref in refer_set.refs)]


def has_polygons(refer_set, ref):
    parts = refer_set.of_ann[ref["ann_id"]]["segmentation"]
    return isinstance(parts, list) and all(isinstance(part, list) for part in parts)


# --- what each schema keeps of REFER's rows -----------------------------------------------------------------------


def float32(bbox):
    return np.float32(bbox).astype(float).tolist()


def keeps_all(refer_set, ref, row):
    return [row]


def keeps_of_refcoco_m(refer_set, ref, row):
    return [row | {"ann_id": ref["ref_id"], "bbox": float32(row["bbox"])}]


def keeps_of_pbench(refer_set, ref, row):
    several = sum(part.any() for part in refer_set.parts(ref)) != 1
    lost = {"ann_id": NO_TARGET if several else None, "category": "", "bbox": box_around(row["mask"]), "ref_id": None}
    return [row | lost | {"sentences": [sentence]} for sentence in row["sentences"]]


def keeps_of_bool_masks(refer_set, ref, row):
    left, top, width, height = row["bbox"]
    corners = [left, top, (left + width) - left, (top + height) - top]  # as it was written, which rounds
    return [row | {"category": "", "bbox": corners, "ref_id": None}]


def keeps_of_lmms(refer_set, ref, row):
    first = np.float32(refer_set.of_ann[ref["ann_id"]]["segmentation"][0]).astype(float).tolist()
    (mask,) = np.moveaxis(coco_mask.decode(coco_mask.frPyObjects([first], *row["mask"].shape)), 2, 0)
    return [row | {"mask": mask, "ann_id": None, "ref_id": None, "category": "", "bbox": float32(row["bbox"])}]


def box_around(mask):
    if not mask.any():
        return [0.0] * 4
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return [float(side) for side in (left, top, right - left, bottom - top)]


KEEPS = {
    "refcoco_benchmark": keeps_all,
    "refcoco_m": keeps_of_refcoco_m,
    "pbench": keeps_of_pbench,
    "bool_masks": keeps_of_bool_masks,
    "lmms": keeps_of_lmms,
}


def expected(refer_set, keep, grouped):
    """REFER's rows as a schema keeps them; numbers that it has lost, here None, count the records."""
    theirs = load_refer(refer_set.refer, *refer_set.name.split("/")).cast_column("image", datasets.Image(decode=False))
    of_ref = {row["ref_id"]: row for rows in theirs.values() for row in rows}
    splits, number = {}, 0
    for split in sorted(refer_set.splits, key=lambda split: ("train", "val", "test", "testA", "testB").index(split)):
        refs = [ref for ref in refer_set.refs if ref["split"] == split]
        if grouped:
            refs = [ref for refs in by_image(refer_set, split) for ref in refs]
        splits[split] = []
        for row in (row for ref in refs for row in keep(refer_set, ref, of_ref[ref["ref_id"]])):
            ref_id = number if row["ref_id"] is None else row["ref_id"]
            splits[split].append(
                row | {"ref_id": ref_id, "ann_id": ref_id if row["ann_id"] is None else row["ann_id"]}
            )
            number += 1
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows, features=FEATURES) for split, rows in splits.items()}
    )


def written(refer_set, kind, folder, form="parquet", prefix=""):
    if kind in ("refcoco_benchmark", "lmms"):
        only_polygons(refer_set)
    rows = SCHEMAS[kind].rows(refer_set)
    return write(SCHEMAS[kind], {prefix + split: split_rows for split, split_rows in rows.items()}, folder, form)


@pytest.mark.parametrize("form", ["parquet", "saved"])
@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_gives_the_rows_that_it_keeps(refer_set, tmp_path, kind, form):
    if refer_set.refer == MINI and form == "saved":
        pytest.skip("one form of the photographs is enough")
    path = written(refer_set, kind, tmp_path / "table", form)
    records = open_records("table", path)
    grouped = kind in ("refcoco_benchmark", "refcoco_m")
    assert_same_rows(load_records(records), expected(refer_set, KEEPS[kind], grouped))
    assert len(open_records(kind, path)) == len(records)
    with pytest.raises(ValueError, match="has no columns"):
        open_records("pbench" if kind == "lmms" else "lmms", path)


@pytest.mark.parametrize("form", MASK_FORMS)
def test_columns_that_the_user_names_give_equal_rows(tmp_path, form):
    refer_set, schema = coco_named(small_set(tmp_path)), columns(form)
    path = write(schema, schema.rows(refer_set), tmp_path / "table", "parquet")
    assert_same_rows(load_records(open_records("table", path, columns=COLUMNS)), expected(refer_set, keeps_all, False))
    with pytest.raises(ValueError, match="of no known layout.*--columns image=… mask=… text=…"):
        open_records("table", path)
