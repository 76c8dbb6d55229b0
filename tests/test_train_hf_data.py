"""The data part of train_hf.py: what is wrong with a stranger's set is told as what it is."""

import io
import json
import os

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from helpers.refer_folder import HEIC, ReferFolder, not_waiting
from PIL import ExifTags

from data import decoding, prepare
from data.decoding import read_image, read_mask, read_phrases, read_whole_mask
from data.refer import FEATURES, RleMask
from data.sources import open_records
from data.streaming import StreamedBatches
from training.arguments import DataArguments
from training.rows import load_rows, load_splits

HEIGHT, WIDTH = 6, 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_row(ref_id, **changes):
    file = io.BytesIO()
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(file, "PNG")
    return {
        "image": {"path": None, "bytes": file.getvalue()},
        "mask": RleMask().encode_example(np.eye(HEIGHT, WIDTH)),
        "sentences": ["a cat"],
        "ref_id": ref_id,
        "ann_id": ref_id,
        "image_id": 0,
        "category": "",
        "bbox": [0.0, 0.0, 1.0, 1.0],
    } | changes


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


@pytest.mark.parametrize("write", [save, write_prepared])
@pytest.mark.parametrize(
    "rows, message",
    [
        ([make_row(3), make_row(4), make_row(3)], "1 ref_ids stand at several refs, such as 3; give each its own"),
        (
            [make_row(3), make_row(4, mask=None)],
            "1 rows whose mask is null, first row 1 with ref_id 4: give an empty mask",
        ),
        ([make_row(3, sentences=None), make_row(4)], "1 rows whose sentences is null, first row 0 with ref_id 3"),
        ([make_row(3), make_row(None)], "1 rows whose ref_id is null, first row 1 with ref_id None: number the rows"),
    ],
)
def test_numbers_that_repeat_and_nulls_are_told_as_such(tmp_path, write, rows, message):
    name = write(tmp_path / "set", train=make_rows(make_row(1)), val=make_rows(*rows))
    with pytest.raises(ValueError, match=rf"^Split 'val(idation)?' of .*set.*{message}"):
        load_splits(name, DataArguments())


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_rows_is_told_as_such(tmp_path, split):
    splits = {"train": make_rows(make_row(1)), "val": make_rows(make_row(2)), split: make_rows()}
    with pytest.raises(ValueError, match="saved has a split without any row"):
        load_splits(save(tmp_path / "saved", **splits), DataArguments())
    with pytest.raises(ValueError, match="Split '(train|validation)' of .*prepared has no rows"):
        load_splits(write_prepared(tmp_path / "prepared", **splits), DataArguments())


def test_a_streamed_split_without_rows_is_told_as_such(tmp_path):
    name = write_prepared(tmp_path / "prepared", train=make_rows())
    rows, *_ = load_rows(DataArguments(dataset=name, streaming=True), True, False, False)
    with pytest.raises(ValueError, match="The split to train on has no rows"):
        StreamedBatches(rows, 4, 0, 1, 1, 0)


def test_null_parts_of_a_row_are_named():
    for read in (read_image, read_mask, read_whole_mask):
        with pytest.raises(ValueError, match="row with ref_id 7 cannot be read .the mask is null; give an empty mask"):
            read(make_row(7, mask=None))
    for image in (None, {"path": None, "bytes": None}):
        with pytest.raises(
            OSError, match="embedded in the data set of the row with ref_id 7 cannot be read .it is null"
        ):
            read_image(make_row(7, image=image))


def test_a_size_that_is_not_the_masks_is_no_broken_file(tmp_path):
    for name, exif in (("a.png", None), ("a.jpg", None), ("turned.jpg", 6)):
        kept = PIL.Image.Exif()
        if exif:
            kept[ExifTags.Base.Orientation] = exif
        PIL.Image.new("RGB", (40, 30) if exif else (30, 40)).save(tmp_path / name, exif=kept)
        with pytest.raises(OSError) as error:
            read_image(make_row(7, image={"path": str(tmp_path / name), "bytes": None}))
        assert str(error.value) == (
            f"Image {tmp_path / name} of the row with ref_id 7 is 40 x 30 pixels, height x width, but its mask 6 x 8: "
            "take the image that was annotated, or leave the row out."
        )


@pytest.mark.parametrize("embedded", [False, True])
def test_a_format_that_is_not_read_is_to_be_converted(tmp_path, embedded):
    (tmp_path / "a.jpg").write_bytes(HEIC)
    image = {"path": str(tmp_path / "a.jpg"), "bytes": HEIC if embedded else None}
    with pytest.raises(
        OSError, match=r"a.jpg of the row with ref_id 7 cannot be read \(it is HEIC or AVIF\); convert it"
    ):
        read_image(make_row(7, image=image))


