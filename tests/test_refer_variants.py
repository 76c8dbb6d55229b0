"""What others made of the REFER layout: Ref-ZOM, R-RefCOCO, RRSIS-D, refs in JSON. Masks as the official loaders make
them are computed here pixel by pixel, from what those loaders do."""

import json
import pickle
import re

import numpy as np
import pytest
from helpers.other_layouts import assert_same_rows
from helpers.prepared import load_prepared
from helpers.prepared import problems_of as left_out
from helpers.refer_folder import HEIGHT, MASKS, WIDTH, A, B, ReferFolder, pixels, rectangle, rle
from pycocotools import mask as coco_mask

from data import check, prepare
from data.opening import load_splits
from data.refer import SOURCES, load_refer
from data.sources import open_records

C = (1, 20, 9, 29)
ANNOTATIONS = {  # id -> image, segmentation, box, whether it is a crowd, and what it fills
    20: (1, [rectangle(*A)], [3, 4, 17, 11], 0, pixels(A)),
    21: (1, [rle(pixels(B), compressed=True)], [15, 10, 18, 15], 0, pixels(B)),
    22: (1, [rectangle(*B), rectangle(*C)], [1, 10, 32, 19], 0, pixels(B, C)),  # of two parts
    23: (1, [rle(pixels(C), compressed=True)], [1, 20, 8, 9], 1, pixels(C)),  # a crowd, which counts in Ref-ZOM
    24: (2, [rectangle(*C)], [1, 20, 8, 9], 0, pixels(C)),
}


def official_mask(annotation, size):
    """What all these loaders do with an annotation: the parts are decoded and added up."""
    parts = annotation["segmentation"]
    if type(parts[0]) is list:
        parts = coco_mask.frPyObjects(parts, *size)
    return coco_mask.decode(parts).sum(axis=2)


@pytest.fixture
def refer(tmp_path):
    """A folder with the annotations above; a variant writes its refs."""
    folder = ReferFolder(tmp_path / "refer")
    folder.instances["annotations"] = [
        {"id": ann_id, "image_id": image_id, "segmentation": parts, "bbox": bbox, "iscrowd": iscrowd}
        for ann_id, (image_id, parts, bbox, iscrowd, _) in ANNOTATIONS.items()
    ]
    return folder


def sentence(number, text, **more):
    return {"sent_id": number, "raw": text.title(), "sent": text, "tokens": text.split(), **more}


def problems_of(capsys, *arguments):
    """The lines of `data.check` that name a problem."""
    status = check.main([str(argument) for argument in arguments])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert status == bool(lines)
    return lines


# --- Ref-ZOM --------------------------------------------------------------------------------------------------------

ZOM = [  # ref_id, source, ann_id, category_id, then the row's ann_id, category and box
    (1, "one", 20, 17, 20, "cat", [3, 4, 17, 11]),
    (2, "one", [21], [75], 21, "remote", [15, 10, 18, 15]),
    (3, "many", [20, 21], [17, 17], -1, "cat", [3, 4, 30, 21]),
    (4, "many", [21, 22, 23], [17, 75, 17], -1, "", [1, 10, 32, 19]),
    (5, "many", [23], [17], 23, "cat", [1, 20, 8, 9]),
    (6, "zero", [], [], -1, "", [0, 0, 0, 0]),
    (7, "zero", [20, 21], [17, 17], -1, "", [0, 0, 0, 0]),  # whatever its ann_ids are
    (8, "zero", 24, 17, -1, "", [0, 0, 0, 0]),  # even of another image
]


def zom_mask(ref, folder):
    """As `getMask` of Ref-ZOM's `refer.py`: nothing if the source is zero, else where the objects' sum is not 0."""
    if ref["source"] == "zero":
        return np.zeros((HEIGHT, WIDTH))
    of_id = {annotation["id"]: annotation for annotation in folder.instances["annotations"]}
    ann_ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    return sum(official_mask(of_id[ann_id], (HEIGHT, WIDTH)) for ann_id in ann_ids) != 0


