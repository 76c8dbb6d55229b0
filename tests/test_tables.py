"""Tables with pixels: where they lie, what is filled in, and that their images stay on disk."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hub_client import run_client
from helpers.hub_server import HubServer
from helpers.other_layouts import assert_same_rows, rows_of, small_set
from helpers.prepared import entries, load_prepared, problems_of
from helpers.refer_folder import HEIGHT, WIDTH, A, not_waiting, pixels, rectangle, rle, truncate
from helpers.table_writers import COLUMNS, SCHEMAS, columns, png, tables, write
from pycocotools import mask as coco_mask

from data import prepare, records, tables as tables_module
from data.records import FEATURES, load_records
from data.sources import open_records

ROOT = Path(__file__).resolve().parent.parent
NAMED = {"image": "image", "mask": "mask", "text": "text"}  # the columns of `write_plain`


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of `datasets`, which is empty."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def noise(seed, format="PNG"):
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    PIL.Image.fromarray(values).save(file, format)
    return file.getvalue()


def plain(*images, **cells):
    """Rows of a table of no published layout: an image each, by default of a rectangle that is called a thing."""
    row = {"mask": [rectangle(*A)], "text": "a thing"} | cells
    return [{"image": image if isinstance(image, dict | str | None) else {"bytes": image, "path": None}} | row
            for image in images]  # fmt: skip


def write_plain(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def open_plain(path, rows, **options):
    write_plain(path, rows)
    return open_records("table", path, columns=NAMED, **options)


# Sources


def written(refer_set, folder, form, prefix=""):
    """The small set as `columns` tables, which keep all that REFER has; the arguments to open it with."""
    schema = columns("rle")
    rows = {f"{prefix}{split}": split_rows for split, split_rows in schema.rows(refer_set).items()}
    return {"kind": "table", "path": write(schema, rows, folder, form), "columns": COLUMNS}


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_folder_gives_refers_rows(tmp_path, form):
    refer_set = small_set(tmp_path)
    found = load_records(open_records(**written(refer_set, tmp_path / "table", form)))
    assert_same_rows(found, load_records(open_records("refer", refer_set.refer, refer_set.name)))
    assert all(image["bytes"] for rows in found.values() for image in stored_images(rows))


def stored_images(rows):
    return rows.cast_column("image", datasets.Image(decode=False))["image"][:]


def test_a_file_alone_and_files_beside_each_other(tmp_path):
    arguments = written(small_set(tmp_path), tmp_path / "table", "parquet")
    expected = rows_of(load_records(open_records(**arguments)))
    (file,) = (tmp_path / "table" / "data").glob("val-*")
    assert rows_of(load_records(open_records(**arguments | {"path": file}))).keys() == {"val"}
    for path in (tmp_path / "table" / "data").iterdir():
        path.rename(tmp_path / "table" / path.name)
    beside = rows_of(load_records(open_records(**arguments)))
    assert list(beside) == list(expected) == ["train", "val", "testA", "testB"]
    assert {split: list(rows) for split, rows in beside.items()} == {
        split: list(rows) for split, rows in expected.items()
    }


def test_a_single_dataset_of_save_to_disk(tmp_path):
    schema = columns("rle")
    rows = tables(schema, schema.rows(small_set(tmp_path)))["val"]
    rows.save_to_disk(tmp_path / "table")
    assert list(load_records(open_records("table", tmp_path / "table", columns=COLUMNS))) == ["train"]


def test_shards_are_in_order(tmp_path):
    for part in (1, 0, 2):
        write_plain(
            tmp_path / "t" / f"val-{part:05d}-of-00003-0a1b.parquet", plain(png(pixels(A)), text=f"thing {part}")
        )
    rows = load_records(open_records("table", tmp_path / "t", columns=NAMED))["val"]
    assert rows["sentences"][:] == [["thing 0"], ["thing 1"], ["thing 2"]]
    assert rows["ref_id"][:] == rows["ann_id"][:] == [0, 1, 2]


def test_paths_that_libraries_would_take_for_patterns(tmp_path):
    folder = tmp_path / ".hidden" / "a [1] * b"
    records = open_plain(folder / "val.parquet", plain(png(pixels(A))))
    assert len(load_records(records)["val"]) == 1
    with pytest.raises(ValueError, match="would be taken for an address; rename it"):
        open_plain(tmp_path / "a::b" / "val.parquet", plain(png(pixels(A))))


def test_several_folders_of_tables_must_be_told_apart(tmp_path):
    for folder in ("easy", "hard"):
        write_plain(tmp_path / "t" / folder / "val-0.parquet", plain(png(pixels(A)), text=folder))
    with pytest.raises(ValueError, match="has tables in several folders: give the name of one of easy, hard"):
        open_records("table", tmp_path / "t", columns=NAMED)
    rows = load_records(open_records("table", tmp_path / "t", "hard", columns=NAMED))["val"]
    assert rows["sentences"][:] == [["hard"]]


def test_splits(tmp_path):
    arguments = written(small_set(tmp_path), tmp_path / "table", "parquet")
    few = load_records(open_records(**arguments, splits=["testB", "val"]))
    assert list(few) == ["val", "testB"]
    with pytest.raises(ValueError, match="has no split dev; it has testA, testB, train, val"):
        open_records(**arguments, splits=["val", "dev"])
    with pytest.raises(ValueError, match="`columns` and `splits` are for tables with pixels, not for the kind folder"):
        open_records("folder", tmp_path, splits=["val"])


def test_the_splits_of_one_set_among_several(tmp_path):
    """As in jxu124/refcoco-benchmark, where `refcoco_plus_unc_val` is REFER's val of refcoco+/unc."""
    refer_set = small_set(tmp_path)
    arguments = written(refer_set, tmp_path / "table", "parquet", prefix="refcoco_plus_unc_")
    other = tmp_path / "table" / "data" / "refcoco_unc_val-00000-of-00001.parquet"
    other.write_bytes(next((tmp_path / "table" / "data").glob("*_testA-*")).read_bytes())
    found = load_records(open_records(**arguments, name="refcoco+/unc"))
    assert_same_rows(found, load_records(open_records("refer", refer_set.refer, refer_set.name)))
    assert list(load_records(open_records(**arguments, name="refcoco+/unc", splits=["val"]))) == ["val"]
    assert list(load_records(open_records(**arguments, name="refcoco/unc"))) == ["val"]
    with pytest.raises(ValueError, match="has no splits of refcocog/umd; it has refcoco_plus_unc_testA"):
        open_records(**arguments, name="refcocog/umd")
    everything = open_records(**arguments)  # ref_ids are told apart within a split, as they are of several sets
    assert len(load_records(everything)) == 5
    assert prepare.prepare(everything, tmp_path / "out", num_proc=1)["left_out"] == 0


