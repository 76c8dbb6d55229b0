"""The reader of the REFER layout, gRefCOCO's included: masks known by arithmetic, and what it refuses."""

import json
import os
import pickle
import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers.other_layouts import assert_same_rows
from helpers.refer_folder import (
    HEIGHT,
    MASKS,
    MINI,
    ROOT,
    WIDTH,
    A,
    B,
    ReferFolder,
    by_annotation,
    not_waiting,
    pixels,
    rectangle,
    rle,
)
from pycocotools import mask as coco_mask

from data.records import FEATURES, load_records
from data.refer import load_refer
from data.sources import open_records
from untrusted_pickles import PlainUnpickler

OFFICIAL = ROOT.parent / "shared" / "conformance" / "expected" / "refer_mini.json"


@pytest.mark.parametrize("protocol", [0, 2])
def test_rows(refer, protocol):
    loaded = refer.load(protocol=protocol)
    assert {split: rows["ann_id"][:] for split, rows in loaded.items()} == {
        "train": [10, 11, 14, 16],
        "val": [12],
        "testA": [13],
        "testB": [15],
    }
    assert all(rows.features == FEATURES for rows in loaded.values())
    for ann_id, row in by_annotation(loaded).items():
        assert row["mask"].dtype == np.uint8
        np.testing.assert_array_equal(row["mask"], MASKS[ann_id][1], err_msg=f"annotation {ann_id}")
        assert row["sentences"] == [f"cat {ann_id}", "l'été, left"]
        assert row["ref_id"] == 100 + ann_id and row["image_id"] == 1 + ann_id % 2
        assert row["category"] == ("cat" if ann_id % 2 else "remote")
        assert row["bbox"] == [1.25, 2, 3, ann_id]
        assert row["image"].size == (WIDTH, HEIGHT)
    with PIL.Image.open(refer.images / "second.png") as image:
        np.testing.assert_array_equal(np.asarray(by_annotation(loaded)[11]["image"]), np.asarray(image))


@pytest.mark.parametrize(("dataset", "split_by"), [("refcoco+", "unc"), ("refcocog", "umd"), ("refcocog", "google")])
def test_every_data_set_over_coco(refer, dataset, split_by):
    assert len(by_annotation(refer.load(dataset, split_by))) == len(MASKS)


def test_refclef_has_its_own_images(refer):
    refer.images.rename(refer.root / "images" / "saiapr_tc-12")
    assert len(by_annotation(refer.load("refclef", "berkeley"))) == len(MASKS)


def test_the_root_may_be_a_relative_path(refer, monkeypatch):
    refer.load()
    monkeypatch.chdir(refer.images)
    rows = load_refer("../..", "refcoco", "unc")["train"]
    monkeypatch.chdir("/")
    assert rows[0]["image"].size == (WIDTH, HEIGHT)


def test_a_pickle_of_something_else_is_named(refer):
    refer.refs = refer.refs[0]
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p holds a dict, not a list of refs"):
        refer.load()


def test_unknown_data_sets_are_refused(tmp_path):
    for dataset, split_by in (("refcocos", "unc"), ("refcoco+", "umd"), ("../refcoco", "unc"), ("refcoco", "../unc")):
        with pytest.raises(
            ValueError, match=r"refcoco \(unc or google\), refcoco\+ \(unc\), refcocog \(umd or google\)"
        ):
            load_refer(tmp_path, dataset, split_by)


def test_missing_files_are_named_with_the_layout(refer):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; the REFER layout is <root>"):
        load_refer(refer.root / "nowhere", "refcoco", "unc")
    refer.load()
    for path in ("refcoco/instances.json", "refcoco/refs(unc).p", "images/train2014"):
        (refer.root / path).rename(refer.root / "away")
        with pytest.raises(FileNotFoundError) as caught:
            load_refer(refer.root, "refcoco", "unc")
        assert f"{refer.root / path} does not exist; the REFER layout is <root>/<dataset>/refs(" in str(caught.value)
        (refer.root / "away").rename(refer.root / path)


def test_broken_instances_are_named(refer):
    for text in ("{", "[]", '{"images": []}', '{"images": [3], "annotations": [], "categories": []}'):
        refer.load()
        (refer.root / "refcoco" / "instances.json").write_text(text)
        with pytest.raises(ValueError, match="instances.json is not a COCO annotation file"):
            load_refer(refer.root, "refcoco", "unc")


