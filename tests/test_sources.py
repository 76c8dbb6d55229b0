"""The readers of other layouts: the same data gives equal rows in each, and broken records are named with a reason."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.other_layouts import ReferSet, assert_same_rows, open_lines, small_set
from helpers.refer_folder import (
    HEIGHT,
    MINI,
    ROOT,
    WIDTH,
    A,
    B,
    not_waiting,
    pixels,
    rectangle,
    rle,
)

from data import sources
from data.coco_names import COCO_CATEGORIES
from data.records import FEATURES, load_records
from data.refer import load_refer
from data.sources import open_records


@pytest.fixture(params=["small", "refcoco/unc", "refcoco+/unc", "refcocog/umd", "refcocog/google"])
def refer_set(request, tmp_path):
    if request.param == "small":
        return small_set(tmp_path)
    if not MINI.exists():
        pytest.skip("needs the photographs of ../shared/refer_mini")
    return ReferSet(MINI, request.param)


def test_refer_opens_as_load_refer_reads_it(refer_set):
    records = open_records("refer", refer_set.refer, refer_set.name)
    assert records.name == refer_set.name and len(records) == len(refer_set.refs)
    assert_same_rows(load_records(records), load_refer(refer_set.refer, *refer_set.name.split("/")))


@pytest.mark.parametrize("layout", ["hub_table", "folder", "nested folder"])
def test_a_layout_that_holds_everything_gives_equal_rows(refer_set, tmp_path, layout):
    if layout == "hub_table":
        arguments = refer_set.write_hub_table(tmp_path / "out")
    else:
        arguments = refer_set.write_folder(tmp_path / "out", nested=layout != "folder")
    ours = load_records(open_records(**arguments))
    theirs = load_refer(refer_set.refer, *refer_set.name.split("/"))
    assert_same_rows(datasets.DatasetDict({split: ours[split] for split in theirs}), theirs)


def test_cris_gives_equal_rows_but_for_what_it_cut(refer_set, tmp_path):
    ours = load_records(open_records(**refer_set.write_cris(tmp_path / "out")))
    theirs = load_refer(refer_set.refer, *refer_set.name.split("/"))
    small = {"first.jpg": -1, "second.png": -2}

    def cut(row):
        image_id = small.get(Path(row["image"]["path"]).name, row["image_id"])
        return {"ann_id": row["ref_id"], "bbox": np.trunc(row["bbox"]).tolist(), "image_id": image_id}

    plain = theirs.cast_column("image", datasets.Image(decode=False))
    expected = {
        split: datasets.Dataset.from_list([row | cut(row) for row in rows], features=FEATURES)
        for split, rows in plain.items()
    }
    assert_same_rows(datasets.DatasetDict({split: ours[split] for split in theirs}), datasets.DatasetDict(expected))


def test_reading_depends_on_the_index_alone(refer_set, tmp_path):
    for arguments in (
        refer_set.write_cris(tmp_path / "cris"),
        refer_set.write_hub_table(tmp_path / "hub"),
        refer_set.write_folder(tmp_path / "mine"),
    ):
        records = open_records(**arguments)
        assert len(records) == len(refer_set.refs)
        again = open_records(**arguments)
        backwards = [again.read(index) for index in reversed(range(len(again)))]
        assert [records.read(index) for index in range(len(records))] == backwards[::-1]
        for _, row in backwards:
            assert os.path.isabs(row["image"]) and isinstance(row["mask"]["counts"], str)
        assert records.fingerprint == again.fingerprint


def test_coco_categories():
    if not MINI.exists():
        pytest.skip("needs ../shared/refer_mini")
    categories = json.loads((MINI / "refcoco" / "instances.json").read_text())["categories"]
    assert {category["id"]: category["name"] for category in categories} == COCO_CATEGORIES


def test_a_hub_table_by_its_id_and_from_the_hubs_cache(tmp_path, monkeypatch):
    refer_set = small_set(tmp_path)
    arguments = refer_set.write_hub_table(tmp_path / "out")
    asked = []
    monkeypatch.setattr(
        sources, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(tmp_path / "out")
    )
    monkeypatch.chdir(tmp_path)
    records = open_records("hub_table", "jxu124/refcoco", images=refer_set.images)
    assert asked == [("jxu124/refcoco", {"repo_type": "dataset", "allow_patterns": "*.parquet"})]
    assert records.name == "jxu124/refcoco" and records.fingerprint
    theirs = load_refer(refer_set.refer, "refcoco", "unc")
    ours = load_records(records)
    assert_same_rows(datasets.DatasetDict({split: ours[split] for split in theirs}), theirs)
    with pytest.raises(ValueError, match="Say where COCO's train2014 is"):
        open_records("hub_table", "jxu124/refcoco")

    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123", tmp_path / "hub" / "blobs"
    (snapshot / "data").mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate((tmp_path / "out" / "data").iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / "data" / path.name).symlink_to(f"../../../blobs/{number}")
    assert len(open_records("hub_table", snapshot, images=refer_set.images)) == len(open_records(**arguments))


def test_unknown_layouts_and_names(tmp_path):
    with pytest.raises(ValueError, match="choose from refer, cris, hub_table, folder"):
        open_records("lmdb", tmp_path)
    with pytest.raises(
        ValueError, match="'refcoco' does not say who split the data set: write refcoco/unc or refcoco/google"
    ):
        open_records("refer", tmp_path, "refcoco")
    with pytest.raises(ValueError, match="'../anns' is no folder"):
        open_records("cris", tmp_path, "../anns")
    for kind, name in (("cris", "refcoco"), ("folder", "")):
        with pytest.raises(FileNotFoundError, match=r"; the (CRIS )?layout .*is <path>"):
            open_records(kind, tmp_path, name)
    (tmp_path / "images" / "train2014").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no .parquet file"):
        open_records("hub_table", tmp_path)


# One's own folder


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)
    return folder


LINE = {"file_name": "a.jpg", "sentences": ["a cat"], "mask": [rectangle(*A)]}


def test_what_is_left_out_is_filled_in(mine):
    records = open_lines(
        mine,
        LINE,
        LINE | {"file_name": "b.jpg", "mask": None, "split": "val"},
        LINE | {"file_name": "./b.jpg", "ref_id": 0, "category": "cat", "bbox": [1, 2, 3.5, 4], "image_id": None},
        LINE | {"image_id": 0, "ann_id": 9, "category_id": 17, "notes": "blurred"},
        LINE | {"file_name": "b.jpg", "mask": rle(pixels(B))},
    )
    splits, rows = zip(*(records.read(index) for index in range(5)))
    assert records.name == "mine" and splits == ("train", "val", "train", "train", "train")
    assert all(row["mask"]["size"] == [HEIGHT, WIDTH] for row in rows)
    assert [row["ref_id"] for row in rows] == [1, 2, 0, 3, 4]
    assert [row["ann_id"] for row in rows] == [1, -1, 0, 9, 4]
    assert [row["image_id"] for row in rows] == [0, 1, 1, 0, 1]
    assert [row["category"] for row in rows] == ["", "", "cat", "", ""]
    left, top, right, bottom = B
    assert rows[4]["bbox"] == [left, top, right - left, bottom - top]
    assert rows[1]["bbox"] == [0, 0, 0, 0] and rows[2]["bbox"] == [1, 2, 3.5, 4]
    loaded = load_records(records)
    assert not loaded["val"][0]["mask"].any() and loaded["train"].num_rows == 4


def test_the_readmes_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n([^`]*Path\(\"mine\")([^`]*)```", text)
    exec("".join(example), {})
    expected = {"train": [["the ball", "round thing on the left"]], "val": [["the gate"], ["a dog"]]}
    assert capsys.readouterr().out.strip() == str(expected)


def outside(folder):
    """A photograph beside the folder, and links to it."""
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(folder.parent / "secret.jpg")
    PIL.Image.fromarray(pixels(A)).save(folder.parent / "secret.png")
    (folder / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    (folder / "link.png").symlink_to("../secret.png")
    (folder / "up").symlink_to("..")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "inner.jpg").symlink_to("a.jpg")


NESTED = b'{"file_name": "a.jpg", "sentences": ["x"], "mask": ' + b"[" * 50_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "Expecting property name"),
        (b"\xff\xfe\x00", "can't decode"),
        (NESTED, "it is not JSON in UTF-8 .*recursion.*write one object a line"),
        (b"3", "it holds 3; write one JSON object a line"),
        ({"file_name": "a.jpg", "mask": None}, "a field is missing .*'sentences'"),
        ({"file_name": "a.jpg", "sentences": ["x"]}, "a field is missing .*'mask'"),
        (LINE | {"file_name": "/etc/passwd"}, "'/etc/passwd' is not inside"),
        (LINE | {"file_name": "../secret.jpg"}, "is not inside"),
        (LINE | {"file_name": "sub/../../secret.jpg"}, "is not inside"),
        (LINE | {"file_name": ""}, "'' is not inside"),
        (LINE | {"file_name": "up/secret.jpg"}, "up/secret.jpg is a link that leads out"),
        (LINE | {"file_name": "link.jpg"}, "link.jpg is a link that leads out"),
        (LINE | {"file_name": "loop.jpg"}, "cannot be read|does not exist"),
        (LINE | {"file_name": "pipe.jpg"}, "no regular file"),
        (LINE | {"file_name": "\0.jpg"}, "cannot be read"),
        (LINE | {"file_name": "\ud800.jpg"}, "half a character"),
        (LINE | {"file_name": "x" * 5000}, "the file name has 5,000 characters"),
        (LINE | {"file_name": "x" * 300}, "cannot be read"),
        (LINE | {"file_name": 3}, "the file name is 3"),
        (LINE | {"file_name": "none.jpg"}, "none.jpg does not exist; the layout of a folder is"),
        (LINE | {"file_name": "drawing.eps"}, "cannot be read .it is no JPEG or PNG"),
        (LINE | {"mask": "link.png"}, "is a link that leads out"),
        (LINE | {"mask": "../secret.png"}, "is not inside"),
        (LINE | {"mask": "none.png"}, "mask .*none.png does not exist"),
        (LINE | {"mask": "a.jpg"}, "mask .*a.jpg cannot be read"),
        (LINE | {"mask": 3}, "mask is 3; give a PNG's path, polygons, RLE or null"),
        (LINE | {"mask": []}, "has no mask"),
        (LINE | {"mask": rectangle(*A)}, "is no polygon"),
        (LINE | {"mask": [[1, 1, 5, 5]]}, "is no polygon"),
        (LINE | {"mask": [[1, 1, 5, float("nan"), 6, 6]]}, "is no polygon"),
        (LINE | {"mask": [[1, 1, 5, 1e300, 6, 6]]}, "is no polygon"),
        (LINE | {"mask": [["x" * 10**6] * 6]}, "is no polygon"),
        (LINE | {"mask": [[[1, 1], [5, 5], [6, 6]]]}, "is no polygon"),
        (LINE | {"mask": {"size": [WIDTH, HEIGHT], "counts": [1200]}}, "the mask is"),
        (LINE | {"mask": {"size": [HEIGHT, WIDTH], "counts": [1200.5, "a"]}}, ""),
        (LINE | {"mask": {"size": [HEIGHT, WIDTH], "counts": "o" * 99}}, "not COCO's compressed counts"),
        (LINE | {"mask": {"size": [HEIGHT, WIDTH], "counts": "Pooo" * 9}}, "not COCO's compressed counts"),
        (LINE | {"mask": {"size": [HEIGHT, WIDTH], "counts": "~!"}}, "not COCO's compressed counts"),
        (LINE | {"mask": {"size": [HEIGHT, WIDTH], "counts": ""}}, "not COCO's compressed counts"),
        (LINE | {"mask": {"size": [HEIGHT, WIDTH], "counts": None}}, "a field is missing or not"),
        (LINE | {"mask": {"size": HEIGHT, "counts": [1200]}}, "a field is missing or not"),
        (LINE | {"sentences": "a cat"}, "sentences is 'a cat'; give a list"),
        (LINE | {"sentences": []}, "there are no phrases"),
        (LINE | {"sentences": ["a cat", " \t"]}, "is empty"),
        (LINE | {"sentences": [None]}, "a phrase is None"),
        (LINE | {"sentences": ["x" * 10**7]}, "a phrase has 10,000,000 characters"),
        (LINE | {"bbox": [0, 0, float("nan"), 1]}, r"has the bbox \[0, 0, nan, 1\]"),
        (LINE | {"bbox": [0, 0, float("inf"), 1]}, "has the bbox"),
        (LINE | {"bbox": [0, 0, 10**400, 1]}, "a field is missing or not"),
        (LINE | {"bbox": "abcd"}, "has the bbox 'abcd'"),
        (
            LINE | {"bbox": [500, 500, 10, 10]},
            "is not in its image of 40 x 30 .*give x, y, width and height",
        ),
        (LINE | {"bbox": [10, 8, 38, 28]}, "not x1, y1, x2, y2"),
        (LINE | {"bbox": [10, 8, -3, 5]}, "not x1, y1, x2, y2"),
        (
            LINE | {"mask": [[0.1, 0.2, 0.9, 0.2, 0.9, 0.8]]},
            "are in fractions of the image, .*give .*in pixels",
        ),
        (LINE | {"mask": [[50, 40, 60, 40, 60, 50]]}, "cover no pixel of their image, which is 40 x 30"),
        (LINE | {"splt": "val"}, "it has the unknown key 'splt': write split"),
        ({"file_name": "a.jpg", "mask": None, "sentence": ["x"]}, "the unknown key 'sentence': write sentences"),
        (LINE | {"ref_id": "7"}, "ref_id is '7'"),
        (LINE | {"ref_id": 1.0}, "ref_id is 1.0"),
        (LINE | {"ref_id": False}, "ref_id is False"),
        (LINE | {"ann_id": -(2**63) - 1}, "ann_id is -9"),
        (LINE | {"image_id": "7"}, "image_id is '7'"),
        (LINE | {"image_id": 8}, "image_id is 8, but 7 in another line with this image"),
        (LINE | {"split": "../up"}, "cannot name a split"),
        (LINE | {"split": "x" * 65}, "cannot name a split"),
        (LINE | {"split": 3}, "3 cannot name a split"),
        (LINE | {"category": ["cat"]}, "the category is"),
    ],
)
def test_bad_lines_are_named(mine, line, message):
    outside(mine)
    os.mkfifo(mine / "pipe.jpg")
    (mine / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EOF\n")
    records = open_lines(mine, LINE | {"image_id": 7}, line, LINE | {"file_name": "inner.jpg"})
    with pytest.raises((ValueError, OSError), match=rf"(?s)metadata\.jsonl, line 3: .*{message}") as caught:
        records.read(1)
    assert len(str(caught.value)) < 2_000 and str(caught.value).encode()
    for index in (0, 2):  # the others are not held up
        records.check(records.read(index)[1])


def test_a_folders_annotations_must_be_its_own(mine):
    (mine.parent / "secret.jsonl").write_text(json.dumps(LINE))
    (mine / "metadata.jsonl").symlink_to("../secret.jsonl")
    with pytest.raises(ValueError, match="is a link that leads out"):
        open_records("folder", mine)
    (mine / "metadata.jsonl").unlink()
    (mine / "train").symlink_to(mine.parent / "elsewhere")
    (mine.parent / "elsewhere").mkdir()
    (mine.parent / "secret.jsonl").rename(mine.parent / "elsewhere" / "metadata.jsonl")
    with pytest.raises(ValueError, match="is a link that leads out"):
        open_records("folder", mine)


def test_a_data_folder_may_be_a_link(mine):
    open_lines(mine, LINE)
    (mine.parent / "alias").symlink_to(mine)
    assert load_records(open_records("folder", mine.parent / "alias"))["train"].num_rows == 1


def test_images_that_broke_are_named(mine):
    records = open_lines(mine, LINE)
    _, row = records.read(0)
    (mine / "a.jpg").write_bytes((mine / "a.jpg").read_bytes()[:-200])
    with pytest.raises(OSError, match="ref_id 0: image .*a.jpg cannot be read"):
        records.check(row)


# CRIS and the Hub's tables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment_id": "../../secret"}, "segment_id is '../../secret'; give a whole number"),
        ({"segment_id": 999}, "mask .*999.png does not exist; the CRIS layout is"),
        ({"segment_id": 111}, "entry 0: mask .*111.png is"),
        ({"img_name": "../train2014/first.jpg"}, "is not inside"),
        ({"img_name": ["first.jpg"]}, "the file name is"),
        ({"img_name": "none.jpg"}, "image .*none.jpg does not exist; the CRIS layout is"),
        ({"cat": 80}, "cat is 80; give one of COCO's 80"),
        ({"cat": -1}, "cat is -1"),
        ({"bbox": [1, 2, 3]}, "entry 0: "),
        ({"bbox": [1, 2, 3, float("nan")]}, "has the bbox"),
        ({"bbox": None}, "not of CRIS's type"),
        ({"sentences": [{"sent": ""}]}, "is empty"),
        ({"sentences": ["a cat"]}, "not of CRIS's type"),
    ],
)
def test_bad_cris_records_are_named(tmp_path, change, message):
    arguments = small_set(tmp_path).write_cris(tmp_path / "out")
    path = tmp_path / "out" / "anns" / "set" / "train.json"
    records = json.loads(path.read_text())
    records[0].update(change)
    path.write_text(json.dumps(records + [5]))
    PIL.Image.fromarray(pixels(A)[1:]).save(tmp_path / "out" / "masks" / "set" / "111.png")
    records = open_records(**arguments)
    with pytest.raises(
        (ValueError, OSError), match=rf"train\.json, {'' if 'entry' in message else 'entry 0: .*'}{message}"
    ):
        records.read(0)
    records.read(2)
    with pytest.raises(ValueError, match="entry 4: a field is missing"):
        records.read(4)


def test_cris_files_must_be_its_own(tmp_path):
    arguments = small_set(tmp_path).write_cris(tmp_path / "out")
    mask, train = tmp_path / "out" / "masks" / "set" / "110.png", tmp_path / "out" / "anns" / "set" / "train.json"
    mask.rename(tmp_path / "secret.png")
    mask.symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="entry 0: .*110.png is a link that leads out"):
        open_records(**arguments).read(0)
    train.rename(tmp_path / "secret.json")
    train.symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="train.json is a link that leads out"):
        open_records(**arguments)
    for content, message in ((b"{}", "holds a dict, not a list"), (pickle.dumps([]), "is not a JSON file")):
        train.unlink()
        train.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_records(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raw_anns": "{"}, "entry 0: Expecting property name"),
        ({"raw_anns": "[" * 100_000}, "RecursionError"),
        ({"raw_anns": "[]"}, "not of the table's type"),
        ({"raw_anns": None}, "not of the table's type"),
        ({"raw_image_info": "{}"}, "a field is missing .*'id'"),
        ({"ann_id": 99}, "ref_id 110: ann_id 99 is not in"),
        ({"image_id": 99}, "image_id 99 is not in"),
        ({"category_id": 12}, "category_id 12 is not in"),
        ({"ref_id": None}, "ref_id is None"),
        ({"sentences": None}, "not of REFER's type"),
        ({"split": None}, "None cannot name a split"),
    ],
)
def test_bad_rows_of_a_table_are_named(tmp_path, change, message):
    arguments = small_set(tmp_path).write_hub_table(tmp_path / "out")
    path = tmp_path / "out" / "data" / "train-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0].update(change)
    pq.write_table(pa.Table.from_pylist(rows), path)
    records = open_records(**arguments)
    with pytest.raises(ValueError, match=message):
        records.read(0)
    records.read(1)


def test_images_of_a_table_must_be_in_their_folder(tmp_path):
    refer_set = small_set(tmp_path)
    refer_set.instances["images"][0]["file_name"] = "../../refcoco/instances.json"
    records = open_records(**refer_set.write_hub_table(tmp_path / "out"))
    with pytest.raises(ValueError, match="instances.json' is not inside"):
        records.read(0)


@pytest.mark.parametrize("layout", ["cris", "hub_table", "folder"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_read(tmp_path, layout, kind):
    arguments = getattr(small_set(tmp_path), f"write_{layout}")(tmp_path / "out")
    paths = {
        "cris": ["anns/set/train.json", "masks/set/110.png"],
        "hub_table": ["data/train-00000-of-00001.parquet"],
        "folder": ["metadata.jsonl", "images/first.jpg", "112.png"],
    }
    for number, name in enumerate(paths[layout]):
        path = tmp_path / "out" / name
        path.rename(tmp_path / f"away{number}")
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
        with not_waiting(), pytest.raises((ValueError, OSError), match="is no regular file|a link that leads out"):
            load_records(open_records(**arguments))
        path.unlink()
        (tmp_path / f"away{number}").rename(path)
    assert load_records(open_records(**arguments))


@pytest.mark.parametrize("kind", ["cris", "hub_table", "folder"])
def test_lmdb_folders_are_told_what_to_give_instead(tmp_path, kind):
    (tmp_path / "images" / "train2014").mkdir(parents=True)
    (tmp_path / "lmdb" / "refcoco").mkdir(parents=True)
    (tmp_path / "lmdb" / "refcoco" / "train.lmdb").write_bytes(bytes(8192))
    for path in (tmp_path, tmp_path / "lmdb", tmp_path / "lmdb" / "refcoco", tmp_path / "lmdb/refcoco/train.lmdb"):
        with pytest.raises(FileNotFoundError, match="LMDB files, which are not read here: give the folders anns/"):
            open_records(kind, path, "refcoco", None if kind == "folder" else tmp_path / "images" / "train2014")
    with pytest.raises(ValueError, match="choose from .*; LMDB files were made from the folders anns/ and masks/"):
        open_records("lmdb", tmp_path)


def test_files_without_records_are_told_as_such(tmp_path):
    arguments = small_set(tmp_path).write_cris(tmp_path / "cris")
    (tmp_path / "cris" / "anns" / "set" / "val.json").write_text("[]")
    with pytest.raises(ValueError, match="val.json has no records: leave the file out"):
        open_records(**arguments)
    arguments = small_set(tmp_path / "2").write_folder(tmp_path / "mine", nested=True)
    (tmp_path / "mine" / "val" / "metadata.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="val/metadata.jsonl has no records: write one JSON object a line"):
        open_records(**arguments)


@pytest.mark.parametrize("error", [MemoryError("no room"), pa.lib.ArrowMemoryError("no room")])
def test_want_of_memory_is_not_told_as_a_broken_table(tmp_path, monkeypatch, error):
    arguments = small_set(tmp_path).write_hub_table(tmp_path / "out")

    def fail(*_, **__):
        raise error

    for target, name in ((pq.ParquetFile, "read"), (pa, "concat_tables")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(type(error)) as caught:
                open_records(**arguments)
            assert caught.value is error


def test_broken_tables_are_named(tmp_path):
    arguments = small_set(tmp_path).write_hub_table(tmp_path / "out")
    path = tmp_path / "out" / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["raw_anns", "split"]), path)
    with pytest.raises(ValueError, match=r"no table like jxu124/refcoco \(the columns raw_anns, split are missing\)"):
        open_records(**arguments)
    for content in (b"", pickle.dumps([1]), b"PAR1" + bytes(99)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="train-.*parquet is no table like jxu124/refcoco"):
            open_records(**arguments)
    path.unlink()
    path.symlink_to(tmp_path / "secret.parquet")
    pq.write_table(table, tmp_path / "secret.parquet")
    with pytest.raises(ValueError, match="is a link that leads out"):
        open_records(**arguments)
