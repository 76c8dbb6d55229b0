"""Tables with pixels: where they lie, what is filled in, what hostile ones hold, and what is kept of them."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
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
from helpers.plain_tables import NAMED, noise, open_plain, plain, stored_images, write_plain, written
from helpers.prepared import load_prepared, problems_of
from helpers.refer_folder import HEIGHT, WIDTH, A, not_waiting, pixels, truncate
from helpers.table_writers import COLUMNS, columns, png, tables

from data import prepare
from data import records as records_module
from data.records import load_records
from data.sources import open_records

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("datasets_cache")


# Sources


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_folder_gives_refers_rows(tmp_path, form):
    refer_set = small_set(tmp_path)
    found = load_records(open_records(**written(refer_set, tmp_path / "table", form)))
    assert_same_rows(found, load_records(open_records("refer", refer_set.refer, refer_set.name)))
    assert all(image["bytes"] for rows in found.values() for image in stored_images(rows))


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


def test_a_split_of_which_files_are_missing_is_refused(tmp_path):
    for part in (0, 2):
        write_plain(tmp_path / "t" / f"val-{part:05d}-of-00003.parquet", plain(png(pixels(A))))
    with pytest.raises(FileNotFoundError, match="t lacks 1 of the 3 files of its split val, such as number 1 from 0"):
        open_records("table", tmp_path / "t", columns=NAMED)
    one = open_records("table", tmp_path / "t" / "val-00000-of-00003.parquet", columns=NAMED)  # meant by its own name
    assert len(one) == 1


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
    path = write_plain(tmp_path / "lists.parquet", [row | {"part": [row["part"]]} for row in rows])
    with pytest.raises(ValueError, match=r"the column part holds \['val'\]; give the name of a split"):
        open_records("table", path, splits=["val"], **options)


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
        ("missing.png", "missing.png does not exist; `images` is the folder of the images that the table names.$"),
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


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"mask": [[0.1, 0.2, 0.9, 0.2, 0.9, 0.8]]}, "row 0: the polygons .* are in fractions of the image"),
        ({"mask": [[50.0, 40.0, 60.0, 40.0, 60.0, 50.0]]}, "row 0: the polygons .* cover no pixel"),
        ({"box": [10, 8, 38, 28]}, "row 0: bbox is .* which is not in its image of 40 x 30"),
    ],
)
def test_masks_and_boxes_of_own_tables_must_be_in_their_image(tmp_path, cells, message):
    rows = plain(noise(1), **{"box": [9.5, 8.0, 31.5, 22.0]} | cells)
    records = open_records("table", write_plain(tmp_path / "val.parquet", rows), columns=NAMED | {"bbox": "box"})
    with pytest.raises(ValueError, match=message):
        records.read(0)


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


def test_a_split_of_save_to_disk_is_named_by_text(tmp_path):
    datasets.Dataset.from_list(plain(noise(1))).save_to_disk(tmp_path / "table")
    state = tmp_path / "table" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_split": 5}))
    with pytest.raises(ValueError, match="state.json: _split is 5; give text"):
        open_records("table", tmp_path / "table", columns=NAMED)


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
    polygons = datasets.List(datasets.List(datasets.Value("float32")))
    pictures = dict.fromkeys(("image", "more"), datasets.Image())
    features = datasets.Features({"mask": polygons, "text": datasets.Value("string"), **pictures})
    rows = [row | {"more": {"path": str(tmp_path / "secret"), "bytes": None}} for row in plain(noise(1))]
    table = datasets.Dataset.from_list(rows, features)
    table.to_parquet(tmp_path / "t" / "val.parquet")
    os.remove(tmp_path / "secret")
    os.mkfifo(tmp_path / "secret")  # whoever opens it waits
    with not_waiting():
        assert len(load_records(open_records("table", tmp_path / "t", columns=NAMED))["val"]) == 1


def test_what_a_file_says_of_its_columns_is_not_believed(tmp_path):
    """Neither classes that decode, nor columns of types that `datasets` has not, which are not needed here."""
    table = pa.Table.from_pylist(plain(noise(1)))
    table = table.append_column("pairs", pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())))
    table = table.append_column("kind", pa.array(["a"]).dictionary_encode())
    for features in ({"image": {"_type": "Nope"}}, {"image": {"_type": "Audio"}, "text": {"_type": "Pdf"}}, 7):
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "val.parquet")
        found = load_records(open_records("table", tmp_path / "val.parquet", columns=NAMED))
        assert found["val"]["sentences"][:] == [["a thing"]]


def test_columns_of_the_same_name(tmp_path):
    table = pa.Table.from_pylist(plain(noise(1)))
    pq.write_table(pa.table([*table.columns, table["text"]], [*table.column_names, "text"]), tmp_path / "val.parquet")
    with pytest.raises(ValueError, match=r"val.parquet cannot be read as a table \(several columns are called text\)"):
        open_records("table", tmp_path / "val.parquet", columns=NAMED)


def test_files_without_rows(tmp_path):
    table = pa.Table.from_pylist(plain(noise(1)))
    (tmp_path / "t").mkdir()
    for name, rows in (("val-0", 0), ("val-1", 1), ("test", 0)):
        pq.write_table(table.slice(0, rows), tmp_path / "t" / f"{name}.parquet")
    assert list(load_records(open_records("table", tmp_path / "t", columns=NAMED))) == ["val"]
    with pytest.raises(ValueError, match="has no records"):
        load_records(open_records("table", tmp_path / "t", columns=NAMED, splits=["test"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pbench"}, r"split val has no columns \['expression', 'masks'\], which the layout pbench needs"),
        ({"columns": {"photo": "image", "mask": "mask"}}, "image, text is not named, and nothing is called photo"),
        ({"kind": "columns"}, "the column of image, mask, text is not named"),
        ({"columns": NAMED | {"colour": "text"}}, "nothing is called colour"),
        ({"columns": NAMED | {"text": "phrase"}}, r"split val has no columns \['phrase'\], .*; it has \['"),
        ({"columns": NAMED | {"text": "mask"}}, "gives one column two meanings"),
        ({"columns": NAMED | {"mask": "image"}}, "gives one column two meanings"),
        ({"kind": "lmms", "columns": NAMED}, "The layout lmms says itself which columns hold what"),
        ({"kind": "cris", "columns": NAMED, "name": "x"}, "are for tables with pixels, not for the kind cris"),
    ],
)  # fmt: skip
def test_wrong_columns_are_refused(tmp_path, options, message):
    path = write_plain(tmp_path / "val.parquet", plain(noise(1)))
    with pytest.raises(ValueError, match=message):
        open_records(**{"kind": "table", "path": path} | options)


def test_a_table_of_no_known_layout(tmp_path):
    path = write_plain(tmp_path / "val.parquet", [{"photo": noise(1), "text": "a", "mask": None}])
    with pytest.raises(ValueError, match=r"split val: .*are of no known layout.*--columns"):
        open_records("table", path)
    columns = {"image": "photo", "mask": "mask", "text": "text"}
    assert load_records(open_records("table", path, columns=columns))["val"]["ann_id"][:] == [-1]


def test_splits_of_different_columns_are_refused(tmp_path):
    write_plain(tmp_path / "t" / "train.parquet", plain(noise(1)))
    write_plain(tmp_path / "t" / "val.parquet", [{"image": None, "text": "a"}])
    with pytest.raises(ValueError, match=r"split val has no columns \['mask'\]"):
        open_records("table", tmp_path / "t", columns=NAMED)
    write_plain(tmp_path / "t" / "train-1.parquet", [{"image": 7, "text": "a"}])
    with pytest.raises(ValueError, match="train.parquet|train-1.parquet cannot be read as a table"):
        open_records("table", tmp_path / "t", columns=NAMED)


def test_the_file_of_a_split_that_lacks_a_column_is_named(tmp_path):
    first = write_plain(tmp_path / "t" / "val-1.parquet", plain(noise(1)))
    second = write_plain(tmp_path / "t" / "val-2.parquet", [{"image": noise(1), "text": "a"}])
    with pytest.raises(ValueError, match=f"^{second} lacks the columns mask, which {first} has"):
        open_records("table", first.parent, columns=NAMED)


def test_the_tables_without_pixels_are_another_kind(tmp_path):
    arguments = small_set(tmp_path).write_hub_table(tmp_path / "table")
    with pytest.raises(ValueError, match="has no pixels: the kind hub_table reads it, with COCO's train2014"):
        open_records("table", arguments["path"])


# Loading


def test_what_was_loaded_is_not_read_again(tmp_path, monkeypatch, table_reads):
    path = tmp_path / "val.parquet"
    first = load_records(open_plain(path, plain(noise(1), noise(2))))["val"]
    assert table_reads() == [0, 1] and all(Path(file["filename"]).is_file() for file in first.cache_files)
    again = load_records(open_records("table", path, columns=NAMED))["val"]
    assert table_reads() == [] and again["ref_id"][:] == [0, 1]
    other = load_records(open_plain(path, plain(noise(1), noise(2), text="another")))["val"]
    assert table_reads() == [0, 1] and other["sentences"][:] == [["another"]] * 2
    load_records(open_records("table", path, "another name", columns=NAMED))
    assert table_reads() == [0, 1]


def test_processes_load_the_same_set_at_once(tmp_path, table_reads):
    records = open_plain(tmp_path / "val.parquet", plain(*(noise(seed) for seed in range(20))))
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        found = pool.map(_fingerprint, [records.refs] * 2, chunksize=1)
    assert found[0] == found[1] and sorted(table_reads()) == list(range(20))


def _fingerprint(path):
    rows = load_records(open_records("table", path, columns=NAMED))["val"]
    return hashlib.sha256(
        repr(rows.cast_column("image", datasets.Image(decode=False))[:]["image"]).encode()
    ).hexdigest()


@pytest.mark.parametrize(
    ("cells", "error", "message"),
    [
        ({"text": " "}, ValueError, r"^[^\n]*val.parquet, split val, row 1: one of the phrases \[''\] is empty"),
        ({"image": {"bytes": noise(1, "JPEG")[:-200], "path": None}}, OSError, r"val.parquet, ref_id 1: .*truncated"),
        ({"image": {"bytes": b"GIF", "path": None}}, OSError, r"val.parquet, split val, row 1: the embedded image"),
    ],
)  # fmt: skip
def test_loading_stops_at_the_first_bad_record(tmp_path, cells, error, message):
    rows = plain(noise(1), noise(1), noise(1))
    rows[1] |= cells
    records = open_plain(tmp_path / "val.parquet", rows)
    for _ in range(2):  # nothing half-made is found by the next
        with pytest.raises(error, match=message):
            load_records(records)
    assert not [path for path in (tmp_path / "cache").rglob("*.incomplete")]


def test_ref_ids_that_two_rows_share(tmp_path):
    rows = [row | {"number": 7} for row in plain(noise(1), noise(2))]
    records = open_records("table", write_plain(tmp_path / "val.parquet", rows), columns=NAMED | {"ref_id": "number"})
    with pytest.raises(ValueError, match="1 ref_ids stand at several refs, such as 7"):
        load_records(records)
    assert prepare.prepare(records, tmp_path / "out", num_proc=1)["left_out"] == 1
    assert list(problems_of(tmp_path / "out")) == [1]


def test_a_ref_id_that_is_filled_in_is_no_other_rows(tmp_path):
    numbers = ("1", None, None, "0", "9")
    rows = [plain(noise(seed))[0] | {"number": number} for seed, number in enumerate(numbers)]
    records = open_records("table", write_plain(tmp_path / "val.parquet", rows), columns=NAMED | {"ref_id": "number"})
    assert load_records(records)["val"]["ref_id"][:] == [1, 2, 3, 0, 9]


def test_each_image_is_checked_once(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(records_module, "check_image", lambda image, *_: checked.append(image))
    names = [{"bytes": noise(seed), "path": f"{index}.png"} for index, seed in enumerate((1, 2, 1, 1))]
    load_records(open_plain(tmp_path / "val.parquet", plain(*names)))
    assert checked == [noise(1), noise(2)]


# The Hub

PUSH = """
from huggingface_hub import HfApi