# Any data set in the layout


def as_another_set(refer):
    """`aerial/refs(unc).p`, images elsewhere, and a list of one compressed RLE a mask, as in RRSIS-D."""
    for annotation in refer.instances["annotations"]:
        annotation["segmentation"] = [rle(MASKS[annotation["id"]][1], compressed=True)]
    refer.write("aerial")
    return refer.images.rename(refer.root / "images" / "JPEGImages")


def test_any_set_in_the_layout_is_read_with_its_images(refer):
    images = as_another_set(refer)
    for given in (images, os.path.relpath(images)):
        rows = by_annotation(load_refer(refer.root, "aerial", "unc", images=given))
        assert set(rows) == set(MASKS)
        for ann_id, row in rows.items():
            np.testing.assert_array_equal(row["mask"], MASKS[ann_id][1])
            assert row["image"].size == (WIDTH, HEIGHT)
    with pytest.raises(ValueError, match="no data set 'aerial' split by 'unc'; known are .*`images` says where"):
        load_refer(refer.root, "aerial", "unc")
    refer.write("refcoco", "mine")  # another division of a published set
    assert len(by_annotation(load_refer(refer.root, "refcoco", "mine", images))) == len(MASKS)
    with pytest.raises(FileNotFoundError, match=r"aerial/refs\(umd\).p does not exist; the REFER layout"):
        load_refer(refer.root, "aerial", "umd", images)


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../aerial", "/aerial", "a/b", "a\0b", "a\nb", "a::b", "~", ".hidden", "x" * 101]
)
def test_no_name_leads_out_of_the_root(refer, name):
    images = as_another_set(refer)
    for dataset, split_by in ((name, "unc"), ("aerial", name), ("aerial", f"{name}/../x")):
        with pytest.raises(ValueError, match="There is no data set"):
            load_refer(refer.root, dataset, split_by, images)


def test_a_set_without_refs_is_told_as_such(refer):
    refer.refs = []
    with pytest.raises(ValueError, match=r"refs\(unc\).p has no records"):
        refer.load()


def test_lmdb_folders_are_told_what_to_give_instead(refer):
    refer.write()
    (refer.root / "refcoco" / "refs(unc).p").unlink()
    for name in ("train.lmdb", "refcoco/val.lmdb", "refcoco/data.mdb", "lmdb/refcoco/testA.lmdb"):
        path = refer.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(8192))
        with pytest.raises(
            FileNotFoundError, match="does not exist; .*LMDB files.*anns/ and masks/ .*data.prepare cris"
        ):
            load_refer(refer.root, "refcoco", "unc")
        path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_refer(refer.root, "refcoco", "unc")
    assert "LMDB" not in str(error.value)


