"""Which rows a run sees: splits, mixtures, streams; what is wrong with a stranger's set is told as what it is."""

import shutil

import datasets
import numpy as np
import pytest
from helpers.folders import put_odd_file
from helpers.refer_folder import ReferFolder, not_waiting
from helpers.rows import make_row, make_rows, save, write_prepared
from helpers.runs import SIZES

from data.decoding import read_image, read_whole_mask
from data.mixture import Mixture
from data.opening import load_splits
from data.streaming import StreamedBatches, StreamedRows
from training.arguments import DataArguments
from training.rows import dataset_and_split, load_rows, results_name, select_split, shown_names


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- data sets and splits -------------------------------------------------------------------------------------------


def test_a_split_that_is_missing_or_empty_is_refused_with_those_there_are(shapes):
    with pytest.raises(ValueError, match="'test' does not exist.*'val': "):
        select_split(shapes, "test", None)
    with pytest.raises(ValueError, match="'testB' is empty"):
        select_split(shapes, "testB", None)
    assert len(select_split(shapes, "val", 3)) == 3
    assert len(select_split(shapes, "val", 10**6)) == len(shapes["val"])


def test_a_data_set_is_read_once_and_only_when_it_is_asked_for(two_sets):
    rows, images, read = two_sets
    args = DataArguments(
        data_root="unused", test_splits=["refcocog:umd:val", "refcocog:umd:test", "refcocog:umd:train"]
    )
    _, train, val, tests = load_rows(args, do_train=False, do_eval=False, do_predict=True)
    assert train is None and val is None and read == ["refcocog"]
    assert [len(tests[name]) for name in args.test_splits] == [
        sum(len(images[letter]) for letter in letters) for letters in ("a", "b", "cdef")
    ]


def test_the_official_choice_of_a_checkpoint_is_by_first_phrases(two_sets):
    rows, images, _ = two_sets
    arguments = {"dataset": "refcocog/umd", "data_root": "unused", "test_splits": ["val"]}
    _, _, val, tests = load_rows(DataArguments(**arguments, eval_first_phrase_only=True), False, True, True)
    expected = [rows[index] for index in images["a"]]
    assert val["sentences"] == [row["sentences"][:1] for row in expected]
    assert all(np.array_equal(read_whole_mask(ours), row["mask"]) for ours, row in zip(val, expected, strict=True))
    for every_phrase in (tests["val"], load_rows(DataArguments(**arguments), False, True, False).evaluation):
        assert every_phrase["sentences"] == [row["sentences"] for row in expected] != val["sentences"]