def test_rows_can_name_their_split(tmp_path):
    rows = [row | {"part": part} for row, part in zip(plain(*[png(pixels(A))] * 4), ["val", "test", None, "val"])]
    path = write_plain(tmp_path / "train.parquet", rows)
    options = {"columns": NAMED | {"split": "part"}}
    found = load_records(open_records("table", path, **options))
    assert {split: rows["ref_id"][:] for split, rows in found.items()} == {"val": [0, 3], "test": [1], "train": [2]}
    assert list(load_records(open_records("table", path, splits=["test"], **options))) == ["test"]
    with pytest.raises(ValueError, match="has no split dev; it has test, train, val"):
        open_records("table", path, splits=["dev"], **options)


# What is filled in


def test_what_the_table_does_not_say_is_filled_in(tmp_path):
    coco = {"bytes": noise(1), "path": "somewhere/COCO_train2014_000000581857.jpg"}
    rows = plain(noise(2), coco, noise(3)) + plain(noise(2), mask=None)
    write_plain(tmp_path / "t" / "val.parquet", rows)
    write_plain(tmp_path / "t" / "train.parquet", plain(noise(2)))
    found = load_records(open_records("table", tmp_path / "t", columns=NAMED))
    assert found["train"]["ref_id"][:] == [0] and found["val"]["ref_id"][:] == [1, 2, 3, 4]
    assert found["val"]["ann_id"][:] == [1, 2, 3, -1]
    first, second, third, fourth = found["val"]["image_id"][:]
    assert second == 581857 and first < 0 and third < 0 and first == fourth != third
    assert found["train"]["image_id"][:] == [first]  # the same image in another split
    assert found["val"]["category"][:] == [""] * 4 and found["val"]["bbox"][0] == [3, 4, 17, 11]
    names = [image["path"] for image in stored_images(found["val"])]
    assert names == [None, "COCO_train2014_000000581857.jpg", None, None]