SHORT = [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory"), pa.lib.ArrowMemoryError("no room")]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_want_of_memory_is_not_disguised(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    saved = save(tmp_path / "saved", train=make_rows(make_row(1)))
    prepared = write_prepared(tmp_path / "prepared", train=make_rows(make_row(1)))
    row = make_row(1)
    for target, name, attempt in (
        (decoding.Image, "open", lambda: read_image(row)),
        (decoding, "run_lengths", lambda: read_mask(row)),
        (decoding.RleMask, "decode_example", lambda: read_whole_mask(row)),
        (decoding, "is_int64", lambda: read_phrases(row)),
        (pa.Table, "validate", lambda: load_splits(saved, DataArguments())),
        (datasets, "load_dataset", lambda: load_splits(prepared, DataArguments())),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail) if target is not pa.Table else patch.setattr(
                datasets.table.Table, name, fail
            )
            with pytest.raises(type(error)) as caught:
                attempt()
            assert caught.value is error


def test_want_of_memory_is_found_behind_what_datasets_makes_of_it(tmp_path, monkeypatch):
    prepared = write_prepared(tmp_path / "prepared", train=make_rows(make_row(1)))

    def fail(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from MemoryError("no room")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(MemoryError, match="no room"):
        load_splits(prepared, DataArguments())


@pytest.mark.parametrize("kind", ["pipe", "device", "nothing"])
@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "summary.json", "README.md", "more.parquet"])
def test_pipes_and_devices_in_a_prepared_folder_are_not_read(tmp_path, name, kind):
    folder = tmp_path / "prepared"
    write_prepared(folder, train=make_rows(make_row(1)))
    put_odd_file(folder / name, kind)
    message = f"{name} is no regular file|made neither by data.prepare|cannot be streamed"
    for streaming in (False, True):
        with not_waiting(), pytest.raises(ValueError, match=message):
            load_rows(DataArguments(dataset=str(folder), streaming=streaming), True, False, False)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["dataset_dict.json", "train/data-00000-of-00001.arrow", "train/state.json"])
def test_pipes_and_devices_in_a_saved_folder_are_not_read(tmp_path, name, kind):
    saved = save(tmp_path / "saved", train=make_rows(make_row(1)))
    put_odd_file(tmp_path / "saved" / name, kind)
    with not_waiting(), pytest.raises(ValueError, match=f"{name} is no regular file"):
        load_splits(saved, DataArguments())


def put_odd_file(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")


def test_a_pipe_for_an_image_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with (
        not_waiting(),
        pytest.raises(OSError, match="a.jpg of the row with ref_id 7 cannot be read .it is no regular file"),
    ):
        read_image(make_row(7, image={"path": str(tmp_path / "a.jpg"), "bytes": None}))


def test_any_refer_set_is_trained_on_with_its_images(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    folder.write("rrsisd", "unc")
    images = folder.images.rename(tmp_path / "JPEGImages")
    arguments = {"data_root": str(folder.root), "dataset": "rrsisd/unc", "test_splits": ["testA", "rrsisd:unc:testB"]}
    arguments = DataArguments(**arguments, images=str(images))
    _, val, tests = load_rows(arguments, False, True, True)
    assert val["ann_id"][:] == [12]
    assert {name: rows["ann_id"][:] for name, rows in tests.items()} == {"testA": [13], "rrsisd:unc:testB": [15]}
    arguments.test_splits = []
    train, *_ = load_rows(arguments, True, False, False)
    assert train["ann_id"][:] == [10, 11, 14, 16]
    assert read_image(train[0]).shape == (30, 40, 3)
    with pytest.raises(ValueError, match="no data set 'rrsisd' split by 'unc'.*`images` says where"):
        load_splits("rrsisd/unc", DataArguments(data_root=str(folder.root)))
    with pytest.raises(ValueError, match="images is the folder of a REFER set's images: give data_root"):
        DataArguments(images=str(images))


def test_lmdb_folders_are_told_from_others(tmp_path):
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / "train.lmdb").write_bytes(bytes(8192))
    with pytest.raises(ValueError, match="refcoco was made neither .*LMDB files.*anns/ and masks/.*data.prepare cris"):
        load_splits(str(tmp_path / "refcoco"), DataArguments())
    with pytest.raises(FileNotFoundError, match="does not exist; .*LMDB files.*anns/ and masks/"):
        load_splits("refcoco/unc", DataArguments(data_root=str(tmp_path)))


def test_a_prepared_set_of_grefcoco_keeps_what_it_skipped(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    folder.refs[0]["sentences"] = []
    folder.write("grefcoco")
    (folder.root / "grefcoco" / "refs(unc).p").unlink()
    (folder.root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(folder.refs))
    prepare.prepare(open_records("refer", folder.root, "grefcoco/unc"), tmp_path / "out", num_proc=1)
    assert load_splits(str(tmp_path / "out"), DataArguments())["train"]["ann_id"][:] == [11, 14, 16]