@pytest.fixture
def zom(refer):
    refer.refs = [
        {
            "ref_id": ref_id,
            "source": source,
            "ann_id": ann_id,
            "category_id": category_id,
            "image_id": 1,
            "split": "test" if ref_id % 2 else "train",
            "sentences": [sentence(ref_id, "both cats ")],
        }
        for ref_id, source, ann_id, category_id, *_ in ZOM
    ]
    refer.images = refer.images.rename(refer.root / "images" / "trainval2014")
    return refer


@pytest.mark.parametrize("name", ["ref-zom", "refzom"])
def test_ref_zom_has_one_several_or_no_targets(zom, name):
    loaded = zom.load(name, "final")
    assert set(loaded) == {"train", "test"}
    rows = {row["ref_id"]: row for split in loaded.values() for row in split}
    assert set(rows) == {ref_id for ref_id, *_ in ZOM}
    for ref, (ref_id, source, _, _, ann_id, category, bbox) in zip(zom.refs, ZOM, strict=True):
        row = rows[ref_id]
        assert (row["ann_id"], row["category"], row["bbox"]) == (ann_id, category, bbox), ref_id
        np.testing.assert_array_equal(row["mask"], zom_mask(ref, zom), err_msg=f"ref_id {ref_id}")
        assert row["mask"].any() == (source != "zero") and row["sentences"] == ["both cats"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ann_id": []}, r"ref_id 3: the ann_ids \[\] name no object; for no target give source zero"),
        ({"ann_id": [20, 24]}, "ref_id 3: ann_id 24 is of image 2, not 1"),
        ({"ann_id": [20, 99]}, "ref_id 3: ann_id 99 is not in instances.json"),
        ({"source": "zero", "image_id": 9}, "ref_id 3: image_id 9 is not in instances.json"),
        ({"source": "zero", "sentences": []}, "ref_id 3: there are no phrases"),
    ],
)
def test_bad_refs_of_ref_zom_are_named(zom, capsys, change, message):
    zom.refs[2].update(change)
    zom.write("ref-zom", "final")
    (line,) = problems_of(capsys, zom.root, "ref-zom/final")
    assert re.search(rf"refs\(final\)\.p, {message}", line)
    with pytest.raises(ValueError, match=message):
        load_refer(zom.root, "ref-zom", "final")


# --- R-RefCOCO ------------------------------------------------------------------------------------------------------

EXIST = {  # ref_id -> for each phrase whether it exists; None: it is not said
    0: [True, False, True],
    1: [False, False],
    2: [True, True],
    3: [None, None],
    4: [0, 1, None],
    5: [None, False],
}


@pytest.fixture
def robust(refer):
    refer.refs = [
        {
            "ref_id": ref_id,
            "ann_id": (20, 22, 24)[ref_id % 3],
            "category_id": 17,
            "image_id": 2 if ref_id % 3 == 2 else 1,
            "split": "val" if ref_id < 2 else "train",
            "sentences": [
                sentence(10 * ref_id + number, f"phrase {number}", **({} if exist is None else {"exist": exist}))
                for number, exist in enumerate(exists)
            ],
        }
        for ref_id, exists in EXIST.items()
    ]
    return refer


@pytest.mark.parametrize("name", ["rrefcoco/unc", "rrefcoco+/unc", "rrefcocog/umd"])
def test_phrases_that_name_nothing_are_rows_of_their_own(robust, name):
    """Phrase by phrase the mask is the one that R-RefCOCO's `ReferDataset` trains on: an empty one if `exist` is 0."""
    loaded = robust.load(*name.split("/"))
    of_id = {annotation["id"]: annotation for annotation in robust.instances["annotations"]}
    expected = {}
    for ref in robust.refs:
        for number, exist in enumerate(EXIST[ref["ref_id"]]):
            mask = official_mask(of_id[ref["ann_id"]], (HEIGHT, WIDTH)) == 1
            expected[ref["ref_id"], f"phrase {number}"] = mask if exist or exist is None else np.zeros_like(mask)
    found = {}
    for split, rows in loaded.items():
        for row in rows:
            original = row["ref_id"] if row["ref_id"] >= 0 else -1 - row["ref_id"]
            assert (split == "val") == (original < 2)
            assert (row["ref_id"] < 0) == (not row["mask"].any())
            if row["ref_id"] < 0:
                assert (row["ann_id"], row["category"], row["bbox"]) == (-1, "", [0, 0, 0, 0])
            else:
                assert (row["ann_id"], row["category"]) == (robust.refs[original]["ann_id"], "cat")
            for phrase in row["sentences"]:
                assert (original, phrase) not in found
                found[original, phrase] = row["mask"]
    assert set(found) == set(expected)
    for key, mask in expected.items():
        np.testing.assert_array_equal(found[key], mask, err_msg=str(key))
    assert loaded["val"]["ref_id"] == [0, -1, -2] and loaded["train"]["ref_id"] == [2, 3, 4, -5, 5, -6]


