"""Any data set by its name, as `--dataset` and `--test_splits` name it: its splits, in the schema of `records.py`.

Images and masks stay as they are stored. `decoding.py` decodes them, and names the row that is broken.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa

from configuration_detris import one_line, raise_if_out_of_memory, short_repr

from .mixture import HUB
from .prepare import SUMMARY, require_whole
from .records import FEATURES, STORED_FEATURES, lmdb_hint, load_records, require_columns, require_rows
from .refer import SOURCES, load_refer
from .shapes import load_shapes
from .sources import metadata_files, open_records
from .streaming import StreamedRows, column_names, files_of_splits, parquet_files
from .untrusted import require_regular_files

HUB_NAME = re.compile(rf"{HUB}(?P<repository>[\w.-]+/[\w.-]+)(?::(?P<split>\w+))?")
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves


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
    path, options = Path(name), {"images": images, "columns": columns or None, "splits": splits}
    if name == "shapes":
        found = load_shapes(**(shapes_config or {}))
    elif name.startswith(HUB):
        found = _load_hub(name, **options)
    elif is_prepared(name, data_root):
        found = load_prepared(name)
    elif path.is_dir() and metadata_files(path):
        found = load_records(open_records("folder", name))
    elif any(path.joinpath(file).exists() for file in SAVED_BY_DATASETS):
        found = _load_saved(name, **options)
    elif holds_parquet(path):
        found = load_records(open_records("table", name, **options))
    elif path.is_dir():
        raise ValueError(
            f"The folder {name} has no metadata.jsonl and no Parquet file, and was made neither by data.prepare nor "
            f"by save_to_disk: prepare what it holds by `python -m data.prepare <kind> {name} --output …`, and name "
            f"that folder{lmdb_hint(name)}."
        )
    elif data_root is None:
        raise ValueError(
            f"The data set {name!r} is neither 'shapes' nor a file or folder: for a REFER data set such as "
            "'refcoco/unc', data_root must say where it lies; one of the Hub is named 'hub:<id>'."
        )
    else:
        found = load_refer(data_root, *name.partition("/")[::2], images)
    return as_stored(name, found)


def _load_hub(
    name: str, images: str | None, columns: dict[str, str] | None, splits: Collection[str] | None
) -> datasets.DatasetDict:
    """The wanted splits of a set of the Hub: rows that data.prepare has pushed, or a table.

    Args:
        name: `hub:<id>` or `hub:<id>:<split>`.
        images, columns, splits: as in `load_splits`.
    """
    repository, split = _repository_and_split(name)
    splits = [split] if split else splits
    with hub_errors_name(name):
        builder = datasets.load_dataset_builder(hub_address(name))
        files = files_of_splits(builder)
        if unknown := set(splits or []) - set(there := files or builder.info.splits or {}):
            raise ValueError(f"{name} has no split {min(unknown)!r}: it has {', '.join(there)}.")
        wanted = {split: files[split] for split in splits} if splits and files else files
        if columns is None and is_prepared_set(builder, wanted):
            return load_prepared(name, wanted)
        return load_records(open_records("table", repository, images=images, columns=columns, splits=splits))


def holds_parquet(path: Path) -> bool:
    """Whether this is a Parquet file, or a folder with some, or with some in its folder `data`."""
    if path.is_dir():
        return any(any(path.glob(pattern)) for pattern in ("*.parquet", "data/*.parquet"))
    return path.is_file() and path.suffix == ".parquet"


def _repository_and_split(name: str) -> tuple[str, str | None]:
    """The id and the split, if it names one, in a name such as `hub:someone/mine:val`; ValueError if it is none."""
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} names no data set of the Hub: give 'hub:<owner>/<name>'.")
    return match["repository"], match["split"]


def hub_address(name: str) -> str:
    """Where `datasets` finds a set of the Hub, whatever folders are called like it; ValueError if the name is none."""
    return f"hf://datasets/{_repository_and_split(name)[0]}"


def is_prepared_set(builder: datasets.DatasetBuilder, files: dict[str, list[str]]) -> bool:
    """Whether a set of the Hub has the columns of prepared rows, as its card or else its first Parquet file says."""
    if builder.info.features is None and builder.name == "parquet":
        return are_prepared_rows(column_names(next(iter(files.values()))[0]))
    return are_prepared_rows(builder.info.features or ())


def are_prepared_rows(columns: Collection[str]) -> bool:
    """Whether these are the columns of prepared rows, and not those of a table; one of them may be missing."""
    return len(FEATURES.keys() - set(columns)) <= 1


def _load_saved(
    name: str, images: str | None, columns: dict[str, str] | None, splits: Collection[str] | None
) -> datasets.DatasetDict:
    """The splits of a folder made by `save_to_disk`, whose rows are prepared ones or those of a table.

    Args: as in `load_splits`.
    """
    require_regular_files(name)
    try:
        saved = datasets.load_from_disk(name)
    except IndexError as error:  # `datasets` saves splits without rows, but does not read them
        raise ValueError(f"{name} has a split without any row: save it without that split.") from error
    if not isinstance(saved, datasets.DatasetDict):
        raise ValueError(f"{name} holds a single split: save a DatasetDict with named splits.")
    if columns is not None or not all(are_prepared_rows(rows.column_names) for rows in saved.values()):
        return load_records(open_records("table", name, images=images, columns=columns, splits=splits))
    try:
        for rows in saved.values():
            rows.data.validate(full=True)  # Arrow would follow wrong offsets out of its memory
    except pa.ArrowException as error:
        raise_if_out_of_memory(error)
        raise OSError(f"{name} is broken ({one_line(error)}): save or copy it again.") from error
    return saved


def is_prepared(name: str, data_root: str | None) -> bool:
    """Whether the name is a folder made by data.prepare, or can only be a Hub id.

    With `data_root`, a name that is no folder is taken for a REFER set's.
    """
    if Path(name).exists():
        return Path(name, SUMMARY).exists()
    return data_root is None and "/" in name and name.partition("/")[0] not in SOURCES


def load_prepared(name: str, files: dict[str, list[str]] | None = None) -> datasets.DatasetDict:
    """All splits of a folder made by data.prepare, or of a Hub id; those in `files` alone if these are given."""
    source = hub_address(name) if name.startswith(HUB) else name
    if Path(name).is_dir():
        require_whole(name)
    with hub_errors_name(name):
        try:
            return datasets.load_dataset(source) if not files else datasets.load_dataset("parquet", data_files=files)
        except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, ValueError) as error:
            raise_if_out_of_memory(error)
            for split, paths in (files or parquet_files(source)).items():
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
        if name.startswith(HUB):
            raise OSError(
                f"{name!r} is not to be had from the Hub ({one_line(error)}): check name and network."
            ) from error
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


def as_columns(value: list[str] | dict[str, str] | None) -> dict[str, str]:
    """The names of a table's columns by what they hold: `image=photo …` in a list, or a mapping in a file.

    Raises:
        ValueError: it is neither, or says twice which column something is.
    """
    pairs = [str(part).partition("=")[::2] for part in value] if isinstance(value, list) else []
    columns = dict(pairs) if isinstance(value, list) else {} if value is None else value
    if not isinstance(columns, dict) or not all(
        isinstance(text, str) and text for text in [*columns, *columns.values()]
    ):
        raise ValueError(
            f"columns is {short_repr(value)}: give what each column holds and its name, such as 'image=photo "
            "mask=polygon text=caption'."
        )
    if len(columns) < len(pairs):
        raise ValueError(f"columns is {short_repr(value)}: name one column for each thing.")
    return columns
