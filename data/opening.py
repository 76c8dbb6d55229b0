"""Any data set by its name, as `--dataset` and `--test_splits` name it: all its splits, in the schema of `records.py`.

Images and masks stay as they are stored. `decoding.py` decodes them, and names the row that is broken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa

from configuration_detris import one_line, raise_if_out_of_memory

from .prepare import SUMMARY, require_whole
from .records import STORED_FEATURES, lmdb_hint, load_records, require_columns, require_rows
from .refer import SOURCES, load_refer
from .shapes import load_shapes
from .sources import metadata_files, open_records
from .streaming import StreamedRows, parquet_files
from .untrusted import require_regular_files

SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves


def load_splits(
    name: str,
    data_root: str | None = None,
    images: str | None = None,
    shapes_config: dict | None = None,
) -> datasets.DatasetDict:
    """All splits of the data set `name`, with images and masks as they are stored.

    Args:
        name: `shapes`, a folder in one of the layouts that are read without a command, the Hub id of a prepared set,
            or, with `data_root`, a REFER set such as `refcoco/unc`.
        data_root: folder of the REFER layout.
        images: folder of the images of REFER sets that are not published ones.
        shapes_config: arguments of `load_shapes`.

    Raises:
        ValueError: there is no such data set, or its columns are not those of `FEATURES`.
        OSError: a file is missing or broken, or the Hub has no such data set.
    """
    if name == "shapes":
        splits = load_shapes(**(shapes_config or {}))
    elif is_prepared(name, data_root):
        splits = load_prepared(name)
    elif Path(name).is_dir() and metadata_files(Path(name)):
        splits = load_records(open_records("folder", name))
    elif Path(name).is_dir():
        splits = _load_saved(name)
    elif data_root is None:
        raise ValueError(
            f"The data set {name!r} is neither 'shapes' nor a folder: for a REFER data set such as 'refcoco/unc', "
            "data_root must say where it lies."
        )
    else:
        splits = load_refer(data_root, *name.partition("/")[::2], images)
    return as_stored(name, splits)


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


def is_prepared(name: str, data_root: str | None) -> bool:
    """Whether the name is a folder made by data.prepare, or can only be a Hub id.

    With `data_root`, a name that is no folder is taken for a REFER set's.
    """
    if Path(name).is_dir():
        return Path(name, SUMMARY).exists()
    return data_root is None and "/" in name and name.partition("/")[0] not in SOURCES


def load_prepared(name: str, files: dict[str, list[str]] | None = None) -> datasets.DatasetDict:
    """All splits of a folder made by data.prepare, or of a Hub id; those in `files` alone if these are given."""
    if Path(name).is_dir():
        require_whole(name)
    with hub_errors_name(name):
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
def hub_errors_name(name: str) -> Iterator[None]:
    """Turn the error that the Hub has no such data set, or is out of reach, into an OSError that says so plainly."""
    try:
        yield
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise OSError(f"{name!r} is no folder here, nor to be had from the Hub ({error}): check its name.") from error


def as_stored(name: str, splits: datasets.DatasetDict) -> datasets.DatasetDict:
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