# Memory, pipes and devices


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory")])
def test_want_of_memory_is_not_told_as_a_broken_file(refer, monkeypatch, error):
    refer.write()

    def fail(*_, **__):
        raise error

    for target, name in (
        (PlainUnpickler, "load"),
        (PIL.Image, "open"),
        (coco_mask, "merge"),
        (json, "loads"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(type(error)) as caught:
                load_refer(refer.root, "refcoco", "unc")
            assert caught.value is error


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/stdin"])
@pytest.mark.parametrize("name", ["refcoco/refs(unc).p", "refcoco/instances.json", "images/train2014/first.jpg"])
def test_pipes_and_devices_are_not_read(refer, name, kind):
    refer.write()
    path = refer.root / name
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(kind)
    with not_waiting(), pytest.raises((ValueError, OSError), match="is no regular file|link that leads out"):
        load_refer(refer.root, "refcoco", "unc")


# Broken records


def set_segmentation(value):
    return lambda refs, instances: instances["annotations"][0].update(segmentation=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda refs, _: refs[0].update(ann_id=99), "ref_id 110: ann_id 99 is not in instances.json"),
        (lambda refs, _: refs[0].update(image_id=99), "ref_id 110: image_id 99 is not in instances.json"),
        (lambda refs, _: refs[0].update(category_id=99), "ref_id 110: category_id 99 is not in instances.json"),
        (lambda refs, _: refs[0].update(image_id=2), "ref_id 110: ann_id 10 is of image 1, not 2"),
        (lambda refs, _: refs[0]["sentences"][1].update(sent=" \t"), r"ref_id 110: one of the phrases .* is empty"),
        (lambda refs, _: refs[0].update(sentences=[]), "ref_id 110: there are no phrases"),
        (lambda refs, _: refs[0].update(split="../train"), "ref_id 110: '../train' cannot name a split"),
        (lambda refs, _: refs[0].pop("ref_id"), "entry 0: a field is missing"),
        (lambda refs, _: refs[0].update(ref_id=[1]), "ref_id is \\[1\\]"),
        (lambda refs, _: refs[1].update(ref_id=110), ": 1 ref_ids stand at several refs, such as 110"),
        (lambda refs, _: refs[0].pop("sentences"), "ref_id 110: a field is missing .*'sentences'"),
        (lambda refs, _: refs.insert(0, 5), "entry 0: a field is missing or not of REFER's type"),
        (lambda _, instances: instances["annotations"][0].update(bbox=[1]), r"ann_id 10 has the bbox \[1\]; give x"),
        (set_segmentation([]), "ref_id 110: ann_id 10 has no mask"),
        (set_segmentation(None), "ref_id 110: its mask is null; give polygons or RLE"),
        (set_segmentation([[1, 1, 5, 5]]), "ref_id 110: ann_id 10: .* is no polygon"),
        (set_segmentation([[1, 1, 5, 5, 6, 6, 7]]), "is no polygon"),
        (set_segmentation([1, 1, 5, 5, 6, 6]), "is no polygon"),
        (set_segmentation([[1, 1, 1e9, 1, 1e9, 1e9]]), "is no polygon"),
        (set_segmentation([[1, 1, float("nan"), 1, 5, 5]]), "is no polygon"),
        (set_segmentation([[1, 1, 5, 5, "x", 6]]), "ref_id 110: "),
        (set_segmentation({"size": [WIDTH, HEIGHT], "counts": [1200]}), r"ann_id 10: the mask is \[40, 30\], but its"),
        (set_segmentation({"size": [HEIGHT, WIDTH], "counts": [10, 5]}), "runs are fewer than 30 x 40 pixels"),
        (set_segmentation({"size": [HEIGHT, WIDTH], "counts": [1199]}), "runs are fewer than 30 x 40 pixels"),
        (set_segmentation({"size": [HEIGHT, WIDTH], "counts": [1201]}), "runs are more than 30 x 40 pixels"),
        (set_segmentation({"size": [HEIGHT, WIDTH], "counts": "oooooooo"}), "are not COCO's compressed counts"),
        (set_segmentation({"size": [HEIGHT, WIDTH], "counts": [1, -2, 1201]}), "110: .* are no numbers of pixels"),
        (
            set_segmentation({"size": [HEIGHT, WIDTH], "counts": [2**32 - 1, 2**32 - 1, 0, 0] * 1000}),
            "ref_id 110: ann_id 10: .* are no numbers of pixels",
        ),
        (set_segmentation([[1, 1, 40, 30] * 100] * 10**3), "the outline of .* is over 2,000,000 pixels long"),
        (set_segmentation({"counts": [1200]}), "ref_id 110: a field is missing .*'size'"),
        (
            lambda _, instances: instances["images"][0].update(height=10**9),
            "ref_id 110: image_id 1 is recorded as 1000",
        ),
        (
            lambda _, instances: instances["images"][0].update(width="40"),
            "ref_id 110: image_id 1 is recorded as 30 x '40'",
        ),
        (lambda _, instances: instances["images"][0].update(width=0), "ref_id 110: image_id 1 is recorded as 30 x 0"),
        (lambda _, instances: instances["images"][0].update(file_name="../train2014/first.jpg"), "is not inside"),
        (lambda _, instances: instances["images"][0].update(file_name="/etc/passwd"), "'/etc/passwd' is not inside"),
        (lambda _, instances: instances["images"][0].update(file_name="a.jpg::first.jpg"), "taken for an address"),
        (lambda _, instances: instances["images"][0].update(file_name="file://first.jpg"), "taken for an address"),
        (
            lambda _, instances: instances["images"][0].update(width=32_767),
            "recorded as 30 x 32767 pixels; a side has",
        ),
        (lambda refs, _: refs[0].update(sentences=[{"sent": "x" * 10_000}] * 11), "have over 100,000 characters"),
        (lambda refs, _: refs[0].update(split="\U00020000" * 64), "cannot name a split"),
    ],
)
def test_bad_rows_are_named(refer, change, message):
    change(refer.refs, refer.instances)
    with pytest.raises(ValueError, match=rf"refs\(unc\)\.p.*{message}"):
        refer.load()


