"""Tables with pixels and sets of the Hub by the names that runs give them: the rows of REFER, and its figures."""

import json
import os
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.hub_client import run_client
from helpers.hub_server import HubServer
from helpers.other_layouts import ReferSet, assert_same_rows
from helpers.refer_folder import MINI, ROOT, ReferFolder, not_waiting
from helpers.rows import make_row, make_rows, save
from helpers.table_writers import COLUMNS, SCHEMAS, columns, write
from helpers.tiny_conversion import write_tiny_conversion

from convert_detris_checkpoint import main as convert
from data.masks import RleMask
from data.mixture import Mixture
from data.opening import load_splits
from data.refer import load_refer
from training.arguments import DataArguments
from training.rows import load_rows

TABLE = "refcoco_benchmark"
PAPER = {  # in the paper's order: the table's splits, and REFER's
    "refcoco_unc_val": "refcoco:unc:val",
    "refcoco_unc_testA": "refcoco:unc:testA",
    "refcoco_unc_testB": "refcoco:unc:testB",
    "refcoco_plus_unc_val": "refcoco+:unc:val",
    "refcoco_plus_unc_testA": "refcoco+:unc:testA",
    "refcoco_plus_unc_testB": "refcoco+:unc:testB",
    "refcocog_umd_val": "refcocog:umd:val",
    "refcocog_umd_test": "refcocog:umd:test",
    "refcocog_google_val": "refcocog:google:val",
}

pytestmark = pytest.mark.usefixtures("one_thread")
needs_mini = pytest.mark.skipif(not MINI.exists(), reason="needs shared/refer_mini beside the repository")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def refer_set(tmp_path):
    """The small set with the objects that have polygons, over images that are named as COCO's."""
    folder = ReferFolder(tmp_path / "refer")
    for image in folder.instances["images"]:
        path, image["file_name"] = folder.images / image["file_name"], f"COCO_train2014_{image['id']:012d}.jpg"
        path.rename(folder.images / image["file_name"])
    folder.refs = [ref for ref in folder.refs if ref["ann_id"] in (10, 11, 15)]
    for ref, split in zip(folder.refs, ("train", "train", "val"), strict=True):
        ref["split"] = split
    folder.write()
    return ReferSet(folder.root, "refcoco/unc")


@pytest.fixture
def table(refer_set, tmp_path):
    """Its rows as a table of the Hub holds them."""
    return write(SCHEMAS[TABLE], SCHEMAS[TABLE].rows(refer_set), tmp_path / "table", "parquet")


# --- tables by their path -----------------------------------------------------------------------------------------


def test_a_table_is_opened_by_its_path(refer_set, table, tmp_path):
    theirs = load_refer(refer_set.refer, "refcoco", "unc")
    assert_same_rows(decoded(load_splits(str(table))), theirs)
    val = load_splits(str(table), splits=["val"])
    assert list(val) == ["val"]
    assert_same_rows(decoded(val), datasets.DatasetDict(val=theirs["val"]))
    file = str(shutil.copy(table / "data" / "val-00000-of-00001.parquet", tmp_path / "mine.parquet"))
    assert_same_rows(decoded(load_splits(file)), datasets.DatasetDict(mine=theirs["val"]))
    saved = write(SCHEMAS[TABLE], SCHEMAS[TABLE].rows(refer_set), tmp_path / "saved", "saved")
    assert_same_rows(decoded(load_splits(str(saved))), theirs)
    args = DataArguments(dataset=f"{table}:train", eval_split="val", test_splits=[f"{tmp_path}/mine.parquet:mine"])
    train, evaluation, tests = load_rows(args, False, True, True)[1:]
    assert train is None and evaluation["ref_id"][:] == tests[args.test_splits[0]]["ref_id"][:] == [115]