HfApi().create_repo("someone/table", repo_type="dataset")
HfApi().upload_folder(folder_path="table", repo_id="someone/table", repo_type="dataset")
"""
LOAD = """
from pathlib import Path
import json

from data.records import load_records
from data.sources import open_records

columns = json.loads(Path("columns.json").read_text())
found = load_records(open_records("table", PATH, columns=columns, splits=["val"]))
print(json.dumps({split: rows["ref_id"][:] for split, rows in found.items()}))
"""
REFUSED = """
for path, splits, error in (("hub:someone/nothing", None, OSError), ("hub:someone/table", ["dev"], ValueError)):
    try:
        open_records("table", path, columns=columns, splits=splits)
    except error as found:
        print(f"{type(found).__name__}: {found}")
"""


@pytest.mark.slow
def test_tables_of_the_hub(tmp_path):
    refer_set = small_set(tmp_path)
    folder = written(refer_set, tmp_path / "table", "parquet")["path"]
    (tmp_path / "columns.json").write_text(json.dumps(COLUMNS))
    (folder / "table.py").write_text("raise SystemExit('code of the data set was run')")
    shutil.copy(next((folder / "data").glob("val-*")), tmp_path / "secret.parquet")
    files = [{"split": "val", "path": str(tmp_path / "secret.parquet")}]
    card = {"configs": [{"config_name": "default", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    expected = {"val": [ref["ref_id"] for ref in refer_set.refs if ref["split"] == "val"]}
    cache = tmp_path / "hub_cache"
    with HubServer() as server:
        run_client(PUSH, server, tmp_path, isolated=False)
        code = LOAD.replace("PATH", "'hub:someone/table'") + REFUSED
        printed = run_client(code, server, tmp_path, isolated=False, cache=cache).splitlines()
        assert json.loads(printed[0]) == expected
        assert printed[1].startswith(
            "OSError: someone/nothing is no file or folder here, nor to be had from the Hub: check its name ("
        )
        assert printed[2] == "ValueError: hub:someone/table has no split dev; it has testA, testB, train, val."
        assert {address.rpartition("/")[2] for address in server.downloads} == {"val-00000-of-00001.parquet"}
        server.downloads.clear()
        offline = run_client(
            LOAD.replace("PATH", "'someone/table'"), server, tmp_path, isolated=False, cache=cache, HF_HUB_OFFLINE="1"
        )
        assert json.loads(offline) == expected and not server.downloads
