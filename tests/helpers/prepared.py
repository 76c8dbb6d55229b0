"""A prepared folder as tests look at it: its rows, what was left out, its files."""

import json

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
