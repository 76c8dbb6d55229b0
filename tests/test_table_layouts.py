"""The schemas of published tables: REFER's rows come back out of each, and broken cells are named with a remedy."""

import json

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
from helpers.table_writers import BOX, COLUMNS, MASK_FORMS, SCHEMAS, by_image, changed, columns, png, sound, write
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
    (refer_set.refer / "refcoco" / "instances.json").write_text(json.dumps(refer_set.instances))
    return refer_set


@pytest.fixture(params=["small", pytest.param("refer_mini", marks=pytest.mark.slow)])
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


def expected_of(refer_set, kind):
    if kind in ("refcoco_benchmark", "lmms"):
        only_polygons(refer_set)
    return expected(refer_set, KEEPS[kind], grouped=kind in ("refcoco_benchmark", "refcoco_m"))


def written(refer_set, kind, folder, form="parquet", prefix=""):
    if kind in ("refcoco_benchmark", "lmms"):
        only_polygons(refer_set)
    rows = SCHEMAS[kind].rows(refer_set)
    return write(SCHEMAS[kind], {prefix + split: split_rows for split, split_rows in rows.items()}, folder, form)


@pytest.mark.parametrize("form", ["parquet", "saved"])
@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_gives_the_rows_that_it_keeps(refer_set, tmp_path, kind, form):
    path = written(refer_set, kind, tmp_path / "table", form)
    records = open_records("table", path)
    assert_same_rows(load_records(records), expected_of(refer_set, kind))
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


FROM_THE_HUB = """
import sys
from data.records import load_records
from data.sources import open_records

for kind in sys.argv[1:] or KINDS:
    name = "refcoco/unc" if kind == "refcoco_benchmark" else ""
    load_records(open_records("table", f"hub:someone/{kind}", name)).save_to_disk(f"read/{kind}")
"""