def test_a_row_depends_on_its_index_alone(robust):
    robust.write("rrefcoco")
    records = open_records("refer", robust.root, "rrefcoco/unc")
    rows = [records.read(index) for index in range(len(records))]
    assert [records.read(index) for index in reversed(range(len(records)))] == rows[::-1]
    robust.refs.reverse()
    robust.write("rrefcoco")
    again = open_records("refer", robust.root, "rrefcoco/unc")
    key = lambda item: item[1]["ref_id"]  # noqa: E731
    assert sorted((again.read(index) for index in range(len(again))), key=key) == sorted(rows, key=key)


@pytest.mark.parametrize("value", ["false", None, 2, -1, 0.5, float("nan"), [], {}, [False]])
def test_exist_is_yes_or_no(robust, capsys, value):
    robust.refs[2]["sentences"][0]["exist"] = value
    robust.write("rrefcoco")
    (line,) = problems_of(capsys, robust.root, "rrefcoco/unc")
    assert re.search(r"refs\(unc\)\.p, ref_id 2: exist is .* at a phrase; give true or false", line)


def test_ref_ids_that_would_meet_are_refused(robust):
    robust.refs[3]["ref_id"] = -1
    with pytest.raises(ValueError, match="1 ref_ids stand at several refs, such as -1"):
        robust.load("rrefcoco")
    for ref_id in (True, 0.5, "0", 2**63, None):
        robust.refs[3]["ref_id"] = ref_id
        robust.refs[3]["sentences"][0]["exist"] = False
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p, entry 3: ref_id is "):
            robust.load("rrefcoco")


def test_phrases_may_be_there_as_raw_alone(robust):
    """The official loaders of Ref-ZOM and R-RefCOCO read `raw`, so that files of their kind need no `sent`."""
    for ref in robust.refs:
        for one in ref["sentences"]:
            del one["sent"]
    assert robust.load("rrefcoco")["val"]["sentences"] == [
        ["Phrase 0", "Phrase 2"],
        ["Phrase 1"],
        ["Phrase 0", "Phrase 1"],
    ]
    del robust.refs[0]["sentences"][0]["raw"]
    with pytest.raises(ValueError, match="ref_id 0: a field is missing .*raw"):
        robust.load("rrefcoco")


# --- RRSIS-D, and folders of one's own in the layout ----------------------------------------------------------------


def test_rrsisd_knows_where_its_images_are(tmp_path):
    refer = ReferFolder(tmp_path / "refer")
    for annotation in refer.instances["annotations"]:  # a list of one RLE
        annotation["segmentation"] = [rle(MASKS[annotation["id"]][1], compressed=True)]
    (refer.root / "images" / "rrsisd").mkdir()
    refer.images = refer.images.rename(refer.root / "images" / "rrsisd" / "JPEGImages")
    rows = {row["ann_id"]: row for split in refer.load("rrsisd").values() for row in split}
    assert set(rows) == set(MASKS)
    for ann_id, row in rows.items():
        np.testing.assert_array_equal(row["mask"], MASKS[ann_id][1])


