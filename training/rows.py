"""Which rows a run trains on, chooses its checkpoint by, and is tested on: data sets, splits, mixtures and streams.

Images and masks stay as they are stored. The collators decode them, and name the row that is broken.
"""

import functools
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets

from configuration_detris import one_line
from data.mixture import Member, Mixture, mix, parse_mixture, public_names
from data.opening import (
    are_prepared_rows,
    as_stored,
    hub_errors_name,
    is_prepared,
    load_prepared,
    load_splits,
)
from data.prepare import require_whole
from data.streaming import StreamedRows, column_names, parquet_files
from data.tables import HUB

from .arguments import DataArguments

MAX_RESULTS_NAME = 150  # characters; file systems take names of 255 bytes, and endings follow

logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """The rows of a run, as far as they are asked for, and the data sets that `dataset` names."""

    members: list[Member]
    train: datasets.Dataset | Mixture | StreamedRows | None
    evaluation: datasets.Dataset | None  # of the split that the best checkpoint is chosen by
    tests: dict[str, datasets.Dataset]  # by the names of the test splits


def load_rows(args: DataArguments, do_train: bool, do_eval: bool, do_predict: bool) -> Rows:
    """Rows to train on, to choose the checkpoint by, and of each test split, as far as they are asked for.

    A data set is read once, and only if one of its splits is asked for; of a table, no other splits are read. Of a
    streamed data set, the training split is read later, row by row.

    Raises:
        ValueError: a data set or split does not exist, is empty, or cannot be mixed or streamed.
        OSError: a file is missing or broken.
    """
    _require_distinct_names(args.test_splits if do_predict else [])
    members = parse_mixture(args.dataset, args.train_split)
    first_set = members[0].name
    streamed = args.streaming and do_train
    files = _files_to_stream(members, args) if streamed else {}
    tests_other_sets = any(":" in name for name in args.test_splits)
    mixed = do_train and not streamed and (len(members) > 1 or members[0].weight != 1 or tests_other_sets)
    wanted = _wanted_splits(args, members, do_train and not streamed, do_eval, do_predict or mixed)
    if mixed:
        wanted |= {member.name: None for member in members}  # images of all their other splits leave training

    @functools.cache
    def splits_of(name: str) -> datasets.DatasetDict:
        if not streamed or name != first_set:
            return load_splits(name, args.data_root, args.images, args.shapes_config, wanted[name], args.columns)
        held = {split: paths for split, paths in files.items() if split in wanted[name]}
        return as_stored(name, load_prepared(name, held) if held else datasets.DatasetDict())

    train = evaluation = None
    if streamed:
        train = StreamedRows(files[members[0].split], args.shuffle_buffer_size)
        if tests_other_sets:
            logger.warning("Streamed rows stay in training even if their images are in a split that is tested on.")
    elif mixed:
        train = _mix(members, splits_of, args)
    elif do_train:
        train = select_split(splits_of(first_set), members[0].split, args.max_train_samples, first_set)
    if do_eval:
        evaluation = select_split(splits_of(first_set), args.eval_split, args.max_eval_samples, first_set)
        if args.eval_first_phrase_only:
            evaluation = _first_phrases(evaluation)
    tests = {}
    for name in args.test_splits if do_predict else []:
        dataset, split = dataset_and_split(name, first_set)
        tests[name] = select_split(splits_of(dataset), split, args.max_eval_samples, dataset)
    return Rows(members, train, evaluation, tests)


def _wanted_splits(
    args: DataArguments, members: list[Member], trains: bool, evaluates: bool, tests: bool
) -> dict[str, list[str] | None]:
    """For each data set that is read, the splits that are trained on, evaluated and tested on."""
    wanted = [(member.name, member.split) for member in members] if trains else []
    wanted += [(members[0].name, args.eval_split)] if evaluates else []
    wanted += [dataset_and_split(name, members[0].name) for name in args.test_splits] if tests else []
    splits = {}
    for dataset, split in wanted:
        splits.setdefault(dataset, []).append(split)
    return splits


