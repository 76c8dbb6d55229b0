"""Which rows a run trains on, chooses its checkpoint by, and is tested on: data sets, splits, mixtures and streams.

Images and masks stay as they are stored. The collators decode them, and name the row that is broken.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa

from configuration_detris import one_line, raise_if_out_of_memory
from data.mixture import Member, Mixture, mix, parse_mixture
from data.prepare import SUMMARY, require_whole
from data.records import STORED_FEATURES, lmdb_hint, load_records, require_columns, require_rows
from data.refer import SOURCES, load_refer
from data.shapes import load_shapes
from data.sources import metadata_files, open_records
from data.streaming import StreamedRows, parquet_files
from data.untrusted import require_regular_files

from .arguments import DataArguments

SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves

logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """The rows of a run, as far as they are asked for, and the data sets that `dataset` names."""

    members: list[Member]
    train: datasets.Dataset | Mixture | StreamedRows | None
    evaluation: datasets.Dataset | None  # of the split that the best checkpoint is chosen by
    tests: dict[str, datasets.Dataset]  # by the names of the test splits


def load_rows(args: DataArguments, do_train: bool, do_eval: bool, do_predict: bool) -> Rows:
    """Rows to train on, to choose the checkpoint by, and of each test split, as far as they are asked for.

    A data set is read once, and only if one of its splits is asked for. Of a streamed data set, the training split is
    read later, row by row.

    Raises:
        ValueError: a data set or split does not exist, is empty, or cannot be mixed or streamed.
        OSError: a file is missing or broken.
    """
    members = parse_mixture(args.dataset, args.train_split)
    first_set = members[0].name
    streamed = args.streaming and do_train
    files = _files_to_stream(members, args) if streamed else {}

    @functools.cache
    def splits_of(name: str) -> datasets.DatasetDict:
        if not streamed or name != first_set:
            return load_splits(name, args)
        wanted = ([args.eval_split] if do_eval else []) + (args.test_splits if do_predict else [])
        held = {split: paths for split, paths in files.items() if split in wanted}
        return _as_stored(name, _load_prepared(name, held) if held else datasets.DatasetDict())

    train = evaluation = None
    if do_train:
        tests_other_sets = any(":" in name for name in args.test_splits)
        if streamed:
            train = StreamedRows(files[members[0].split], args.shuffle_buffer_size)
            if tests_other_sets:
                logger.warning("Streamed rows stay in training even if their images are in a split that is tested on.")
        elif len(members) == 1 and members[0].weight == 1 and not tests_other_sets:
            train = select_split(splits_of(first_set), members[0].split, args.max_train_samples)
        else:
            train = _mix(members, splits_of, args)
    if do_eval:
        evaluation = select_split(splits_of(first_set), args.eval_split, args.max_eval_samples)
        if args.eval_first_phrase_only:
            evaluation = _first_phrases(evaluation)
    tests = {}
    for name in args.test_splits if do_predict else []:
        dataset, split = dataset_and_split(name, first_set)
        tests[name] = select_split(splits_of(dataset), split, args.max_eval_samples)
    return Rows(members, train, evaluation, tests)


def _mix(members: list[Member], splits_of: Callable[[str], datasets.DatasetDict], args: DataArguments) -> Mixture:
    """Mix the members' training rows without images that are tested on, unless `keep_leaks` is given; log which."""
    splits, tested = {member.name: splits_of(member.name) for member in members}, []
    for name in args.test_splits:
        dataset, split = dataset_and_split(name, "")
        if dataset:  # images of the members' own splits leave in any case
            tested.append((dataset, select_split(splits_of(dataset), split, None)))
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
    if not _is_prepared(name, args):
        raise ValueError(
            f"{name!r} cannot be streamed: give a folder or Hub id that `python -m data.prepare` has made."
        )
    if Path(name).is_dir():
        require_whole(name)
    with _hub_errors_name(name):
        files = parquet_files(name)
    if split not in files:
        raise ValueError(f"{name} has no split {split!r} to train on: it has {list(files)}.")
    return files