@pytest.mark.slow
def test_the_same_tables_are_read_from_the_hub(tmp_path):
    wanted = {}
    with HubServer() as server:
        for kind in SCHEMAS:
            mini = ReferSet(MINI, "refcoco/unc") if MINI.exists() else None
            refer_set = mini or coco_named(small_set(tmp_path / kind))
            wanted[kind] = expected_of(refer_set, kind)
            prefix = "refcoco_unc_" if kind == "refcoco_benchmark" else ""
            root = written(refer_set, kind, tmp_path / kind / "table", prefix=prefix)
            files = {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*.parquet")}
            server.publish(f"datasets/someone/{kind}", files)
        run_client(f"KINDS = {list(SCHEMAS)}\n{FROM_THE_HUB}", server, tmp_path, isolated=False)
    for kind in SCHEMAS:
        assert_same_rows(datasets.load_from_disk(str(tmp_path / "read" / kind)), wanted[kind])


# --- broken and odd cells -----------------------------------------------------------------------------------------


def open_table(folder, *records, **options):
    pq.write_table(pa.Table.from_pylist(list(records)), folder / "table-0.parquet")
    return open_records("table", folder / "table-0.parquet", **options)


def read_changed(folder, kind, place, value):
    """The row of a sound record that is changed in one place."""
    (split, row) = open_table(folder, changed(sound(kind), place, value)).read(0)
    return row


ANNOTATION, REF, SAMPLE = "ref_list.0.ann_info", "ref_list.0.ref_info", "samples.0"
ANOTHER_SIZE = {"size": [10, 10], "counts": "T3"}
BROKEN = [
    ("refcoco_benchmark", "ref_list", [], r"ref_list is \[\]; give a list of the objects"),
    ("refcoco_benchmark", "ref_list", None, r"refcoco_benchmark \(the column ref_list holds null; it should"),
    ("refcoco_benchmark", "ref_list", "/etc/passwd", "the column ref_list holds string; it should hold lists"),
    ("refcoco_benchmark", "ref_list.0", {"x": 1}, "ann_info is None; give an object with its fields"),
    ("refcoco_benchmark", ANNOTATION, 7, "ann_info is 7; give an object"),
    ("refcoco_benchmark", REF, ..., "ref_info is None; give an object"),
    ("refcoco_benchmark", f"{ANNOTATION}.segmentation", None, "null or empty, as it is for crowds.*leave the object"),
    ("refcoco_benchmark", f"{ANNOTATION}.segmentation", ..., "null or empty, as it is for crowds"),
    ("refcoco_benchmark", f"{ANNOTATION}.segmentation", [[1.0, 2.0]], "is no polygon x1, y1"),
    ("refcoco_benchmark", f"{ANNOTATION}.segmentation", [["1", "2", "3", "4", "5", "6"]], "give polygons of numbers"),
    ("refcoco_benchmark", f"{ANNOTATION}.image_id", 2, "image_id is 2 and also 1; correct one"),
    ("refcoco_benchmark", f"{ANNOTATION}.id", 9, "ann_id is 9 and also 8"),
    ("refcoco_benchmark", f"{ANNOTATION}.category_id", 18, "category_id is 18 and also 17"),
    ("refcoco_benchmark", f"{ANNOTATION}.bbox", [1.0], "give x, y, width and height"),
    ("refcoco_benchmark", "image_info.height", 31, "image_info says height 31, but the image has 30 pixels"),
    ("refcoco_benchmark", f"{REF}.sentences", None, "sentences is None; give a list of objects with the field sent"),
    ("refcoco_benchmark", f"{REF}.sentences", ["a cat"], "give a list of objects with the field sent"),
    ("refcoco_benchmark", f"{REF}.sentences", [{"raw": "a cat"}], "a phrase is None; give text"),
    ("refcoco_benchmark", f"{REF}.ref_id", "first", "ref_id is 'first'; give a whole number"),
    ("refcoco_m", "samples", [], r"samples is \[\]; give a list of the objects"),
    ("refcoco_m", "samples", [None], "holds null|samples.0. is None; give an object"),
    ("refcoco_m", "samples", {"id": 7}, "the column samples holds struct"),
    ("refcoco_m", f"{SAMPLE}.mask", None, "mask holds None; give COCO's RLE"),
    ("refcoco_m", f"{SAMPLE}.mask", "/etc/passwd", "no JSON; no file of that name is opened"),
    ("refcoco_m", f"{SAMPLE}.mask", ANOTHER_SIZE, r"an RLE of \[10, 10\], but its image is \[30, 40\]"),
    ("refcoco_m", f"{SAMPLE}.mask.counts", "~~~~", "not COCO's compressed counts; write them with pycocotools"),
    ("refcoco_m", f"{SAMPLE}.mask.counts", None, "give COCO's RLE, an object with size and counts"),
    ("refcoco_m", f"{SAMPLE}.mask.counts", "0" * 10**5, "RLE of 100,000 counts for 1,200 pixels; write it anew"),
    ("refcoco_m", f"{SAMPLE}.image_id", 2, "image_id is 1 and also 2"),
    ("refcoco_m", f"{SAMPLE}.sentences", None, "sentences is None; give a phrase or a list of phrases"),
    ("refcoco_m", f"{SAMPLE}.category", 7, "the category is 7; give text"),
    ("pbench", "expression", None, "expression is None; give a phrase"),
    ("pbench", "expression", "  ", "is empty; write it or remove it"),
    ("pbench", "count", 2, "count is 2, but there are 1 masks; correct one"),
    ("pbench", "count", 1.5, "count is 1.5, but there are 1"),
    ("pbench", "masks", [], "count is 1, but there are 0"),
    ("pbench", "masks", "../x", "masks is '../x'; give a list of RLEs"),
    ("pbench", "masks", [7], "masks holds 7; give COCO's RLE"),
    ("pbench", "masks", [ANOTHER_SIZE], r"masks holds an RLE of \[10, 10\]"),
    ("bool_masks", "text", 7, "text is 7; give a phrase"),
    ("bool_masks", "mask", [[True, False], [True]], "rows of 1 to 2 values; give all the image's 40"),
    ("bool_masks", "mask", [[True] * 30] * 40, r"is 40 x 30 values \(height x width\), but its image is 30 x 40"),
    ("bool_masks", "mask", [[1] * 40] * 29 + [[2] * 40], r"the row \[2, .*give truth values, or 0 outside and 1"),
    ("bool_masks", "mask", [rectangle(*A)], "If it is a mask in another form, name the columns.*--columns image=…"),
    ("bool_masks", "mask", [["x"] * 40] * 30, "give nested lists"),
    ("bool_masks", "mask", [[None] * 40] * 30, "give nested lists"),
    ("bool_masks", "mask", [[True] * 40] * 29 + [[None] * 40], "give truth values"),
    ("bool_masks", "mask", [True, False], "give nested lists"),
    ("bool_masks", "mask", "http://localhost/x.png", "no JSON; no file of that name is opened"),
    ("bool_masks", "mask", {"path": "/etc/passwd", "bytes": None}, "only a path, '/etc/passwd', which is not opened"),
    ("bool_masks", "mask", b"not an image", "embedded mask cannot be read .it is no PNG"),
    ("bool_masks", "bbox", [1.0, 2.0], "give x, y, width and height"),
    ("lmms", "answer", None, "answer is None; give a phrase"),
    ("lmms", "answer", [], "there are no phrases"),
    ("lmms", "segmentation", None, "segmentation is None; give one polygon"),
    ("lmms", "segmentation", [[1.0, 2.0]], "give one polygon"),
    ("lmms", "segmentation", [1.0, 2.0, 3.0], "is no polygon x1, y1"),
    ("lmms", "segmentation", [float("nan")] * 6, "is no polygon x1, y1"),
    ("lmms", "iscrowd", 1, "the mask of a crowd is no polygon; leave the object out"),
]


@pytest.mark.parametrize("kind,place,value,reason", BROKEN, ids=[f"{kind}-{place}" for kind, place, *_ in BROKEN])
def test_a_broken_cell_is_named_with_its_record_and_a_remedy(tmp_path, kind, place, value, reason):
    with pytest.raises((ValueError, OSError), match=reason) as caught:
        read_changed(tmp_path, kind, place, value)
    assert "table-0.parquet, split table" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_needed_column_that_is_missing_is_named(tmp_path, kind):
    for column in TABLE_LAYOUTS[kind].needed:
        record = changed(sound(kind), column, ...)
        with pytest.raises(ValueError, match=rf"has no columns \['{column}'\], which the layout {kind} needs"):
            pq.write_table(pa.Table.from_pylist([record]), tmp_path / "x-0.parquet")
            open_records(kind, tmp_path / "x-0.parquet")


LIBERAL = [  # what is read all the same: the column of the row, and what it then holds
    ("refcoco_benchmark", f"{REF}.ref_id", "7", "ref_id", 7),
    ("refcoco_benchmark", f"{REF}.ref_id", 7.0, "ref_id", 7),
    ("refcoco_benchmark", f"{REF}.ref_id", ..., "ref_id", 0),
    ("refcoco_benchmark", f"{REF}.ann_id", None, "ann_id", 8),
    ("refcoco_benchmark", f"{ANNOTATION}.image_id", ..., "image_id", 1),
    ("refcoco_benchmark", f"{ANNOTATION}.bbox", None, "bbox", BOX),
    ("refcoco_benchmark", "image_info", {"width": "40", "file_name": "../../x.jpg"}, "image_id", 1),
    ("refcoco_m", f"{SAMPLE}.sentences", "a cat", "sentences", ["a cat"]),
    ("refcoco_m", f"{SAMPLE}.bbox", [0.25, 0.5, 0.5, 0.5], "bbox", [10.0, 15.0, 20.0, 15.0]),
    ("refcoco_m", f"{SAMPLE}.mask", json.dumps(rle(pixels(A))), "bbox", BOX),
    ("refcoco_m", "image_id", float("nan"), "image_id", 1),
    ("pbench", "count", None, "ref_id", 0),
    ("pbench", "count", "1", "ref_id", 0),
    ("pbench", "masks", [json.dumps(rle(pixels(A)))], "bbox", BOX),
    ("bool_masks", "mask", pixels(A).tolist(), "bbox", BOX),
    ("bool_masks", "mask", {"bytes": png(pixels(A)), "path": "/etc/passwd"}, "bbox", BOX),
    ("bool_masks", "mask", [], "ann_id", 8),
    ("bool_masks", "ann_id", "8", "ann_id", 8),
    ("bool_masks", "ann_id", "8_9", "ann_id", NO_TARGET),
    ("bool_masks", "ann_id", [8], "ann_id", 8),
    ("bool_masks", "ann_id", [8, 9], "ann_id", NO_TARGET),
    ("bool_masks", "ann_id", "the first", "ann_id", 0),
    ("bool_masks", "image_id", "12", "image_id", 12),
    ("bool_masks", "image_id", "photo_3", "image_id", 1),  # the number in the image's name
    ("bool_masks", "bbox", [3, 4, 20, 15], "bbox", BOX),
    ("bool_masks", "bbox", [], "bbox", BOX),
    ("bool_masks", "text", ["a cat", "the cat"], "sentences", ["a cat", "the cat"]),
    ("lmms", "file_name", "COCO_train2014_000000581857_16.jpg", "image_id", 581857),
    ("lmms", "file_name", None, "image_id", 1),
    ("lmms", "iscrowd", ..., "bbox", BOX),
    ("lmms", "answer", "a cat", "sentences", ["a cat"]),
]


@pytest.mark.parametrize("kind,place,value,column,given", LIBERAL)
def test_an_odd_cell_is_read_all_the_same(tmp_path, kind, place, value, column, given):
    assert read_changed(tmp_path, kind, place, value)[column] == given


def test_no_mask_of_pbench_names_nothing_and_several_are_one(tmp_path):
    none = sound("pbench") | {"masks": None, "count": 0}
    two = sound("pbench") | {"masks": [rle(pixels(mask), compressed=True) for mask in (A, B)], "count": 2}
    records = open_table(tmp_path, sound("pbench"), none, two)
    rows = [records.read(index)[1] for index in range(3)]
    for row, mask, ann_id in zip(rows, (pixels(A), pixels(), pixels(A, B)), (0, NO_TARGET, NO_TARGET)):
        np.testing.assert_array_equal(coco_mask.decode(row["mask"]), mask)
        assert row["ann_id"] == ann_id


def test_adjacent_rows_of_one_object_are_one_record(tmp_path):
    def row(text, **changes):
        return sound("bool_masks") | {"text": text} | changes

    other_mask = pixels(B).astype(bool).tolist()
    rows = [row("one"), row("two"), row("three", mask=other_mask), row("four", ann_id=9), row("five", image_id=2)]
    rows += [row("six"), row("seven", ann_id=None), row("eight", ann_id=None)]
    records = open_table(tmp_path, *rows)
    phrases = [records.read(index)[1]["sentences"] for index in range(len(records))]
    assert phrases == [["one", "two"], ["three"], ["four"], ["five"], ["six"], ["seven"], ["eight"]]
    table = datasets.Dataset.from_list([{"mask": [[True]], "text": "a"}] * 2)
    assert TABLE_LAYOUTS["bool_masks"].places(table) == [Place(0), Place(1)]


def test_objects_of_a_row_are_counted_and_rows_without_any_are_refused_one_by_one(tmp_path):
    record = sound("refcoco_benchmark")
    several = record | {"ref_list": [record["ref_list"][0], changed(record, f"{REF}.ref_id", 5)["ref_list"][0]]}
    records = open_table(tmp_path, several, record | {"ref_list": None}, record | {"ref_list": []}, record)
    assert len(records) == 5 and [records.read(index)[1]["ref_id"] for index in (0, 1, 4)] == [7, 5, 7]
    for index in (2, 3):
        with pytest.raises(ValueError, match=rf"row {index - 1}: ref_list is .*; give a list of the objects"):
            records.read(index)


def test_own_columns_have_names_that_are_known(tmp_path):
    for named, reason in (
        ({}, "the column of image, mask, text is not named"),
        ({"image": "a", "mask": "b"}, "the column of text is not named"),
        ({"image": "a", "mask": "b", "text": "c", "caption": "d"}, "nothing is called caption"),
    ):
        with pytest.raises(ValueError, match=f"{reason}.*--columns image=… mask=… text=…"):
            ColumnsLayout(named)
    layout = ColumnsLayout({"image": "a", "mask": "b", "text": "c", "image_id": "d"})
    assert layout.image == "a" and layout.needed == ("a", "b", "c", "d")


@pytest.mark.parametrize("text", ['["a", "b"]', "['a', \"b's\", 'c']", "[ 'a' ]\n", "[]"])
def test_a_list_of_phrases_is_no_text(text):
    layout = ColumnsLayout({"image": "a", "mask": "b", "text": "c"})
    with pytest.raises(ValueError, match="c is a list that is written as text, .*; give a list of phrases"):
        layout.read([{"b": None, "c": text}], 0, SIZE)
    for phrase in ("[the cat]", "'a' [2]", "[left] 'x'", '"the cat"'):
        assert layout.read([{"b": None, "c": phrase}], 0, SIZE)["sentences"] == [phrase]


def test_the_layout_is_recognised_by_its_columns():
    for kind, schema in SCHEMAS.items():
        assert recognised(schema.features).name == kind
        assert recognised([*TABLE_LAYOUTS[kind].needed, "more"]).name == kind
    with pytest.raises(ValueError) as caught:
        recognised(["image", "masks"])
    for kind, missing in (("refcoco_m", "samples"), ("pbench", "expression"), ("lmms", "answer and segmentation")):
        assert f"for {kind} {missing}" in str(caught.value)


# --- masks in every form ------------------------------------------------------------------------------------------


def decoded(value, size=SIZE):
    return coco_mask.decode(union_of_parts(mask_of(value, size), size, "it"))


@pytest.mark.parametrize("form", MASK_FORMS)
def test_a_mask_is_the_same_in_every_form(form):
    mask = pixels(A, (30, 0, WIDTH, HEIGHT))
    np.testing.assert_array_equal(decoded(MASK_FORMS[form][1](mask)), mask)


def test_polygons_are_their_pixels():
    for value in ([rectangle(*A)], rectangle(*A), [float(side) for side in rectangle(*A)], json.dumps(rectangle(*A))):
        np.testing.assert_array_equal(decoded(value), pixels(A))
    np.testing.assert_array_equal(decoded([rectangle(*A), rectangle(*B)]), pixels(A, B))
    np.testing.assert_array_equal(decoded([rle(pixels(A)), rle(pixels(B))]), pixels(A, B))
    assert not decoded([[0, 0, 1, 0, 1, 1]], (9, 9)).any()  # a polygon of half a pixel, since the image is larger
    assert decoded([[0, 0, 5, 0, 5, 5]], (1, 6)).shape == (1, 6)
    # Of the image's size, it is a mask of its values.
    assert decoded([[0, 0, 1, 0, 1, 1]], (1, 6)).tolist() == [[0, 0, 1, 0, 1, 1]]


@pytest.mark.parametrize("value", [None, [], pixels().tolist(), pixels().astype(bool), png(pixels()), {"bytes": None}])
def test_no_mask_names_nothing(value):
    assert mask_of(value, SIZE) is None


REFUSED = [rle for rle, _ in HOSTILE_RLES] + [
    "/etc/passwd",
    "http://localhost/mask.png",
    {"path": "mask.png", "bytes": None},
    b"",
    png(pixels()[1:]),
    png(pixels(A))[:-30],
    True,
    7,
    float("nan"),
    {},
    [None],
    [[]],
    [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]],
    ["a", "b"],
    [["1", "2", "3", "4", "5", "6"]],
    [rectangle(*A), {"size": [1, 1], "counts": "1"}],
    [float("nan")] * 6,
    [1e300] * 6,
    [10**400] * 6,
    [[True, False], [True]],
    [[True] * WIDTH] * (HEIGHT - 1),
    [[True] * WIDTH] * (HEIGHT - 1) + [[True] * (WIDTH - 1) + ["x" * 10**6]],
    [[0.5] * WIDTH] * HEIGHT,
    [[0] * WIDTH] * (HEIGHT - 1) + [[255] * WIDTH],
    [[5] * WIDTH] * HEIGHT + [[5]],
    [1.0] * 2_000_002,
    "[" * 10**6,
    "9" * 10**5,
    {"size": [HEIGHT, WIDTH], "counts": [0] * 10**4},
    {"size": [HEIGHT, WIDTH], "counts": [0.5, 1199.5]},
    {"size": "30", "counts": "1"},
]


@pytest.mark.parametrize("value", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_mask_is_refused_in_one_sentence(value):
    with pytest.raises((ValueError, OSError)) as caught:
        decoded(value)
    assert 10 < len(str(caught.value)) < 700 and "\n" not in str(caught.value)
