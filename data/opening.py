"""Any data set by its name, as `--dataset` and `--test_splits` name it: its splits, in the schema of `records.py`.

Images and masks stay as they are stored. `decoding.py` decodes them, and names the row that is broken.
"""

import glob
import inspect
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from configuration_detris import one_line, raise_if_out_of_memory, short_repr

from .prepare import SUMMARY, require_whole
from .records import (
    FEATURES,
    STORED_FEATURES,
    lmdb_hint,
    load_records,
    require_columns,
    require_embedded,
    require_rows,
)
from .refer import SOURCES, load_refer
from .shapes import load_shapes
from .sources import metadata_files, open_records
from .streaming import StreamedRows, parquet_files
from .tables import DICT_FILE, HUB, HUB_ID, STATE_FILE, find_files, hub_remedy
from .untrusted import file_inside, require_regular_files

logger = logging.getLogger(__name__)

OF_HUB = re.compile(rf"(?P<name>{HUB}[^:]+)(?::(?P<split>\w+))?")


def load_splits(
    name: str,
    data_root: str | None = None,
    images: str | None = None,
    shapes_config: dict | None = None,
    splits: Collection[str] | None = None,
    columns: dict[str, str] | None = None,
) -> datasets.DatasetDict:
    """The splits of the data set `name`, with images and masks as they are stored.

    Args:
        name: one of

            - `shapes`, the synthetic set;
            - `hub:<id>`, a set of the Hub that data.prepare has pushed, or a table with images; `hub:<id>:<split>` is
              one split of it;
            - a folder that data.prepare has made, or the Hub id of such a set;
            - a folder of one's own, with a `metadata.jsonl`;
            - a folder that `save_to_disk` has made of such rows, or of a table;
            - a Parquet file or a folder of them, of a table with images;
            - with `data_root`, a REFER set such as `refcoco/unc`.

            docs/data.md says which tables are recognised by their columns.
        data_root: folder of the REFER layout.
        images: folder of the images of REFER sets that are not published ones, and of tables that hold file names.
        shapes_config: arguments of `load_shapes`.
        splits: those that are wanted; all by default. Of tables and of the Hub, no others are read or downloaded.
        columns: which column of a table holds what, for tables whose columns are not recognised.

    Raises:
        ValueError: there is no such data set or split, or its columns are not those of `FEATURES` or a table.
        OSError: a file is missing or broken, or the Hub has no such data set or is out of reach.
    """
    if of_hub := OF_HUB.fullmatch(name):
        name, splits = of_hub["name"], [of_hub["split"]] if of_hub["split"] else splits
    path, of_table = Path(name), {"images": images, "columns": columns or None, "splits": splits}
    if name == "shapes":
        found = _draw_shapes({} if shapes_config is None else shapes_config)
    elif name.startswith(HUB):
        found = _load_tables(name, **of_table)
    elif is_prepared(name, data_root):
        _warn_of_columns(name, columns)
        found = load_prepared(name)
    elif path.is_dir() and metadata_files(path):
        found = load_records(open_records("folder", name))
    elif any(path.joinpath(file).exists() for file in (DICT_FILE, STATE_FILE)):
        found = _load_saved(name, **of_table)
    elif holds_tables(path):
        found = _load_tables(name, **of_table)
    elif path.is_dir():
        raise ValueError(
            f"The folder {name} has no metadata.jsonl and no Parquet file, and was made neither by data.prepare nor "
            f"by save_to_disk: prepare what it holds by `python -m data.prepare <kind> {name} --output …`, and name "
            f"that folder{lmdb_hint(name)}."
        )
    elif data_root is None or name.count("/") > 1 or os.path.isabs(name):
        raise ValueError(
            f"The data set {name!r} is neither 'shapes' nor a file or folder: for a REFER data set such as "
            "'refcoco/unc', data_root must say where it lies; one of the Hub is named 'hub:<id>'."
        )
    else:
        found = load_refer(data_root, *name.partition("/")[::2], images)
    return as_stored(name, found)


def _draw_shapes(config: dict) -> datasets.DatasetDict:
    """The synthetic set. Raises ValueError if `config` is no mapping of arguments of `load_shapes`."""
    known = list(inspect.signature(load_shapes).parameters)
    if not isinstance(config, dict) or not config.keys() <= set(known):
        raise ValueError(f"shapes_config is {short_repr(config)}: give a mapping with any of {', '.join(known)}.")
    return load_shapes(**config)


def _load_tables(
    name: str, images: str | None, columns: dict[str, str] | None, splits: Collection[str] | None
) -> datasets.DatasetDict:
    """The wanted splits of Parquet files, here or on the Hub, whose rows are prepared ones or those of a table.

    Args: as in `load_splits`.
    """
    if not name.startswith(HUB):
        require_regular_files(name)
    files = _prepared_files(name, columns, splits)
    if files is None:
        return load_records(open_records("table", name, images=images, columns=columns, splits=splits))
    _warn_of_columns(name, columns)
    return load_prepared(name, files)