def _first_phrases(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with the first phrase of each object alone, by which the official code chooses its checkpoint."""
    first, feature = [sentences[:1] for sentences in rows["sentences"]], rows.features["sentences"]
    return rows.remove_columns("sentences").add_column("sentences", first, feature=feature)


def select_split(splits: datasets.DatasetDict, name: str, max_samples: int | None) -> datasets.Dataset:
    """The first `max_samples` rows of a split.

    Raises:
        ValueError: the split does not exist or is empty.
    """
    if name not in splits or not len(splits[name]):
        filled = {split: len(rows) for split, rows in splits.items() if len(rows)}
        problem = "is empty" if name in splits else "does not exist"
        raise ValueError(f"Split {name!r} {problem}; splits with rows are {filled}.")
    return splits[name].take(min(max_samples or len(splits[name]), len(splits[name])))


def dataset_and_split(name: str, default: str) -> tuple[str, str]:
    """A test split's data set, such as 'refcoco+/unc', and its own name."""
    dataset, _, split = name.rpartition(":")
    return dataset.replace(":", "/") or default, split


def load_splits(name: str, args: DataArguments) -> datasets.DatasetDict:
    """All splits of the data set `name`, with images and masks as they are stored.

    Raises:
        ValueError: there is no such data set, or its columns are not those of `FEATURES`.
        OSError: a file is missing or broken, or the Hub has no such data set.
    """
    if name == "shapes":
        splits = load_shapes(**args.shapes_config)
    elif _is_prepared(name, args):
        splits = _load_prepared(name)
    elif Path(name).is_dir() and metadata_files(Path(name)):
        splits = load_records(open_records("folder", name))
    elif Path(name).is_dir():
        splits = _load_saved(name)
    elif args.data_root is None:
        raise ValueError(
            f"The data set {name!r} is neither 'shapes' nor a folder: for a REFER data set such as 'refcoco/unc', "
            "data_root must say where it lies."
        )
    else:
        images = {} if args.images is None else {"images": args.images}
        splits = load_refer(args.data_root, *name.partition("/")[::2], **images)
    return _as_stored(name, splits)


def _load_saved(name: str) -> datasets.DatasetDict:
    """All splits of a folder made by `save_to_disk`."""
    if not any(Path(name, file).exists() for file in SAVED_BY_DATASETS):
        raise ValueError(
            f"The folder {name} has no metadata.jsonl and was made neither by data.prepare nor by save_to_disk: "
            f"prepare what it holds by `python -m data.prepare <kind> {name} --output …`, and name that "
            f"folder{lmdb_hint(name)}."
        )
    require_regular_files(name)
    try:
        splits = datasets.load_from_disk(name)
    except IndexError as error:  # `datasets` saves splits without rows, but does not read them
        raise ValueError(f"{name} has a split without any row: save it without that split.") from error
    if not isinstance(splits, datasets.DatasetDict):
        raise ValueError(f"{name} holds a single split: save a DatasetDict with named splits.")
    try:
        for rows in splits.values():
            rows.data.validate(full=True)  # Arrow would follow wrong offsets out of its memory
    except pa.ArrowException as error:
        raise_if_out_of_memory(error)
        raise OSError(f"{name} is broken ({one_line(error)}): save or copy it again.") from error
    return splits


def _is_prepared(name: str, args: DataArguments) -> bool:
    """Whether the name is a folder made by data.prepare, or can only be a Hub id.

    With `data_root`, a name that is no folder is taken for a REFER set's.
    """
    if Path(name).is_dir():
        return Path(name, SUMMARY).exists()
    return args.data_root is None and "/" in name and name.partition("/")[0] not in SOURCES


def _load_prepared(name: str, files: dict[str, list[str]] | None = None) -> datasets.DatasetDict:
    """All splits of a folder made by data.prepare, or of a Hub id; those in `files` alone if these are given."""
    if Path(name).is_dir():
        require_whole(name)
    with _hub_errors_name(name):
        try:
            return datasets.load_dataset(name) if files is None else datasets.load_dataset("parquet", data_files=files)
        except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, ValueError) as error:
            raise_if_out_of_memory(error)
            for split, paths in (files or parquet_files(name)).items():
                if not len(StreamedRows(paths)):  # opening them names a broken file, which `datasets` does not
                    raise ValueError(f"Split {split!r} of {name} has no rows: prepare the data set anew.") from error
            raise OSError(
                f"{name} cannot be read ({one_line(error.__cause__ or error)}): prepare the data set anew."
            ) from error


@contextmanager
def _hub_errors_name(name: str) -> Iterator[None]:
    """Turn the error that the Hub has no such data set, or is out of reach, into an OSError that says so plainly."""
    try:
        yield
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise OSError(f"{name!r} is no folder here, nor to be had from the Hub ({error}): check its name.") from error


def _as_stored(name: str, splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """The splits with images and masks as they are stored. Refuses columns that are not those of `FEATURES`."""
    stored = datasets.DatasetDict()
    for split, rows in splits.items():
        where = f"Split {split!r} of {name}"
        require_columns(where, rows.column_names)
        for column, feature in STORED_FEATURES.items():
            if rows.features[column] != feature:
                try:
                    rows = rows.cast_column(column, feature)
                except (pa.ArrowException, TypeError, ValueError) as error:
                    raise ValueError(
                        f"Column {column!r} in split {split!r} of {name} is not what docs/data.md describes "
                        f"({one_line(error)}): prepare the data set anew."
                    ) from error
        require_rows(where, rows)
        stored[split] = rows
    return stored
