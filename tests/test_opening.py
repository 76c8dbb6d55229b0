"""Data sets by their names; what is wrong with a stranger's folder is told as what it is."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.folders import put_odd_file
from helpers.refer_folder import ReferFolder, not_waiting
from helpers.rows import OUT_OF_MEMORY, SOUND, make_row, make_rows, save, write_prepared
from PIL import Image

from data import prepare
from data.decoding import read_image, read_whole_mask
from data.opening import load_splits
from data.sources import open_records
from data.streaming import StreamedRows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_an_unknown_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="refcoco/unc"):
        load_splits("refcocoo")
    with pytest.raises(ValueError, match="refcocoo"):
        load_splits("refcocoo/unc", str(tmp_path))
    for name in (str(tmp_path / "nope"), f"{tmp_path}/own +", "own/folder/nope", "../nope"):
        with pytest.raises(ValueError, match="nor a file or folder"):
            load_splits(name)
    with pytest.raises(ValueError, match="nope' is neither 'shapes' nor a file or folder"):
        load_splits(str(tmp_path / "nope"), str(tmp_path))


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"train_size": 20},
            "shapes_config is {'train_size': 20}: give .* any of seed, sizes, image_size",
        ),
        ([1], r"shapes_config is \[1\]: give a mapping"),
        ([], r"shapes_config is \[\]: give a mapping"),
        ({"seed": "x"}, "seed is 'x'; give a whole number"),
        ({"sizes": 3}, "sizes is 3; give a mapping"),
        ({"sizes": {"train": "x"}}, "The size of 'train' is 'x'; give a whole number"),
        ({"image_size": None}, "image_size is None; give a whole number"),
        ({"object_scale": "1"}, "object_scale is '1'; give more than 0"),
    ],
)
def test_wrong_arguments_of_the_synthetic_set_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        load_splits("shapes", shapes_config=config)


def test_lmdb_folders_are_told_from_others(tmp_path):
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / "train.lmdb").write_bytes(bytes(8192))
    message = "refcoco has no metadata.jsonl .* was made neither .*LMDB files.*anns/ and masks/.*data.prepare cris"
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / "refcoco"))
    with pytest.raises(FileNotFoundError, match="does not exist; .*LMDB files.*anns/ and masks/"):
        load_splits("refcoco/unc", str(tmp_path))


@pytest.mark.parametrize("in_splits", [False, True])
def test_a_folder_of_ones_own_is_read_as_it_is(tmp_path, in_splits):
    for split, colour, sentence in (("train", "green", "the ball"), ("val", "grey", "a round thing")):
        folder = tmp_path / "mine" / split if in_splits else tmp_path / "mine"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), colour).save(folder / f"{colour}.png")
        polygon = [[5, 5, 20, 5, 20, 20, 5, 20]]
        line = {"file_name": f"{colour}.png", "sentences": [sentence], "mask": polygon, "split": split}
        with open(folder / "metadata.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    splits = load_splits(str(tmp_path / "mine"))
    assert {split: rows["sentences"][:] for split, rows in splits.items()} == {
        "train": [["the ball"]],
        "val": [["a round thing"]],
    }
    assert read_whole_mask(splits["val"][0]).sum() == 15 * 15
    assert np.asarray(read_image(splits["train"][0])).shape == (48, 64, 3)


def test_a_broken_line_of_ones_own_folder_is_named(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "sentences": ["x"]}\n')
    with pytest.raises(ValueError, match="metadata.jsonl, line 1: .*mask"):
        load_splits(str(tmp_path))


def test_a_saved_folder_gives_the_same_rows(shapes, tmp_path):
    datasets.DatasetDict({name: shapes[name] for name in ("train", "val")}).save_to_disk(tmp_path / "saved")
    loaded = load_splits(str(tmp_path / "saved"))
    assert loaded["val"]["sentences"] == shapes["val"]["sentences"]
    loaded.remove_columns("mask").save_to_disk(tmp_path / "maskless")
    with pytest.raises(ValueError, match=r"'train' of .*maskless has no columns \['mask'\]"):
        load_splits(str(tmp_path / "maskless"))
    assert np.array_equal(read_image(loaded["val"][2]), read_image(shapes["val"][2]))


def test_a_single_split_that_was_saved_is_read(tmp_path, caplog):
    make_rows(make_row(3)).save_to_disk(tmp_path / "prepared")
    assert load_splits(str(tmp_path / "prepared"))["train"]["ref_id"][:] == [3] and not caplog.text
    load_splits(str(tmp_path / "prepared"), columns={"image": "image", "mask": "mask", "text": "sentences"})
    assert "prepared is a prepared set, whose columns are known: `columns` is not read" in caplog.text
    table = make_rows(make_row(3, mask=None)).remove_columns(["ref_id", "bbox"])
    table.add_column("text", ["nothing"]).save_to_disk(tmp_path / "table")
    rows = load_splits(str(tmp_path / "table"), columns={"image": "image", "mask": "mask", "text": "text"})["train"]
    assert rows["sentences"][:] == [["nothing"]]


@pytest.mark.parametrize("column, values", [("sentences", ["a cat"]), ("ref_id", ["x"]), ("mask", ["x"])])
def test_columns_of_other_types_are_refused(tmp_path, column, values):
    table = pa.table({name: pa.array([value]) for name, value in SOUND.items()} | {column: pa.array(values)})
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"Column '{column}' in split 'train' of .* is not what docs/data.md"):
        load_splits(str(tmp_path / "saved"))
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(OSError, match="train.parquet cannot be read"):
        list(StreamedRows([str(tmp_path / "train.parquet")]).read([0], 0, 1))


def test_columns_of_plain_types_are_taken_for_what_they_are(tmp_path):
    table = pa.table({name: pa.array([value]) for name, value in SOUND.items()})
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(tmp_path / "saved")
    (row,) = load_splits(str(tmp_path / "saved"))["train"]
    assert np.array_equal(read_whole_mask(row), np.eye(48, 64)) and read_image(row).size == (64, 48)


def test_a_saved_folder_that_leads_arrow_out_of_its_memory_is_refused(tmp_path):
    table = pa.table({name: pa.array([value] * 3) for name, value in SOUND.items()})
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved" / "train").glob("*.arrow")
    offsets = np.array([0, 5, 10, 15], np.int32).tobytes()  # of three phrases
    assert file.read_bytes().count(offsets) == 1
    file.write_bytes(file.read_bytes().replace(offsets, np.array([0, 2**30, 2**30, 2**30], np.int32).tobytes()))
    with pytest.raises(OSError, match="saved is broken .*save or copy it again"):
        load_splits(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    "name", ["{home}/other/train/data-00000-of-00001.arrow", "../../other/train/data-00000-of-00001.arrow"]
)
def test_a_saved_folder_names_no_files_outside(tmp_path, name):
    for folder in ("other", "saved"):
        save(tmp_path / folder, train=make_rows(make_row(1)))
    state = tmp_path / "saved" / "train" / "state.json"
    files = [{"filename": name.format(home=tmp_path)}]
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": files}))
    with pytest.raises(ValueError, match="state.json: .*arrow' is not inside"):
        load_splits(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("file", "content"),
    [("dataset_info.json", "[]"), ("dataset_info.json", '{"features": 7}'), ("data-00000-of-00001.arrow", "\xff")],
)
def test_a_broken_file_of_a_saved_folder_is_told_as_such(tmp_path, file, content):
    save(tmp_path / "saved", train=make_rows(make_row(1)))
    (tmp_path / "saved" / "train" / file).write_text(content)
    with pytest.raises(OSError, match="saved is broken .*save or copy it again"):
        load_splits(str(tmp_path / "saved"))


@pytest.mark.parametrize("path", ["{home}/other/train-*.parquet", "../other/train-*.parquet"])
def test_the_card_of_a_prepared_folder_names_no_files_outside(tmp_path, path):
    for folder in ("other", "mine"):
        write_prepared(tmp_path / folder, train=make_rows(make_row(1)))
    card = {"configs": [{"config_name": "default", "data_files": path.format(home=tmp_path)}]}
    (tmp_path / "mine" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    with pytest.raises(ValueError, match="card of .*mine names the file .*, which is not in this data set"):
        load_splits(str(tmp_path / "mine"))


@pytest.mark.parametrize("card", ["configs: [", "configs: 7", "dataset_info: {features: [{name: a, dtype: nope}]}"])
def test_a_broken_card_is_named(tmp_path, card):
    folder = write_prepared(tmp_path / "mine", train=make_rows(make_row(1)))
    (tmp_path / "mine" / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(ValueError, match="The card of .*mine cannot be read .*correct its README.md"):
        load_splits(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"files": [1]}', "[" * 10**5])
def test_a_broken_summary_is_named(prepared, tmp_path, content):
    folder = shutil.copytree(prepared, tmp_path / "out")
    (folder / "summary.json").write_text(content)
    with pytest.raises(ValueError, match="summary.json (is not a JSON file|does not say)"):
        load_splits(str(folder))


def test_what_is_no_prepared_folder_is_named(tmp_path):
    (tmp_path / "annotations.json").write_text("{}")
    with pytest.raises(ValueError, match="neither by data.prepare nor by save_to_disk.*data.prepare <kind>"):
        load_splits(str(tmp_path))
    with pytest.raises(
        OSError, match="'prepared/nosuch' is no folder here, nor to be had from the Hub: .*HF_HUB_OFFLINE"
    ):
        load_splits("prepared/nosuch")


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
        load_splits(name)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_rows_is_told_as_such(tmp_path, split):
    splits = {"train": make_rows(make_row(1)), "val": make_rows(make_row(2)), split: make_rows()}
    with pytest.raises(ValueError, match="saved has a split without any row"):
        load_splits(save(tmp_path / "saved", **splits))
    with pytest.raises(ValueError, match="Split '(train|validation)' of .*prepared has no rows"):
        load_splits(write_prepared(tmp_path / "prepared", **splits))


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["dataset_dict.json", "train/data-00000-of-00001.arrow", "train/state.json"])
def test_pipes_and_devices_in_a_saved_folder_are_not_read(tmp_path, name, kind):
    saved = save(tmp_path / "saved", train=make_rows(make_row(1)))
    put_odd_file(tmp_path / "saved" / name, kind)
    with not_waiting(), pytest.raises(ValueError, match=f"{name} is no regular file"):
        load_splits(saved)


def test_a_prepared_set_of_grefcoco_keeps_what_it_skipped(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    folder.refs[0]["sentences"] = []
    folder.write("grefcoco")
    (folder.root / "grefcoco" / "refs(unc).p").unlink()
    (folder.root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(folder.refs))
    prepare.prepare(open_records("refer", folder.root, "grefcoco/unc"), tmp_path / "out", num_proc=1)
    assert load_splits(str(tmp_path / "out"))["train"]["ann_id"][:] == [11, 14, 16]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_want_of_memory_is_not_told_as_a_broken_data_set(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    saved = save(tmp_path / "saved", train=make_rows(make_row(1)))
    prepared = write_prepared(tmp_path / "prepared", train=make_rows(make_row(1)))
    for target, name, folder in ((datasets.table.Table, "validate", saved), (datasets, "load_dataset", prepared)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(type(error)) as caught:
                load_splits(folder)
            assert caught.value is error


def test_want_of_memory_is_found_behind_what_datasets_makes_of_it(tmp_path, monkeypatch):
    prepared = write_prepared(tmp_path / "prepared", train=make_rows(make_row(1)))

    def fail(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from MemoryError("no room")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(MemoryError, match="no room"):
        load_splits(prepared)