def test_an_image_on_its_side_counts_with_the_size_it_is_seen_in(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    PIL.Image.new("RGB", (HEIGHT, WIDTH)).save(file, "JPEG", exif=exif)
    (row,) = load_records(open_plain(tmp_path / "val.parquet", plain(file.getvalue())))["val"]
    assert row["image"].size == (WIDTH, HEIGHT) and row["mask"].shape == (HEIGHT, WIDTH)


# Images that are not in the table


@pytest.mark.parametrize("cell", ["first.png", {"path": "first.png", "bytes": None}])
def test_names_of_images_are_looked_up_only_in_the_folder_of_images(tmp_path, cell):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "first.png").write_bytes(noise(1))
    path = write_plain(tmp_path / "t" / "val.parquet", plain(cell) + plain(cell, text="another"))
    with pytest.raises(
        ValueError, match="val, row 0: the cell image has only the path 'first.png', which is not opened"
    ):
        load_records(open_records("table", path, columns=NAMED))
    opened = open_records("table", path, columns=NAMED, images=tmp_path / "images")
    rows = load_records(opened)["val"]
    assert rows[0]["image"].size == (WIDTH, HEIGHT) and rows["image_id"][0] == rows["image_id"][1] < 0
    prepare.prepare(opened, tmp_path / "out", num_proc=1)
    shutil.rmtree(tmp_path / "images")
    assert load_prepared(tmp_path / "out", tmp_path)["val"][0]["image"].size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("../secret.png", "is not inside"),
        ("/etc/passwd", "is not inside"),
        ("https://example.org/a.png", "would be taken for an address"),
        ("zip://a.png::b.zip", "would be taken for an address"),
        ("link.png", "is a link that leads out of"),
        ("missing.png", "does not exist"),
        (None, "the cell image is None; give the bytes"),
        (7, "the cell image is 7; give the bytes"),
        ({"bytes": None, "path": None}, "give the bytes"),
        ({"bytes": b"", "path": None}, "the embedded image cannot be read"),
        ({"bytes": noise(1)[:-200], "path": "/etc/passwd"}, "the embedded image cannot be read .*truncated"),
    ],
)  # fmt: skip
def test_no_cell_opens_what_was_not_named(tmp_path, cell, message):
    (tmp_path / "secret.png").write_bytes(noise(1))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    path = write_plain(tmp_path / "val.parquet", [row | {"image": cell} for row in plain(None)])
    opened = open_records("table", path, columns=NAMED, images=tmp_path / "images")
    with pytest.raises((OSError, ValueError), match=message):
        load_records(opened)
    if not isinstance(cell, int | None):
        with pytest.raises((OSError, ValueError)):
            load_records(open_records("table", path, columns=NAMED))


# Hostile and broken tables


