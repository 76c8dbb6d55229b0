"""Tables with pixels prepared: their images come along, and are not all in memory; the command line."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hub_client import run_client
from helpers.hub_server import HubServer
from helpers.other_layouts import assert_same_rows, small_set
from helpers.plain_tables import noise, open_plain, plain, stored_images, write_plain, written
from helpers.prepared import entries, load_prepared, problems_of
from helpers.table_writers import COLUMNS, SCHEMAS, write

from data import prepare
from data.images import END_OF_PNG
from data.records import load_records
from data.sources import open_records

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_a_prepared_table(tmp_path):
    refer_set = small_set(tmp_path)
    records = open_records(**written(refer_set, tmp_path / "table", "parquet"))
    summary = prepare.prepare(records, tmp_path / "out", num_proc=2)
    theirs = prepare.prepare(open_records("refer", refer_set.refer, refer_set.name), tmp_path / "refer_out", 1)
    assert summary["splits"] == theirs["splits"] and summary["left_out"] == 0
    shutil.rmtree(tmp_path / "table")
    loaded = load_prepared(tmp_path / "out", tmp_path)
    assert_same_rows(loaded, load_records(open_records("refer", refer_set.refer, refer_set.name)))
    assert all(image["bytes"] for rows in loaded.values() for image in stored_images(rows))
    files = [f"{split}-00000-of-00001.parquet" for split in refer_set.splits]
    assert entries(tmp_path / "out") == sorted([*files, "README.md", "problems.jsonl", "summary.json"])
    assert not (tmp_path / "out.partial").exists()


def test_processes_chunks_and_files_do_not_matter(tmp_path, monkeypatch):
    records = open_plain(tmp_path / "val.parquet", plain(*(noise(seed) for seed in range(20))))
    monkeypatch.setattr(prepare, "ROWS_PER_FILE_OF_IMAGES", 6)
    found = []
    for run, (num_proc, size) in enumerate([(1, 1000), (2, 7)]):
        monkeypatch.setattr(prepare, "RECORDS_PER_CHUNK", size)
        prepare.prepare(records, tmp_path / f"out{run}", num_proc)
        found.append({path.name: path.read_bytes() for path in (tmp_path / f"out{run}").iterdir()})
    assert found[0] == found[1] and len([name for name in found[0] if name.startswith("val-")]) == 4


def test_images_are_counted_by_their_numbers(tmp_path):
    """Paths say nothing: here all are the same."""
    images = [{"bytes": noise(seed), "path": "image.jpg"} for seed in (1, 2, 1)]
    records = open_plain(tmp_path / "val.parquet", plain(*images))
    assert prepare.prepare(records, tmp_path / "out", num_proc=1)["splits"]["val"]["images"] == 2


KILLED = """
import os, signal, sys
from pathlib import Path

import datasets

datasets.config.HF_DATASETS_CACHE = Path("cache")
from data import prepare, tables

method, limit = sys.argv[1], int(sys.argv[2])
before, calls = getattr(tables.TableRecords, method), []

def die(self, index):
    calls.append(index)
    if len(calls) == limit:
        os.killpg(0, signal.SIGKILL)
    return before(self, index)

setattr(tables.TableRecords, method, die)
prepare.RECORDS_PER_CHUNK = prepare.ROWS_PER_FILE_OF_IMAGES = prepare.IMAGES_AT_ONCE = 4
columns = [f"{name}={name}" for name in ("image", "mask", "text")]
prepare.main(["table", "val.parquet", "--columns", *columns, "--output", "out", "--num_proc", "1"])
"""


@pytest.mark.slow
def test_killed_and_started_again(tmp_path, monkeypatch, table_reads):
    for name in ("RECORDS_PER_CHUNK", "ROWS_PER_FILE_OF_IMAGES", "IMAGES_AT_ONCE"):
        monkeypatch.setattr(prepare, name, 4)
    monkeypatch.chdir(tmp_path)
    records = open_plain(Path("val.parquet"), plain(*(noise(seed) for seed in range(20))))
    expected = prepare.prepare(records, "uninterrupted", num_proc=1)
    table_reads()
    for method, limit in (("read", 10), ("pixels", 6)):
        command = [sys.executable, "-c", KILLED, method, str(limit)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        killed = subprocess.run(command, env=environment, start_new_session=True, capture_output=True)
        assert killed.returncode == -signal.SIGKILL and not Path("out").exists(), killed.stderr
    assert prepare.prepare(records, "out", num_proc=1) == expected
    assert table_reads() == [] and not Path("out.partial").exists()
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == {
        path.name: path.read_bytes() for path in Path("uninterrupted").iterdir()
    }


def test_broken_records_are_listed(tmp_path):
    rows = plain(noise(1), b"no image", noise(2))
    rows[2]["mask"] = [[1.0, 2.0, 3.0]]
    records = open_plain(tmp_path / "val.parquet", rows)
    assert prepare.prepare(records, tmp_path / "out", num_proc=1)["left_out"] == 2
    problems = problems_of(tmp_path / "out")
    assert list(problems) == [1, 2] and all(f"split val, row {row}: " in problems[row] for row in problems)
    with pytest.raises(OSError, match="row 1: the embedded image cannot be read"):
        prepare.prepare(records, tmp_path / "strict", num_proc=1, strict=True)


# Memory


def big_table(path, count, size):
    """Images of so many bytes each: one small PNG, and behind it a number and zeros."""
    writer = None
    for start in range(0, count, 100):
        tails = [b"%08d" % number + bytes(size) + END_OF_PNG for number in range(start, start + 100)]
        table = pa.Table.from_pylist(plain(*[noise(1) + tail for tail in tails]))
        writer = writer or pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False)
        writer.write_table(table)
    writer.close()


MEMORY = """
from pathlib import Path

