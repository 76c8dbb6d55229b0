"""A prepared folder as tests look at it: its rows, what was left out, its files."""

import json
import os

import datasets

from data.sources import open_records


def load_prepared(folder, tmp_path):
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


def problems_of(folder):
    return {item["record"]: item["reason"] for item in map(json.loads, open(folder / "problems.jsonl"))}


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def open_refer(folder):
    folder.write()
    return open_records("refer", folder.root, "refcoco/unc")


def reads_of(records, path, monkeypatch):
    """Let a class of records note what is read; yield what gives the indices that any process has read since.

    Args:
        records: the class.
        path: a file for the notes.
    """
    log, read = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), records.read
    monkeypatch.setattr(records, "read", lambda self, index: os.write(log, b"%d\n" % index) and read(self, index))

    def since():
        indices = [int(line) for line in path.read_text().split()]
        os.truncate(path, 0)
        return indices

    yield since
    os.close(log)