def decoded(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    return splits.cast_column("image", datasets.Image()).cast_column("mask", RleMask())


def test_columns_name_what_a_table_of_no_known_layout_holds(refer_set, tmp_path):
    schema = columns("rle")
    path = str(write(schema, schema.rows(refer_set), tmp_path / "own", "parquet"))
    theirs = load_refer(refer_set.refer, "refcoco", "unc")
    args = DataArguments(dataset=path, columns=COLUMNS, test_splits=["val"])
    train, evaluation, tests = load_rows(args, True, True, True)[1:]
    assert train["sentences"][:] == theirs["train"]["sentences"][:]
    assert evaluation["sentences"][:] == tests["val"]["sentences"][:] == theirs["val"]["sentences"][:]
    prepared = save(tmp_path / "prepared", val=make_rows(make_row(1)))
    assert load_splits(prepared, columns=COLUMNS)["val"]["ref_id"][:] == [1]  # which columns are not meant for
    with pytest.raises(ValueError, match="of no known layout; missing are .*--columns image="):
        load_splits(path)
    with pytest.raises(ValueError, match=r"no columns \['nosuch'\]"):
        load_splits(path, columns=COLUMNS | {"text": "nosuch"})


def test_a_split_that_a_table_lacks_is_refused_with_those_there_are(table):
    with pytest.raises(ValueError, match="table has no split testA; it has train, val"):
        load_splits(str(table), splits=["val", "testA"])
    with pytest.raises(ValueError, match="has no split dev; it has train, val"):
        load_rows(DataArguments(dataset=str(table), eval_split="dev"), False, True, False)


def test_prepared_rows_in_parquet_are_read_as_they_are(tmp_path, monkeypatch):
    """As data.prepare pushes them, or somebody has moved them, without the summary."""
    (tmp_path / "moved" / "data").mkdir(parents=True)
    rows = make_rows(make_row(3), make_row(4))
    rows.to_parquet(tmp_path / "moved" / "data" / "val-00000-of-00001.parquet")
    monkeypatch.setattr("data.opening.open_records", None)
    loaded = load_splits(str(tmp_path / "moved"))
    assert loaded["val"]["ref_id"][:] == [3, 4]
    somewhere = {"path": "/etc/hostname", "bytes": None}
    table = pa.table(rows.data.table.to_pydict() | {"image": [somewhere, rows.data.table["image"][1].as_py()]})
    pq.write_table(table, tmp_path / "moved" / "data" / "val-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match="'val' of .*moved has images of which it holds only the paths.*--embed_images"
    ):
        load_splits(str(tmp_path / "moved"))


def test_pipes_and_links_among_parquet_files_are_not_read(table, tmp_path):
    file = table / "data" / "val-00000-of-00001.parquet"
    outside = file.rename(tmp_path / "outside.parquet")
    file.symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        load_splits(str(table))
    file.unlink()
    os.mkfifo(file)
    with not_waiting(), pytest.raises(ValueError, match="is no regular file"):
        load_splits(str(table))


def test_tables_are_not_streamed(table):
    with pytest.raises(ValueError, match="table' cannot be streamed: .* `python -m data.prepare` has made"):
        load_rows(DataArguments(dataset=str(table), streaming=True), True, False, False)


# --- leaks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains_on", ["refer", "table"])
def test_images_of_a_table_and_of_refer_are_told_by_cocos_number(refer_set, table, tmp_path, trains_on, caplog):
    names = {"refer": "refcoco/unc", "table": str(table)}
    tested = {"refer": "refcoco:unc:val", "table": f"{table}:val"}["table" if trains_on == "refer" else "refer"]
    args = DataArguments(dataset=names[trains_on], data_root=str(refer_set.refer), test_splits=[tested])
    rows = load_rows(args, True, False, True)
    assert isinstance(rows.train, Mixture)
    (leak,) = rows.train.leaks
    assert (leak.objects, leak.total_objects) == (1, 2)
    assert rows.train.rows["ref_id"][:] == [110] and rows.tests[tested]["ref_id"][:] == [115]
    assert "1 of 2 objects (2 phrases) leave training" in caplog.text and "no numbers" not in caplog.text


def test_a_tested_set_without_cocos_names_is_told_of(refer_set, tmp_path, caplog):
    other = save(tmp_path / "other", val=make_rows(make_row(1)))
    args = DataArguments(dataset="refcoco/unc", data_root=str(refer_set.refer), test_splits=[f"{other}:val"])
    load_rows(args, True, False, False)
    assert "The images of other have no numbers of COCO's in their names: those" in caplog.text


# --- the Hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


ONLINE = """
from pathlib import Path

import datasets
import pytest
from huggingface_hub.constants import HF_HUB_CACHE

from data.opening import load_splits
from training.arguments import DataArguments
from training.rows import load_rows

datasets.disable_progress_bars()


def ref_ids(splits):
    return {split: rows["ref_id"][:] for split, rows in splits.items()}


def downloaded(name):
    return sorted(file.name.partition("-")[0] for file in Path(HF_HUB_CACHE).glob(f"*{name}/snapshots/*/data/*"))


def refused(message, action, *arguments, **options):
    with pytest.raises((OSError, ValueError), match=message):
        action(*arguments, **options)


args = DataArguments(dataset="hub:someone/table", test_splits=["hub:someone/table:val"])
rows = load_rows(args, False, True, True)
assert rows.evaluation["ref_id"][:] == rows.tests[args.test_splits[0]]["ref_id"][:] == [115]
assert ref_ids(load_splits("hub:someone/mine:val")) == {"val": [3]}
refused("hub:someone/table has no split testA; it has train, val", load_splits, "hub:someone/table", splits=["testA"])
refused("hub:someone/mine has no split dev; it has train, val", load_splits, "hub:someone/mine:dev")
assert downloaded("table") == downloaded("mine") == ["val"]
refused("someone/nosuch .*nor to be had from the Hub", load_splits, "hub:someone/nosuch")
refused("names no data set of the Hub", load_splits, "hub:nosuch")
refused("hub:someone/plain.* of no known layout; .*--columns", load_splits, "hub:someone/plain")
for name in ("hub:someone/paths", "someone/paths"):
    refused(f"'train' of {name} has images of which it holds only the paths", load_splits, name)

args = DataArguments(dataset="hub:someone/mine", streaming=True)
streamed = load_rows(args, True, True, False)
assert len(streamed.train) == 2 and streamed.evaluation["ref_id"][:] == [3]
args = DataArguments(dataset="hub:someone/table", streaming=True)
refused("because it is a table: .*data.prepare table hub:someone/table --output", load_rows, args, True, False, False)

args = DataArguments(dataset="hub:someone/table + 0.5*hub:someone/mine", keep_leaks=True)
train = load_rows(args, True, False, False).train
assert sorted(train.rows["ref_id"][:]) in ([1, 110, 111], [2, 110, 111])
assert downloaded("table") == downloaded("mine") == ["train", "val"]
print(train.describe_leaks())
"""
OFFLINE = """
import pytest

from data.opening import load_splits

assert {split: rows["ref_id"][:] for split, rows in load_splits("hub:someone/table").items()} == REF_IDS
assert load_splits("hub:someone/mine:val")["val"]["ref_id"][:] == [3]
with pytest.raises(OSError, match="someone/nosuch .*nor to be had from the Hub: the Hub does not answer.*OFFLINE"):
    load_splits("hub:someone/nosuch")
"""


@pytest.mark.slow
def test_sets_of_the_hub_are_opened_by_their_ids(table, hub, tmp_path):
    (tmp_path / "mine" / "data").mkdir(parents=True)
    for split, rows in (("train", make_rows(make_row(1), make_row(2))), ("val", make_rows(make_row(3)))):
        rows.to_parquet(tmp_path / "mine" / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "plain").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "plain" / "train.parquet")
    (tmp_path / "paths").mkdir()
    rows = make_rows(make_row(1, image={"path": "/etc/hostname", "bytes": None}))
    pq.write_table(rows.data.table, tmp_path / "paths" / "train.parquet")
    for name in ("table", "mine", "plain", "paths"):
        hub.publish(f"datasets/someone/{name}", files_of(tmp_path / name))
    place = tmp_path / "place"
    (place / "someone" / "table").mkdir(parents=True)  # is not what `hub:` means
    told = run_client(ONLINE, hub, place, isolated=False, cache=tmp_path / "hub_cache")
    assert "someone/table: 1 of 2 objects (2 phrases) STAY in training" in told
    assert "The images of someone/mine have no numbers of COCO's" in told
    ref_ids = {"train": [110, 111], "val": [115]}
    run_client(
        OFFLINE.replace("REF_IDS", repr(ref_ids)),
        hub,
        place,
        isolated=False,
        cache=tmp_path / "hub_cache",
        HF_HUB_OFFLINE="1",
    )