import datasets
import pyarrow as pa

datasets.config.HF_DATASETS_CACHE = Path("cache")
from data.prepare import prepare
from data.records import load_records
from data.sources import open_records

records = open_records("table", "val.parquet", columns={"image": "image", "mask": "mask", "text": "text"})
prepare(records, "out", num_proc=1)
load_records(records)
print(pa.default_memory_pool().max_memory())
"""


@pytest.mark.slow
def test_thousands_of_images_are_never_in_memory_together(tmp_path):
    size, count = 10_000, 6000
    big_table(tmp_path / "val.parquet", count, size)
    command, environment = [sys.executable, "-c", MEMORY], os.environ | {"PYTHONPATH": str(ROOT)}
    peak = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True).stdout
    assert int(peak) < 0.6 * count * size  # Arrow reads 16 parts of 100 images ahead, and may hold each twice
    assert len(pq.read_table(tmp_path / "out" / "val-00000-of-00006.parquet", columns=["ref_id"])) == 1000


def test_chunks_hold_no_images(tmp_path, monkeypatch):
    """They are held when a file is written, so many at a time."""
    records = open_plain(tmp_path / "val.parquet", plain(*(noise(seed) for seed in range(7))))
    monkeypatch.setattr(prepare, "IMAGES_AT_ONCE", 2)
    held, most = [], []
    embed, read = prepare.embed_table_storage, type(records).pixels

    def count(self, index):
        held.append(index)
        return read(self, index)

    def release(table):
        most.append(len(held))
        held.clear()
        return embed(table)

    monkeypatch.setattr(type(records), "pixels", count)
    monkeypatch.setattr(prepare, "embed_table_storage", release)
    chunks = []
    monkeypatch.setattr(
        prepare, "_merge", lambda *arguments, merge=prepare._merge: chunks.append(merge(*arguments)) or chunks[0]
    )
    prepare.prepare(records, tmp_path / "out", num_proc=1)
    assert most == [2, 2, 2, 1]
    assert all(image == {"path": None, "bytes": None} for image in chunks[0][0]["image"].to_pylist())
    stored = pq.read_table(tmp_path / "out" / "val-00000-of-00001.parquet")["image"].to_pylist()
    assert [image["bytes"] for image in stored] == [noise(seed) for seed in range(7)]


# The command line


def test_the_command_line(tmp_path, capsys):
    arguments = written(small_set(tmp_path), tmp_path / "table", "parquet", prefix="refcoco_unc_")
    pairs = [f"{key}={column}" for key, column in COLUMNS.items()]
    command = [
        "table",
        str(arguments["path"]),
        "--columns",
        *pairs,
        "--name",
        "refcoco/unc",
        "--splits",
        "val",
        "testA",
    ]
    prepare.main([*command, "--output", str(tmp_path / "out"), "--num_proc", "1"])
    printed = capsys.readouterr().out
    assert "(published: 3811)" in printed and "(published: 42404)" in printed  # refcoco/unc's val and train
    assert list(load_prepared(tmp_path / "out", tmp_path)) == ["val", "testA"]
    write(SCHEMAS["refcoco_m"], SCHEMAS["refcoco_m"].rows(small_set(tmp_path / "m")), tmp_path / "m_table", "parquet")
    prepare.main(["refcoco_m", str(tmp_path / "m_table"), "--output", str(tmp_path / "m_out"), "--num_proc", "1"])
    assert list(load_prepared(tmp_path / "m_out", tmp_path)) == ["train", "val", "testA", "testB"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["image"], "columns has 'image': write <key>=<column>, such as image=picture"),
        (["=image"], "columns has '=image'"),
        (["image=a", "image=b"], "columns names image twice, as a and b"),
        (["image=image", "mask=mask", "text=text", "size=text"], "nothing is called size"),
    ],
)  # fmt: skip
def test_wrong_columns_on_the_command_line(tmp_path, pairs, message):
    path = write_plain(tmp_path / "val.parquet", plain(noise(1)))
    with pytest.raises(SystemExit, match=message):
        prepare.main(["table", str(path), "--columns", *pairs, "--output", str(tmp_path / "out")])


# The Hub

PUSH_PREPARED = """
import data.refer
import datasets
from data import prepare

command = ["table", "table", "--columns", *PAIRS, "--output", "out", "--num_proc", "1"]
prepare.main([*command, "--push_to_hub", "someone/x"])
rows = datasets.load_dataset("someone/x", split="val").cast_column("image", datasets.Image(decode=False))
print(rows["ref_id"][:], all(image["bytes"] for image in rows["image"][:]))
"""


@pytest.mark.slow
def test_a_prepared_table_is_pushed(tmp_path):
    refer_set = small_set(tmp_path)
    written(refer_set, tmp_path / "table", "parquet")
    code = PUSH_PREPARED.replace("PAIRS", repr([f"{key}={column}" for key, column in COLUMNS.items()]))
    with HubServer() as server:
        printed = run_client(code, server, tmp_path, isolated=False).splitlines()
    assert printed[-1] == f"{[ref['ref_id'] for ref in refer_set.refs if ref['split'] == 'val']} True"