def _warn_of_columns(name: str, columns: dict[str, str] | None) -> None:
    """Say that `columns` is not read, if it is given for a data set that is prepared."""
    if columns:
        logger.warning(f"{name} is a prepared set, whose columns are known: `columns` is not read for it.")


def _prepared_files(
    name: str, columns: dict[str, str] | None, splits: Collection[str] | None
) -> dict[str, list[str]] | None:
    """The Parquet files of each wanted split, if they have the columns of prepared rows; else None."""
    if "split" in (columns or {}):  # then a table's rows say which split they are of, whatever their file
        splits = None
    _, root, files = find_files(name, splits=splits)
    try:
        if not all(are_prepared_rows(pq.read_schema(members[0]).names, columns) for members in files.values()):
            return None
    except Exception as error:  # Arrow's extension types run code of many libraries
        raise_if_out_of_memory(error)
        return None  # whoever reads the table says what is wrong
    return {
        split: [file_inside(root, str(file.relative_to(root))) for file in members] for split, members in files.items()
    }


def holds_tables(path: Path) -> bool:
    """Whether this is a Parquet file, or a folder that has some."""
    return any(path.rglob("*.parquet")) if path.is_dir() else path.is_file()


def are_prepared_rows(names: Collection[str], columns: dict[str, str] | None = None) -> bool:
    """Whether these name the columns of prepared rows; one may be missing, unless the user has named `columns`."""
    return len(FEATURES.keys() - set(names)) <= (0 if columns else 1)


def _load_saved(
    name: str, images: str | None, columns: dict[str, str] | None, splits: Collection[str] | None
) -> datasets.DatasetDict:
    """The splits of a folder made by `save_to_disk`, whose rows are prepared ones or those of a table.

    Args: as in `load_splits`.
    """
    require_regular_files(name)
    find_files(name)  # refuses a folder that names files outside
    try:
        saved = datasets.load_from_disk(name)
        if isinstance(saved, datasets.Dataset):
            saved = datasets.DatasetDict({str(saved.split or "train"): saved})
        if all(are_prepared_rows(rows.column_names, columns) for rows in saved.values()):
            for rows in saved.values():
                rows.data.validate(full=True)  # Arrow would follow wrong offsets out of its memory
            _warn_of_columns(name, columns)
            return saved
    except IndexError as error:  # `datasets` saves splits without rows, but does not read them
        raise ValueError(f"{name} has a split without any row: save it without that split.") from error
    except Exception as error:  # what `datasets` raises for strangers' files is of many types
        raise_if_out_of_memory(error)
        raise OSError(f"{name} is broken ({one_line(error)}): save or copy it again.") from error
    return load_records(open_records("table", name, images=images, columns=columns, splits=splits))


def is_prepared(name: str, data_root: str | None) -> bool:
    """Whether the name is a folder made by data.prepare, or can only be a Hub id.

    With `data_root`, a name that is no folder is taken for a REFER set's.
    """
    if Path(name).exists():
        return Path(name, SUMMARY).exists()
    return data_root is None and bool(HUB_ID.fullmatch(name)) and name.partition("/")[0] not in SOURCES


def load_prepared(name: str, files: dict[str, list[str]] | None = None) -> datasets.DatasetDict:
    """All splits of a folder made by data.prepare, or of a Hub id; those in `files` alone if these are given.

    Rows may name image files only if they are of such a folder.
    """
    if files is None and Path(name).is_dir():
        require_whole(name)
    with hub_errors_name(name):
        try:
            if files is None:
                if Path(name).is_dir():
                    parquet_files(name)  # refuses a card that names files elsewhere
                found = datasets.load_dataset(name)
            else:
                patterns = {split: list(map(glob.escape, paths)) for split, paths in files.items()}
                found = datasets.load_dataset("parquet", data_files=patterns)
        except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, ValueError) as error:
            raise_if_out_of_memory(error)
            for split, paths in (files or parquet_files(name)).items():
                if not len(StreamedRows(paths)):  # opening them names a broken file, which `datasets` does not
                    raise ValueError(f"Split {split!r} of {name} has no rows: prepare the data set anew.") from error
            raise OSError(
                f"{name} cannot be read ({one_line(error.__cause__ or error)}): prepare the data set anew."
            ) from error
    if not Path(name, SUMMARY).exists():
        for split, rows in found.items():
            if "image" in rows.column_names:  # else `as_stored` names what is missing
                images = rows.select_columns("image").with_format("arrow")[:]["image"]
                require_embedded(f"Split {split!r} of {name}", images)
    return found


@contextmanager
def hub_errors_name(name: str) -> Iterator[None]:
    """Turn the error that the Hub has no such data set, or is out of reach, into an OSError that says so plainly."""
    try:
        yield
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise OSError(f"{name!r} is no folder here, nor to be had from the Hub: {hub_remedy(error)}") from error


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