def test_images_of_refer_are_not_linked_away(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    folder.write()
    shutil.move(folder.images / "first.jpg", tmp_path / "first.jpg")
    (folder.images / "first.jpg").symlink_to(tmp_path / "first.jpg")
    records = open_records("refer", folder.root, "refcoco/unc")
    with pytest.raises(ValueError, match=r"ref_id 110: .*first.jpg is a link that leads out"):
        records.read(0)
    (folder.images / "first.jpg").unlink()
    (folder.root / "pool").mkdir()
    shutil.move(tmp_path / "first.jpg", folder.root / "pool" / "1.jpg")
    (folder.images / "first.jpg").symlink_to("../../pool/1.jpg")
    assert len(load_records(records)["train"]) == sum(ref["split"] == "train" for ref in folder.refs)
    shutil.move(folder.images, tmp_path / "elsewhere")  # the folder of images as a whole may be elsewhere
    folder.images.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "first.jpg").unlink()
    shutil.copy(folder.root / "pool" / "1.jpg", tmp_path / "elsewhere" / "first.jpg")
    records.read(0)
    assert len(MASKS) == len(records)


# gRefCOCO

GREFS = {  # ref_id -> ann_id, category_id, expected ann_id, category, box, mask
    1: ([-1], [-1], -1, "", [0, 0, 0, 0], pixels()),
    2: ([20], [17], 20, "cat", [3, 4, 17, 11], pixels(A)),
    3: ([20, 21], [17, 17], -1, "cat", [3, 4, 30, 21], pixels(A, B)),
    4: ([20, 22], [17, 75], -1, "", [3, 4, 30, 21], pixels(A, B)),
    5: ([20, 20], [17, 17], 20, "cat", [3, 4, 17, 11], pixels(A)),
    6: ([20, 23], [17, 17], 20, "cat", [3, 4, 17, 11], pixels(A)),  # a crowd does not count
}


@pytest.fixture
def grefs(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    folder.instances["annotations"] = [
        {"id": 20, "image_id": 1, "segmentation": [rectangle(*A)], "bbox": [3, 4, 17, 11], "iscrowd": 0},
        {"id": 21, "image_id": 1, "segmentation": rle(pixels(B)), "bbox": [15, 10, 18, 15], "iscrowd": 0},
        {"id": 22, "image_id": 1, "segmentation": [rectangle(*B)], "bbox": [15, 10, 18, 15], "iscrowd": 0},
        {"id": 23, "image_id": 1, "segmentation": rle(pixels(B)), "bbox": [15, 10, 18, 15], "iscrowd": 1},
        {"id": 24, "image_id": 2, "segmentation": [rectangle(*B)], "bbox": [15, 10, 18, 15], "iscrowd": 0},
    ]
    folder.refs = [
        {
            "ref_id": ref_id,
            "ann_id": ann_id,
            "category_id": category_id,
            "image_id": 1,
            "split": "val",
            "no_target": ann_id == [-1],
            "sentences": [{"sent": "both cats ", "raw": "Both cats", "sent_id": ref_id, "tokens": []}],
        }
        for ref_id, (ann_id, category_id, *_) in GREFS.items()
    ]
    return folder


def write_grefs(folder):
    (folder.root / "grefcoco").mkdir(exist_ok=True)
    (folder.root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(folder.refs))
    (folder.root / "grefcoco" / "instances.json").write_text(json.dumps(folder.instances))
    return open_records("refer", folder.root, "grefcoco/unc")


def test_several_targets_and_none(grefs):
    rows = load_records(write_grefs(grefs))["val"]
    assert rows["ref_id"][:] == list(GREFS)
    for row in rows:
        *_, ann_id, category, bbox, mask = GREFS[row["ref_id"]]
        assert (row["ann_id"], row["category"], row["bbox"]) == (ann_id, category, bbox), row["ref_id"]
        np.testing.assert_array_equal(row["mask"], mask, err_msg=f"ref_id {row['ref_id']}")
        assert row["sentences"] == ["both cats"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ann_id": []}, r"the ann_ids \[\] name no object; for no target give \[-1\]"),
        ({"ann_id": [23]}, "name no object"),
        ({"ann_id": [20, -1]}, "ann_id -1 is not in instances.json"),
        ({"ann_id": [20, 99]}, "ann_id 99 is not in instances.json"),
        ({"ann_id": [20, 24]}, "ann_id 24 is of image 2, not 1"),
        ({"ann_id": [[20]]}, "not of REFER's type"),
        ({"ann_id": -1}, "ann_id -1 is not in instances.json"),
        ({"category_id": [17, 99]}, "category_id 99 is not"),
        ({"ref_id": 2**63}, "ref_id is 9223372036854775808; give a whole number"),
        ({"ref_id": True}, "ref_id is True"),
        ({"sentences": [{"sent": "x" * 10_001}]}, "a phrase has 10,001 characters; at most 10,000"),
        ({"sentences": [{"sent": "half \ud83d"}]}, "holds half a character"),
        ({"sentences": [{"sent": 7}]}, "a phrase is 7; give text"),
    ],
)
def test_bad_grefs_are_named(grefs, change, message):
    grefs.refs[1].update(change)
    with pytest.raises(ValueError, match=rf"grefs\(unc\)\.json, .*{message}"):
        write_grefs(grefs).read(1)