def test_a_readme_names_no_files(tmp_path):
    write_plain(tmp_path / "secret.parquet", plain(noise(1), text="secret"))
    path = write_plain(tmp_path / "t" / "val-0.parquet", plain(noise(2)))
    files = [{"split": "val", "path": str(tmp_path / "secret.parquet")}, {"split": "x", "path": "../secret.parquet"}]
    card = {"configs": [{"config_name": "default", "data_files": files}]}
    (path.parent / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    found = load_records(open_records("table", path.parent, columns=NAMED))
    assert {split: rows["sentences"][:] for split, rows in found.items()} == {"val": [["a thing"]]}


def break_link(folder, file):
    file.rename(folder.parent / "elsewhere.parquet")
    file.symlink_to(folder.parent / "elsewhere.parquet")


def make_pipe(folder, file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (break_link, ValueError, "is a link that leads out of"),
        (make_pipe, ValueError, "is no regular file"),
        (lambda _, file: truncate(file, -100), (OSError, ValueError), "val-0.parquet cannot be read as a table"),
        (lambda _, file: truncate(file, 0), (OSError, ValueError), "val-0.parquet cannot be read as a table"),
        (lambda _, file: file.write_text("404: not found"), ValueError, "val-0.parquet cannot be read as a table"),
        (lambda _, file: file.unlink(), FileNotFoundError, "has no .parquet file; a table is a Parquet file"),
        (
            lambda _, file: file.write_bytes(b"PAR1" + b"\xff" * 60 + file.read_bytes()[64:]),
            (OSError, ValueError),
            "val-0.parquet cannot be read as a table",
        ),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, change, error, message):
    file = write_plain(tmp_path / "t" / "val-0.parquet", plain(noise(1)))
    change(file.parent, file)
    with not_waiting(), pytest.raises(error, match=message):
        open_records("table", file.parent, columns=NAMED)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("dataset_dict.json", lambda found: found | {"splits": ["../elsewhere"]}, "'../elsewhere' is not inside"),
        ("dataset_dict.json", lambda found: found | {"splits": [["val"]]}, "the file name is .*; give text"),
        ("dataset_dict.json", lambda found: [], "not of save_to_disk's type"),
        ("dataset_dict.json", lambda found: {}, "a field is missing"),
        ("val/state.json", lambda found: found | {"_data_files": [{"filename": "../../x.arrow"}]}, "is not inside"),
        ("val/state.json", lambda found: found | {"_data_files": [{"filename": "/etc/passwd"}]}, "is not inside"),
        ("val/state.json", lambda found: found | {"_data_files": 7}, "not of save_to_disk's type"),
        ("val/state.json", lambda found: found | {"_data_files": []}, "cannot be read as a table"),
        ("val/dataset_info.json", lambda found: [], "cannot be read as a table"),
    ],
)  # fmt: skip
def test_hostile_folders_of_save_to_disk(tmp_path, file, change, message):
    folder = tmp_path / "table"
    datasets.DatasetDict({"val": datasets.Dataset.from_list(plain(noise(1)))}).save_to_disk(folder)
    shutil.copytree(folder / "val", tmp_path / "elsewhere")
    assert len(open_records("table", folder, columns=NAMED)) == 1
    (folder / file).write_text(json.dumps(change(json.loads((folder / file).read_text()))))
    with pytest.raises(ValueError, match=message):
        open_records("table", folder, columns=NAMED)


def test_arrow_files_of_save_to_disk_are_checked(tmp_path):
    datasets.Dataset.from_list(plain(noise(1), noise(2), noise(3))).save_to_disk(tmp_path / "table")
    (file,) = (tmp_path / "table").glob("*.arrow")
    whole = file.read_bytes()
    offsets = np.array([0, 7, 14, 21], "<i4").tobytes()  # of the texts, each "a thing"
    assert whole.count(offsets) == 1
    file.write_bytes(whole.replace(offsets, np.array([0, 7, 14, 2**30], "<i4").tobytes()))
    with pytest.raises(ValueError, match="cannot be read as a table"):
        open_records("table", tmp_path / "table", columns=NAMED)


def test_other_columns_are_not_decoded(tmp_path):
    """They may call themselves images, and name files that `datasets` would open."""
    (tmp_path / "secret").write_text("secret")
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.List(datasets.List(datasets.Value("float32"))),
                                  "text": datasets.Value("string"), "more": datasets.Image()})  # fmt: skip
    rows = [row | {"more": {"path": str(tmp_path / "secret"), "bytes": None}} for row in plain(noise(1))]
    table = datasets.Dataset.from_list(rows, features)
    table.to_parquet(tmp_path / "t" / "val.parquet")
    os.remove(tmp_path / "secret")
    os.mkfifo(tmp_path / "secret")  # whoever opens it waits
    with not_waiting():
        assert len(load_records(open_records("table", tmp_path / "t", columns=NAMED))["val"]) == 1