# --- the paper's table --------------------------------------------------------------------------------------------


def write_benchmark(folder: Path) -> Path:
    """All sets of refer_mini in one table, whose splits are named as in the published one."""
    rows = {}
    for name in dict.fromkeys(split.rpartition(":")[0].replace(":", "/") for split in PAPER.values()):
        prefix = name.replace("+", "_plus").replace("/", "_")
        for split, rows_of_split in SCHEMAS[TABLE].rows(ReferSet(MINI, name)).items():
            rows[f"{prefix}_{split}"] = rows_of_split
    return write(SCHEMAS[TABLE], rows, folder, "parquet")


EVALUATE = """
import train_hf

common = ["--model_name_or_path", "model", "--save_masks", "false", "--disable_tqdm", "true", "--report_to", "none"]
common += ["--dataloader_num_workers", "0", "--image_size", "56"]
train_hf.main(["RECIPE", *common, "--output_dir", "of_hub"])
train_hf.write_report = lambda *_: None  # takes most of the time
of_refer = ["--do_predict", "--data_root", "MINI", "--output_dir", "of_refer", "--test_splits", *REFER_SPLITS]
train_hf.main([*common, *of_refer])
"""


@needs_mini
@pytest.mark.slow
def test_the_papers_table_needs_one_command_and_no_coco(official, hub, tmp_path):
    """Over a converted checkpoint, from the Hub; each figure equals that of the REFER reader to the last digit."""
    torch.save(official, tmp_path / "checkpoint.pth")
    convert([str(tmp_path / "checkpoint.pth"), str(tmp_path / "model"), *write_tiny_conversion(tmp_path)])
    hub.publish("datasets/jxu124/refcoco-benchmark", files_of(write_benchmark(tmp_path / "benchmark")))
    evaluate = EVALUATE.replace("RECIPE", str(ROOT / "configs" / "paper_table.yaml")).replace("MINI", str(MINI))
    evaluate = evaluate.replace("*REFER_SPLITS", f"*{list(PAPER.values())}")
    run_client(evaluate, hub, tmp_path, isolated=False, OMP_NUM_THREADS="1")  # small products are slower on several
    # Two of these splits have the same rows here, and clients download the same bytes once.
    downloaded = {Path(address).name.partition("-")[0] for address in hub.downloads if address.endswith(".parquet")}
    assert downloaded < PAPER.keys() and len(downloaded) == len(PAPER) - 1

    of_hub, of_refer = (json.loads((tmp_path / run / "table.json").read_text()) for run in ("of_hub", "of_refer"))
    assert [line.pop("split") for line in of_hub] == [*PAPER, "mean of the rows"]
    assert [line.pop("split") for line in of_refer] == [*PAPER.values(), "mean of the rows"]
    assert of_hub == of_refer and any(line["mIoU"] > 0 for line in of_hub)
    for split, theirs in PAPER.items():
        ours, theirs = (
            [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
            for folder in (tmp_path / "of_hub" / "predictions" / split,)
            + (tmp_path / "of_refer" / "predictions" / theirs.replace(":", "_"),)
        )
        assert sorted(ours, key=str) == sorted(theirs, key=str)
    card = (tmp_path / "of_hub" / "README.md").read_text()
    assert "jxu124/refcoco-benchmark" in card and "hub:" not in card