def test_objects_without_phrases_are_skipped_and_counted(grefs, caplog):
    """As published files have them: in places all over, and as the only thing that is wrong."""
    whole = load_records(write_grefs(grefs))["val"]
    assert not caplog.records
    silent = [{**ref, "ref_id": 100 + ref["ref_id"], "sentences": []} for ref in grefs.refs]
    grefs.refs = [ref for pair in zip(silent, grefs.refs) for ref in pair]
    records = write_grefs(grefs)
    assert len(records) == len(GREFS) and records.without_phrases == len(GREFS)
    assert_same_rows(datasets.DatasetDict(val=load_records(records)["val"]), datasets.DatasetDict(val=whole))
    (record,) = caplog.records
    assert "grefs(unc).json: 6 objects have no phrases and are skipped" in record.getMessage()
    grefs.refs[1]["sentences"] = None  # no list of none
    with pytest.raises(ValueError, match="ref_id 1: a field is missing or not of REFER's type"):
        load_records(write_grefs(grefs))
    grefs.refs = silent
    with pytest.raises(ValueError, match="has no records"):
        load_records(write_grefs(grefs))


def test_grefs_are_never_unpickled(grefs):
    write_grefs(grefs)
    (grefs.root / "grefcoco" / "grefs(unc).json").write_bytes(pickle.dumps(grefs.refs))
    with pytest.raises(ValueError, match="is not a JSON file"):
        open_records("refer", grefs.root, "grefcoco/unc")
    (grefs.root / "grefcoco" / "grefs(unc).json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a JSON file"):
        open_records("refer", grefs.root, "grefcoco/unc")


# Photographs


@pytest.mark.skipif(not MINI.exists(), reason="needs the photographs of ../shared/refer_mini")
@pytest.mark.parametrize("name", ["refcoco/unc", "refcoco+/unc", "refcocog/umd", "refcocog/google"])
def test_photographs_as_the_official_reader_reads_them(name):
    official = json.loads(OFFICIAL.read_text())[name]
    loaded = load_refer(MINI, *name.split("/"))
    assert set(loaded) == set(official)
    for split, refs in official.items():
        rows = {row["ref_id"]: row for row in loaded[split]}
        assert len(rows) == len(loaded[split]) == len(refs)
        for ref in refs:
            row = rows[ref["ref_id"]]
            assert (row["sentences"], row["category"]) == (ref["sentences"], ref["category"])
            left, top, right, bottom = ref["bbox_xyxy"]
            assert row["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1)
            np.testing.assert_array_equal(row["mask"], coco_mask.decode(ref["mask_rle"]))
            assert row["image"].size == row["mask"].shape[::-1]