def _mix(members: list[Member], splits_of: Callable[[str], datasets.DatasetDict], args: DataArguments) -> Mixture:
    """Mix the members' training rows without images that are tested on, unless `keep_leaks` is given; log which."""
    splits, tested = {member.name: splits_of(member.name) for member in members}, []
    for name in args.test_splits:
        dataset, split = dataset_and_split(name, "")
        if dataset:  # images of the members' own splits leave in any case
            tested.append((dataset, select_split(splits_of(dataset), split, None, dataset)))
    mixture = mix(members, splits, tested, args.keep_leaks)
    count = min(args.max_train_samples or len(mixture.rows), len(mixture.rows))
    mixture = replace(mixture, rows=mixture.rows.take(count))
    logger.warning(mixture.describe_leaks())
    return mixture


def _files_to_stream(members: list[Member], args: DataArguments) -> dict[str, list[str]]:
    """The Parquet files of each split of the one data set that is streamed."""
    if len(members) > 1:
        raise ValueError(f"streaming takes one data set, not the mixture {args.dataset!r}.")
    name, split = members[0].name, members[0].split
    of_hub = name.startswith(HUB)
    if not (of_hub or is_prepared(name, args.data_root)):
        raise ValueError(
            f"{name!r} cannot be streamed: give a folder or Hub id that `python -m data.prepare` has made."
        )
    if Path(name).is_dir():
        require_whole(name)
    with hub_errors_name(name):
        # With this address, `datasets` looks on the Hub whatever folders are called like the id.
        files = parquet_files(f"hf://datasets/{name.removeprefix(HUB)}" if of_hub else name)
    if split not in files:
        raise ValueError(f"{name} has no split {split!r} to train on: it has {list(files)}.")
    if of_hub and not are_prepared_rows(column_names(files[split][0])):
        raise ValueError(
            f"{name!r} cannot be streamed, because it is a table: prepare it by `python -m data.prepare table {name} "
            "--output …`, and give that folder."
        )
    return files


def _first_phrases(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with the first phrase of each object alone, by which the official code chooses its checkpoint."""
    first, feature = [sentences[:1] for sentences in rows["sentences"]], rows.features["sentences"]
    return rows.remove_columns("sentences").add_column("sentences", first, feature=feature)


def select_split(
    splits: datasets.DatasetDict, name: str, max_samples: int | None, dataset: str = ""
) -> datasets.Dataset:
    """The first `max_samples` rows of a split of `dataset`, which errors name.

    Raises:
        ValueError: the split does not exist or is empty.
    """
    if name not in splits or not len(splits[name]):
        filled = {split: len(rows) for split, rows in splits.items() if len(rows)}
        problem = "is empty" if name in splits else "does not exist"
        place = f" in {dataset}" * bool(dataset)
        raise ValueError(f"Split {name!r} {problem}{place}; splits with rows are {filled}.")
    return splits[name].take(min(max_samples or len(splits[name]), len(splits[name])))


def dataset_and_split(name: str, default: str) -> tuple[str, str]:
    """A test split's data set, such as 'refcoco+/unc' or 'hub:someone/mine', and its own name."""
    dataset, _, split = name.rpartition(":")
    if not (dataset.startswith(HUB) or os.path.exists(dataset)):
        dataset = dataset.replace(":", "/")
    return dataset or default, split


def shown_names(test_splits: Iterable[str]) -> dict[str, str]:
    """What tables call each test split: as it was given, but without the path where that is a whole one."""
    parts = {name: dataset_and_split(name, "") for name in test_splits}
    public = public_names(dataset for dataset, _ in parts.values())
    return {
        name: f"{public[dataset]}:{split}" if Path(dataset).is_absolute() else one_line(name)
        for name, (dataset, split) in parts.items()
    }


def results_name(test_split: str) -> str:
    """What metrics, files and folders of a test split are called, given its name in `shown_names`."""
    if test_split in ("train", "eval"):  # there are files called so that training writes
        return f"test_{test_split}"
    return re.sub("[:/]", "_", test_split)[-MAX_RESULTS_NAME:]


def _require_distinct_names(test_splits: list[str]) -> None:
    """Refuse test splits with a ValueError if the results of one would take the place of another's."""
    splits, shown = {}, shown_names(test_splits)
    for split in test_splits:
        if (earlier := splits.setdefault(results_name(shown[split]), split)) != split:
            raise ValueError(
                f"test_splits has {earlier!r} and {split!r}, whose results would both be called "
                f"{results_name(shown[split])}: test on one of them in another run."
            )