def test_refs_may_be_json_where_there_is_no_pickle(tmp_path):
    refer = ReferFolder(tmp_path / "refer")
    theirs = refer.load()
    for dataset, name in (("refcoco", "refs(unc).json"), ("mine", "refs(unc).json"), ("mine2", "grefs(unc).json")):
        refer.write(dataset)
        (refer.root / dataset / "refs(unc).p").unlink()
        (refer.root / dataset / name).write_text(json.dumps(refer.refs))
        assert_same_rows(load_refer(refer.root, dataset, "unc", refer.images), theirs)
    (refer.root / "mine" / "refs(unc).p").write_bytes(pickle.dumps([]))  # goes before the JSON
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p has no records"):
        load_refer(refer.root, "mine", "unc", refer.images)
    (refer.root / "mine" / "refs(unc).p").unlink()
    refer.refs[0]["sentences"] = []  # a fault everywhere but in gRefCOCO
    (refer.root / "mine" / "refs(unc).json").write_text(json.dumps(refer.refs))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.json, ref_id 110: there are no phrases"):
        load_refer(refer.root, "mine", "unc", refer.images)


def test_categories_and_boxes_may_be_left_out(tmp_path):
    refer = ReferFolder(tmp_path / "refer")
    theirs = refer.load()
    del refer.instances["categories"], refer.refs[0]["category_id"]
    for annotation in refer.instances["annotations"]:
        del annotation["bbox"]
    ours = refer.load()
    for split, rows in theirs.items():
        for one, other in zip(ours[split], rows, strict=True):
            np.testing.assert_array_equal(one["mask"], other["mask"])
            assert one["category"] == "" and one["ref_id"] == other["ref_id"]
            inside = np.argwhere(other["mask"])  # y, x
            box = [*inside.min(axis=0)[::-1], *np.ptp(inside, axis=0)[::-1] + 1] if len(inside) else [0, 0, 0, 0]
            assert one["bbox"] == box


# --- By their names, from the command line --------------------------------------------------------------------------


def test_prepared_rows_are_those_that_are_read(zom, tmp_path, capsys):
    output = tmp_path / "prepared"
    zom.write("ref-zom", "final")
    prepare.main(["refer", str(zom.root), "--name", "ref-zom/final", "--output", str(output), "--num_proc", "1"])
    assert "0 records left out" in capsys.readouterr().out
    splits = json.loads((output / "summary.json").read_text())["splits"]
    assert {split: figures["empty_masks"] for split, figures in splits.items()} == {"test": 1, "train": 2}
    assert_same_rows(load_prepared(output, tmp_path), load_refer(zom.root, "ref-zom", "final"))
    assert not problems_of(capsys, zom.root, "ref-zom/final")


def test_a_broken_ref_costs_its_two_rows_alone(robust, tmp_path):
    whole = robust.load("rrefcoco")
    robust.refs[0]["image_id"] = 9
    robust.write("rrefcoco")
    records = open_records("refer", robust.root, "rrefcoco/unc")
    prepare.prepare(records, tmp_path / "prepared", num_proc=1)
    assert {
        index: "ref_id 0: image_id 9 is not" in text for index, text in left_out(tmp_path / "prepared").items()
    } == {
        0: True,
        1: True,
    }
    kept = load_prepared(tmp_path / "prepared", tmp_path)
    assert (
        kept["val"]["ref_id"] == whole["val"]["ref_id"][2:] and kept["train"]["ref_id"] == whole["train"]["ref_id"][:]
    )


def test_every_source_is_found_where_its_images_are(tmp_path):
    refer = ReferFolder(tmp_path / "refer")
    for dataset, (folder, splits) in SOURCES.items():
        (refer.root / folder).parent.mkdir(parents=True, exist_ok=True)
        refer.images = refer.images.rename(refer.root / folder)
        for split_by in splits:
            refer.write(dataset, split_by)
            if dataset == "grefcoco":
                (refer.root / dataset / f"grefs({split_by}).json").write_text(json.dumps(refer.refs))
            rows = load_splits(f"{dataset}/{split_by}", str(refer.root))
            assert sum(map(len, rows.values())) == len(MASKS)