def test_any_refer_set_is_trained_on_with_its_images(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    folder.write("aerial", "unc")
    images = folder.images.rename(tmp_path / "JPEGImages")
    arguments = {"data_root": str(folder.root), "dataset": "aerial/unc", "test_splits": ["testA", "aerial:unc:testB"]}
    arguments = DataArguments(**arguments, images=str(images))
    _, _, val, tests = load_rows(arguments, False, True, True)
    assert val["ann_id"][:] == [12]
    assert {name: rows["ann_id"][:] for name, rows in tests.items()} == {"testA": [13], "aerial:unc:testB": [15]}
    arguments.test_splits = []
    _, train, *_ = load_rows(arguments, True, False, False)
    assert train["ann_id"][:] == [10, 11, 14, 16]
    assert read_image(train[0]).shape == (30, 40, 3)
    with pytest.raises(ValueError, match="no data set 'aerial' split by 'unc'.*`images` says where"):
        load_splits("aerial/unc", str(folder.root))
    with pytest.raises(ValueError, match="images is the folder of the images of a REFER set or a table: give"):
        DataArguments(images=str(images))


@pytest.mark.parametrize(
    "test_split, dataset, split, name",
    [
        ("val", "first", "val", "val"),
        ("train", "first", "train", "test_train"),
        ("refcoco+:unc:testA", "refcoco+/unc", "testA", "refcoco+_unc_testA"),
        ("prepared/mine:val", "prepared/mine", "val", "prepared_mine_val"),
        ("hub:someone/x.y:val", "hub:someone/x.y", "val", "hub_someone_x.y_val"),
        (f"/a/{'b' * 300}/t.parquet:val", f"/a/{'b' * 300}/t.parquet", "val", f"{'b' * 136}_t.parquet_val"),
    ],
)
def test_test_splits_are_taken_apart_and_named_in_files(test_split, dataset, split, name):
    assert dataset_and_split(test_split, "first") == (dataset, split)
    assert results_name(test_split) == name


def test_a_folder_with_a_colon_in_its_name_is_tested_on(tmp_path):
    folder = save(tmp_path / "co:lon:x", val=make_rows(make_row(1)))
    (rows,) = load_rows(DataArguments(test_splits=[f"{folder}:val"]), False, False, True).tests.values()
    assert rows["ref_id"][:] == [1]
    with pytest.raises(ValueError, match="Split 'vall' does not exist in .*co:lon:x; splits with rows are {'val': 1}"):
        load_rows(DataArguments(test_splits=[f"{folder}:vall"]), False, False, True)


def test_results_are_called_without_the_paths_of_this_machine(tmp_path):
    for folder in ("p/bench", "t/bench", "own\nset"):
        (tmp_path / folder).mkdir(parents=True)
    given = [f"{tmp_path}/p/bench:val", f"{tmp_path}/t/bench:val", f"{tmp_path}/own\nset:val", "val", "hub:a/b:val"]
    shown = list(shown_names(given).values())
    assert shown == ["p/bench:val", "t/bench:val", "own set:val", "val", "hub:a/b:val"]
    assert list(map(results_name, shown))[:2] == ["p_bench_val", "t_bench_val"]


def test_test_splits_whose_results_would_have_one_name_are_refused():
    args = DataArguments(test_splits=["a/b:val", "a_b:val"])
    with pytest.raises(ValueError, match="'a/b:val' and 'a_b:val', whose results would both be called a_b_val"):
        load_rows(args, False, False, True)


# --- mixtures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["refcoco+/unc + ", "refcoco+/unc + refcoco+/unc"])
def test_a_mixture_of_nothing_or_the_same_is_refused(two_sets, name):
    with pytest.raises(ValueError, match="names a data set twice|has the member"):
        load_rows(DataArguments(dataset=name, data_root="unused"), do_train=True, do_eval=False, do_predict=False)


def test_a_mixture_trains_on_no_image_of_another_split(two_sets, caplog):
    rows, images, read = two_sets
    args = DataArguments(dataset="refcoco+/unc + refcocog/umd", data_root="unused", test_splits=["refcocog:umd:test"])
    _, train, val, tests = load_rows(args, do_train=True, do_eval=True, do_predict=True)

    def ref_ids(letters: str) -> list[int]:
        return [rows[index]["ref_id"] for letter in letters for index in images[letter]]

    assert list(train.rows["ref_id"]) == ref_ids("cd" + "cdf")
    assert list(val["ref_id"]) == ref_ids("e")
    assert list(tests["refcocog:umd:test"]["ref_id"]) == ref_ids("b")
    assert read == ["refcoco+", "refcocog"]
    for name, all_images, leaks in (("refcoco+/unc", "abcd", "ab"), ("refcocog/umd", "cdef", "e")):
        phrases = sum(len(rows[index]["sentences"]) for letter in leaks for index in images[letter])
        counts = f"{len(ref_ids(leaks))} of {len(ref_ids(all_images))} objects ({phrases} phrases)"
        assert f"{name}: {counts} leave training" in caplog.text


def test_images_of_a_split_tested_on_leave_a_single_sets_training_too(two_sets, caplog):
    rows, images, _ = two_sets
    args = DataArguments(dataset="refcoco+/unc", data_root="unused", test_splits=["refcocog:umd:val"])
    train = load_rows(args, do_train=True, do_eval=False, do_predict=True).train
    assert isinstance(train, Mixture)
    assert list(train.rows["ref_id"]) == [rows[index]["ref_id"] for letter in "bcd" for index in images[letter]]
    assert "leave training" in caplog.text and train.describe_leaks() in caplog.text


def test_a_column_called_repetition_makes_no_mixture(tmp_path):
    rows = make_rows(make_row(1), make_row(2)).add_column("repetition", [0, 1])
    train = load_rows(DataArguments(dataset=save(tmp_path / "saved", train=rows)), True, False, False).train
    assert isinstance(train, datasets.Dataset) and train["repetition"][:] == [0, 1]


def test_folders_may_be_called_like_mixtures_and_tested_on_by_name(prepared, tmp_path):
    for name in ("val + x", "v:1", "2*x"):
        folder = shutil.copytree(prepared, tmp_path / name)
        train_rows = load_rows(DataArguments(dataset=str(folder)), True, False, False).train
        assert len(train_rows) == 38
    args = DataArguments(dataset="shapes", shapes_config={"sizes": SIZES}, test_splits=[f"{prepared}:val"])
    assert len(load_rows(args, False, False, True).tests[f"{prepared}:val"]) == 3


# --- prepared folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", ["missing", "all missing", "broken", "broken rows"])
def test_a_damaged_prepared_folder_is_refused(prepared, tmp_path, damage, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = shutil.copytree(prepared, tmp_path / "out")
    files = sorted(folder.glob("train-*.parquet"))
    for file in files if damage == "all missing" else files[1:2]:
        content = file.read_bytes()
        file.unlink()
        if damage == "broken":
            file.write_bytes(content[:-9])
        elif damage == "broken rows":
            file.write_bytes(content[:4] + bytes(3000) + content[3004:])
    missing = "lacks 3 of its 4 files" if damage == "all missing" else "lacks 1 of its 4 files, such as train-00001-of"
    message = missing if "missing" in damage else "cannot be read .*anew"
    with pytest.raises(OSError, match=message):
        train_rows = load_rows(DataArguments(dataset=str(folder), streaming=streaming), True, False, False).train
        list(StreamedBatches(train_rows, 4, 0, 1, 1, 0))  # only then are rows streamed


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


# --- streaming ------------------------------------------------------------------------------------------------------


def test_streaming_reads_no_other_training_rows(prepared, monkeypatch):
    """The other splits are read as always, the training split not even if its files are unreadable."""
    arguments = DataArguments(dataset=str(prepared), streaming=True, test_splits=["val"], shuffle_buffer_size=3)
    load_dataset, loaded = datasets.load_dataset, []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: loaded.append(kwargs) or load_dataset(*args, **kwargs)
    )
    _, train_rows, eval_rows, test_rows = load_rows(arguments, True, True, True)
    assert [list(options["data_files"]) for options in loaded] == [["val"]]
    assert isinstance(train_rows, StreamedRows) and len(train_rows) == 38 and train_rows.shuffle_buffer_size == 3
    assert len(eval_rows) == len(test_rows["val"]) == 3
    without = load_rows(DataArguments(dataset=str(prepared)), True, True, False)
    assert len(without.train) == 38
    assert (
        without.evaluation["ref_id"][:] == eval_rows["ref_id"][:] and eval_rows.features == without.evaluation.features
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": "shapes"}, "'shapes' cannot be streamed: .*data.prepare"),
        ({"dataset": "refcoco/unc", "data_root": "."}, "'refcoco/unc' cannot be streamed"),
        ({"dataset": "shapes + refcoco/unc"}, "streaming takes one data set, not the mixture 'shapes"),
        ({"train_split": "trian"}, "no split 'trian' to train on: it has .*'train'"),
        ({"eval_split": "vall"}, "'vall' does not exist"),
        ({"max_train_samples": 3}, "leave max_train_samples out"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size is 0"),
        ({"dataset": "prepared/nosuch"}, "no folder here, nor to be had from the Hub"),
    ],
)
def test_what_cannot_be_streamed_is_refused(prepared, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        load_rows(DataArguments(**{"dataset": str(prepared), "streaming": True} | changes), True, True, False)


def test_a_streamed_split_without_rows_is_told_as_such(tmp_path):
    name = write_prepared(tmp_path / "prepared", train=make_rows())
    rows = load_rows(DataArguments(dataset=name, streaming=True), True, False, False).train
    with pytest.raises(ValueError, match="The split to train on has no rows"):
        StreamedBatches(rows, 4, 0, 1, 1, 0)
