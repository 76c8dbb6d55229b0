"""Tables that hold the pixels of their images: Parquet files, folders of `save_to_disk`, and such tables on the Hub.

`table_layouts.py` knows what the columns of a table mean; here its rows are found, and images are taken from them.
The tables stay on disk: `datasets` turns Parquet into Arrow files in its cache, which are mapped into memory.
"""

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from configuration_detris import one_line, raise_if_out_of_memory, read_regular, short_repr

from .coco_names import PUBLISHED_BY_COCO
from .images import image_size
from .records import NO_TARGET, Records, is_int64, lmdb_hint, make_row, require_exists, training_first
from .table_layouts import TABLE_LAYOUTS, ColumnsLayout, Place, TableLayout, number_in, recognised
from .untrusted import MAX_FILE_NAME, checked_text, file_inside, load_json, record_errors_begin_with, require_inside

HUB = "hub:"  # stands before the id of a data set on the Hub
PART = re.compile(r".*-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-\w+)?")  # a file's name without its ending
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TABLE_LAYOUT = (
    "a table is a Parquet file, a folder of <split>-*.parquet, a folder made by save_to_disk, or a data set's id on "
    "the Hub, hub:<id>"
)
DICT_FILE, STATE_FILE, INFO_FILE = "dataset_dict.json", "state.json", "dataset_info.json"  # of `save_to_disk`
ROWS_AT_ONCE = 100  # rows of a Parquet file that are in memory while it is converted
FILE_ENDS = (".parquet", "-*.parquet")  # behind the split in a file's name
NO_FINGERPRINT = "none"  # `datasets` would pickle the whole table, in memory, to make one
UNBUFFERED = {"use_buffered_stream": True, "pre_buffer": False}  # else Arrow would read all of a file first


class TableRecords(Records):
    """Records in tables with an image column.

    What the table does not say is filled in: `ref_id` is the number of the record, from 0, without numbers that other
    rows give; `ann_id` the ref_id, or -1 if the phrases name nothing; `image_id` the number in COCO's file name, or
    else a negative number that follows from the bytes of the image; and the split is the table's.

    Args:
        path: a Parquet file, a folder of them or of `save_to_disk`, or an id on the Hub, with or without `hub:`.
        name: what to call the data set; by default the path's end. If it is one such as `refcoco/unc` and there are
            splits such as `refcoco_unc_val`, only these are read, and called `val` and so on. Where several folders
            hold tables, it may also be the name of one of them.
        images: folder in which the images lie whose names, not pixels, are in the table.
        columns: which columns hold `image`, `mask`, `text` and so on, for a table of no known layout.
        splits: those to read; by default all. Others are not downloaded.
        kind: the layout's name; `table` for the one that has the table's columns.

    Raises:
        OSError: there is no such table, here or on the Hub, or it cannot be read.
        ValueError: it is broken, or lacks a column or split.
    """

    layout = TABLE_LAYOUT
    embedded = True
    unique_ref_ids = ("split", "ref_id")  # the splits of a table can be of several data sets

    def __init__(
        self,
        path: str | os.PathLike,
        name: str = "",
        images: str | os.PathLike | None = None,
        columns: dict[str, str] | None = None,
        splits: Sequence[str] | None = None,
        kind: str = "table",
    ) -> None:
        self._images = None if images is None else Path(images).absolute()
        if self._images is not None:
            self.layout = "`images` is the folder of the images that the table names"
            require_exists(self._images, self.layout)
        in_column = "split" in (columns or {})  # then each row says which split it is of, whatever its file
        where, root, files = find_files(path, name, None if in_column else splits)
        self._table_layout, self._tables, self._objects = None, [], []
        for split, members in files.items():
            table = _open_saved(members[0].parent) if members[0].name == STATE_FILE else _open_parquet(members, root)
            self._add_table(f"{where}, split {split}", split, table, kind, columns)
        if in_column:
            found = sorted({split for split, *_ in self._objects})
            chosen = _chosen_splits(found, where, "", splits)
            self._objects = [entry for entry in self._objects if not splits or entry[0] in chosen]
        self._ref_ids = self._free_ref_ids((columns or {}).get("ref_id"), where)
        every_file = [file for members in files.values() for file in members]
        settings = (self._table_layout.name, sorted((columns or {}).items()), list(splits or ()), list(files))
        super().__init__(name or PurePosixPath(where).name, where, self._images or root, every_file, settings)
        self._opened: tuple = ()

    def _add_table(self, where: str, split: str, table: pa.Table, kind: str, columns: dict[str, str] | None) -> None:
        """Add the objects of a split to the records."""
        names = table.column_names
        if self._table_layout is None:
            self._table_layout = _choose_layout(where, names, kind, columns)
        layout = self._table_layout
        if missing := {layout.image, *layout.needed} - set(names):
            raise ValueError(
                f"{where} has no columns {sorted(missing)}, which the layout {layout.name} needs; it has {names}."
            )
        try:
            annotations = datasets.Dataset(table.drop_columns([layout.image]), fingerprint=NO_FINGERPRINT)
            places = layout.places(annotations)
        except Exception as error:  # a stranger's columns can be of any type
            raise_if_out_of_memory(error)
            raise ValueError(
                f"{where} is no table of the layout {layout.name} ({one_line(error)}); see docs/data.md."
            ) from error
        images = datasets.Dataset(table.select([layout.image]), fingerprint=NO_FINGERPRINT).with_format("arrow")
        column = (columns or {}).get("split")
        given = table[column].to_pylist() if column else [split] * len(table)
        if wrong := [value for value in given if not isinstance(value, str | None)]:
            raise ValueError(f"{where}: the column {column} holds {short_repr(wrong[0])}; give the name of a split.")
        number = len(self._tables)
        self._objects += [(given[place.row] or split, number, place) for place in places]
        self._tables.append((annotations.with_format("arrow"), images))

    def _free_ref_ids(self, column: str | None, where: str) -> dict[int, int]:
        """A number for each object that has none in a column of ref_ids where others have one."""
        if column is None:
            return {}
        with record_errors_begin_with(where, self._table_layout.name):
            cells = [rows.select_columns([column])[:][column].to_pylist() for rows, _ in self._tables]
        numbers = [number_in(cells[table][place.row]) for _, table, place in self._objects]
        given = {number for number in numbers if is_int64(number)}
        free = (number for number in range(len(numbers)) if number not in given)
        return {index: next(free) for index, number in enumerate(numbers) if number is None}

    def __len__(self) -> int:
        return len(self._objects)

    def split_of(self, index: int) -> str:
        """The split of a record, known without reading it."""
        return self._objects[index][0]

    def read(self, index: int) -> tuple[str, dict]:
        split, number, place = self._objects[index]
        layout = self._table_layout
        where = f"{self.refs}, split {split}, row {place.row}" + (f", object {place.position}" * bool(place.position))
        with record_errors_begin_with(where, f"the layout {layout.name}"):
            rows, image, size = self._open(number, place)
            fields = layout.read(rows, place.position, size)
            given = {key: value for key, value in fields.items() if value is not None or key == "mask"}
            file_name = given.pop("file_name", None)
            if file_name is not None and isinstance(image, dict):
                image = image | {"path": PurePosixPath(checked_text(file_name, "file_name", MAX_FILE_NAME)).name}
            ref_id = given.setdefault("ref_id", self._ref_ids.get(index, index))
            given.setdefault("ann_id", NO_TARGET if given["mask"] is None else ref_id)
            if "image_id" not in given:
                given["image_id"] = _image_id(image)
            return make_row(
                **({"category": "", "bbox": None} | given | {"split": split, "image": image, "size": size}),
                own=layout.own,
            )

    def _open(self, number: int, place: Place) -> tuple[list[dict], str | dict, tuple[int, int]]:
        """The rows of a place without the image, the image, and its (height, width)."""
        key = number, place.row, place.rows
        if not self._opened or self._opened[0] != key:  # the objects of a row follow each other
            annotations, _ = self._tables[number]
            rows = annotations[place.row : place.row + place.rows].to_pylist()
            image = self._image(number, place.row)
            size = image_size(image["bytes"] if isinstance(image, dict) else image, self.layout)
            self._opened = key, (rows, image, size)
        return self._opened[1]

    def _image(self, number: int, row: int) -> str | dict:
        """The image of a row: `path` and `bytes`, or, where a folder of images was named, the path of a file in it."""
        column = self._table_layout.image
        cell = self._tables[number][1][row][column][0].as_py()
        parts = {"bytes": cell} if isinstance(cell, bytes) else {"path": cell} if isinstance(cell, str) else cell
        parts = parts if isinstance(parts, dict) else {}
        content, name = parts.get("bytes"), parts.get("path")
        if isinstance(content, bytes):
            if name is not None:
                name = PurePosixPath(checked_text(name, "the image's path", MAX_FILE_NAME)).name or None
            return {"path": name, "bytes": content}
        if content is not None or not isinstance(name, str):
            raise ValueError(f"the cell {column} is {short_repr(cell)}; give the bytes of an image file.")
        if self._images is None:  # a table must not choose which files and addresses are opened
            raise ValueError(
                f"the cell {column} has only the path {short_repr(name)}, which is not opened: give the folder "
                "of the images as `images`, or embed them in the table."
            )
        return file_inside(self._images, name)

    def pixels(self, index: int) -> bytes | None:
        _, number, place = self._objects[index]
        image = self._image(number, place.row)
        return image["bytes"] if isinstance(image, dict) else None


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """The columns that the command line names as `key=column`, by their keys; ValueError for another form."""
    columns: dict[str, str] = {}
    for pair in pairs:
        key, equals, column = pair.partition("=")
        if not (key and equals and column):
            raise ValueError(f"columns has {short_repr(pair)}: write <key>=<column>, such as image=picture.")
        if key in columns:
            raise ValueError(f"columns names {key} twice, as {columns[key]} and {column}: name it once.")
        columns[key] = column
    return columns


def _image_id(image: str | dict) -> int:
    """COCO's number of an image, or else a negative number, which is none of COCO's, from the digest of its bytes."""
    name = os.path.basename((image["path"] if isinstance(image, dict) else image) or "")
    if match := PUBLISHED_BY_COCO.fullmatch(name):
        return int(match[1])
    content = image["bytes"] if isinstance(image, dict) else read_regular(image)
    return -1 - (int.from_bytes(hashlib.sha256(content).digest()[:8]) >> 1)


def _choose_layout(where: str, names: list[str], kind: str, columns: dict[str, str] | None) -> TableLayout:
    """The layout that the user has named, or else the one that has the columns of the table."""
    if columns or kind == "columns":
        if kind not in ("table", "columns"):
            raise ValueError(f"The layout {kind} says itself which columns hold what: leave `columns` out.")
        layout = ColumnsLayout(columns or {})
        if len(set(columns.values())) < len(columns):
            raise ValueError(f"`columns` gives one column two meanings, {columns}: name another for one of them.")
        return layout
    if kind != "table":
        return TABLE_LAYOUTS[kind]
    if {"raw_anns", "raw_image_info"} <= set(names):
        raise ValueError(f"{where} has no pixels: the kind hub_table reads it, with COCO's train2014 as `images`.")
    with record_errors_begin_with(where, kind):
        return recognised(names)


# --- Where tables are ---------------------------------------------------------------------------------------------


def find_files(
    path: str | os.PathLike, name: str = "", splits: Sequence[str] | None = None
) -> tuple[str, Path, dict[str, list[Path]]]:
    """What errors call the table; the folder that its files lie in; and the files of each split.

    Args:
        path, name, splits: as in `TableRecords`.
    """
    where = os.fspath(path)
    root = Path(path).absolute()
    if "::" in where or "://" in where:
        raise ValueError(f"{where} would be taken for an address; rename it without '::' and '://'.")
    if where.startswith(HUB) or not os.path.lexists(root) and HUB_ID.fullmatch(where):
        repository = where.removeprefix(HUB)
        if not HUB_ID.fullmatch(repository):
            raise ValueError(f"{short_repr(where)} names no data set of the Hub: write hub:<owner>/<name>.")
        root = _download(repository, name, splits)
        where, files = HUB + repository, _parquet_files(root)
        return where, root, _require_all_parts(where, _chosen_files(files, where, root, name, splits))
    require_exists(root, TABLE_LAYOUT, root)
    if not root.is_dir():
        return where, root.parent, _chosen_files([PurePosixPath(root.name)], where, root.parent, name, splits)
    if saved := _saved_splits(root):
        chosen = _chosen_splits(list(saved), where, name, splits)
        return where, root, {split: _saved_files(saved[found], root) for split, found in chosen.items()}
    return where, root, _require_all_parts(where, _chosen_files(_parquet_files(root), where, root, name, splits))


def _saved_splits(root: Path) -> dict[str, Path]:
    """The folder of each split that `save_to_disk` has written; none if it has not made this folder."""
    for file in (root / DICT_FILE, root / STATE_FILE):
        if file.exists():
            require_inside(file, root)
            with record_errors_begin_with(os.fspath(file), "save_to_disk"):
                if file.name == DICT_FILE:
                    return {split: Path(file_inside(root, split)) for split in load_json(file)["splits"]}
                return {checked_text(load_json(file)["_split"] or "train", "_split", MAX_FILE_NAME): root}
    return {}


def _parquet_files(root: Path) -> list[PurePosixPath]:
    """The Parquet files at any depth of a folder, relative to it."""
    return [PurePosixPath(file.relative_to(root)) for file in root.rglob("*.parquet")]


def _chosen_files(
    files: list[PurePosixPath], where: str, root: Path, name: str, splits: Sequence[str] | None
) -> dict[str, list[Path]]:
    """The files of each split, which is what stands before the first `-` in their names.

    Files that a README.md names are not looked for: it could name any.
    """
    folders = sorted({str(file.parent) for file in files if not any(part.startswith(".") for part in file.parts)})
    folder = next((one for one in (".", "data") if one in folders), None)
    if folder is None and len(folders) == 1:
        (folder,) = folders
    if name in folders:
        folder = name
    if not folders:
        raise FileNotFoundError(f"{where} has no .parquet file; {TABLE_LAYOUT}{lmdb_hint(root)}.")
    if folder is None:
        raise ValueError(
            f"{where} has tables in several folders: give the name of one of {', '.join(folders)}, which is --name of "
            "data.prepare."
        )
    by_split: dict[str, list[Path]] = {}
    for file in sorted(files):
        if str(file.parent) == folder:
            by_split.setdefault(file.stem.partition("-")[0], []).append(root / file)
    return {split: by_split[found] for split, found in _chosen_splits(list(by_split), where, name, splits).items()}


def _require_all_parts(where: str, files: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """The files of each split, if none is missing: their names say how many there are, as in `val-00000-of-00002`."""
    for split, members in files.items():
        parts = [match for file in members if (match := PART.fullmatch(file.stem))]
        count = max((int(part["count"]) for part in parts), default=0)
        if missing := sorted(set(range(count)) - {int(part["number"]) for part in parts}):
            raise FileNotFoundError(
                f"{where} lacks {len(missing)} of the {count} files of its split {split}, such as number {missing[0]} "
                "from 0: download it again."
            )
    return files


def _chosen_splits(found: list[str], where: str, name: str, splits: Sequence[str] | None) -> dict[str, str]:
    """The splits that are wanted, training first: what to call each, and what it is called where it lies."""
    chosen = {split: split for split in found}
    if "/" in name:
        prefix = _prefix(name)
        named = {split.removeprefix(prefix): split for split in found if split.startswith(prefix)}
        if not named and any(split.startswith("refcoco") for split in found):
            raise ValueError(f"{where} has no splits of {name}; it has {', '.join(sorted(found))}.")
        chosen = named or chosen
    if missing := [split for split in splits or () if split not in chosen]:
        raise ValueError(f"{where} has no split {', '.join(missing)}; it has {', '.join(sorted(chosen))}.")
    return {split: chosen[split] for split in sorted(chosen, key=training_first) if not splits or split in splits}


def _prefix(name: str) -> str:
    """What the splits of a data set such as `refcoco+/unc` begin with where they are among others'."""
    return name.replace("+", "_plus").replace("/", "_") + "_"


def _download(repository: str, name: str, splits: Sequence[str] | None) -> Path:
    """Download the Parquet files of the splits that are wanted, or find them in the cache without the Hub."""
    try:
        listed = _listed_files(repository)
        if listed is None:
            wanted = [prefix + split for prefix in ("", _prefix(name)) for split in splits or ["*"]]
            patterns = [f"{start}{split}{end}" for split in wanted for start in ("", "*/") for end in FILE_ENDS]
        else:
            chosen = _chosen_files(listed, HUB + repository, Path(), name, splits)
            patterns = [glob.escape(os.fspath(file)) for members in chosen.values() for file in members]
        found = snapshot_download(
            repository, repo_type="dataset", allow_patterns=patterns, local_files_only=listed is None
        )
        return Path(found)
    except ValueError:
        raise
    except Exception as error:  # not all errors of the Hub's client are OSErrors
        raise_if_out_of_memory(error)
        raise OSError(
            f"{repository} is no file or folder here, nor to be had from the Hub: {hub_remedy(error)}"
        ) from error


def hub_remedy(error: Exception) -> str:
    """The rest of a sentence: why a data set is not to be had from the Hub, and what to do."""
    if isinstance(error, ConnectionError | LocalEntryNotFoundError):  # `datasets` and `huggingface_hub`
        return (
            "the Hub does not answer, and the set was not downloaded before: connect to the network, unset "
            f"HF_HUB_OFFLINE if it is set, or correct the name ({one_line(error)})."
        )
    return f"check its name ({one_line(error)})."


def _listed_files(repository: str) -> list[PurePosixPath] | None:
    """The Parquet files of a data set on the Hub; None if there is no answer."""
    try:
        listed = HfApi().list_repo_files(repository, repo_type="dataset")
    except (HfHubHTTPError, ValueError):  # the Hub's answer
        raise
    except Exception as error:
        raise_if_out_of_memory(error)
        return None
    return [PurePosixPath(file) for file in listed if file.endswith(".parquet")]


# --- How tables are opened ----------------------------------------------------------------------------------------


def _open_parquet(files: list[Path], root: Path) -> pa.Table:
    """The table of a split's Parquet files, with types as Arrow knows them, whatever the files say of decoding."""
    features, filled = datasets.Features(), []
    for file in files:
        require_inside(file, root)
        try:
            with pq.ParquetFile(file) as parquet:
                features = features or _readable(parquet.schema_arrow)
                filled += [file] if parquet.metadata.num_rows else []
                missing = [column for column in features if column not in parquet.schema_arrow.names]
        except Exception as error:  # Arrow's extension types run code of many libraries
            raise _unreadable(file, error) from error
        if missing and file in filled:
            raise ValueError(
                f"{file} lacks the columns {', '.join(missing)}, which {files[0]} has; give all files of a split the "
                "same columns."
            )
    if not filled:  # `datasets` knows no split without rows
        return features.arrow_schema.empty_table()
    try:
        rows = datasets.load_dataset(
            "parquet",
            data_files=[glob.escape(os.fspath(file)) for file in filled],
            split="train",
            keep_in_memory=False,
            features=features,
            columns=list(features),
            batch_size=ROWS_AT_ONCE,
            fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(**UNBUFFERED),
        )
        return rows.data.table.replace_schema_metadata(None)
    except Exception as error:  # as above; and `datasets` raises what it meets as other types
        raise _unreadable(filled[0], error) from error


def _readable(schema: pa.Schema) -> datasets.Features:
    """The columns whose types `datasets` knows; ValueError if two have the same name."""
    if repeated := {column for column in schema.names if schema.names.count(column) > 1}:
        raise ValueError(f"several columns are called {', '.join(sorted(repeated))}")
    features = datasets.Features()
    for field in schema.remove_metadata():
        try:
            features.update(datasets.Features.from_arrow_schema(pa.schema([field])))
        except Exception as error:  # it may be of no interest; a layout names what it lacks
            raise_if_out_of_memory(error)
    return features


def _saved_files(folder: Path, root: Path) -> list[Path]:
    """The files that hold one split of `save_to_disk`, the state first."""
    state, info = folder / STATE_FILE, folder / INFO_FILE
    for file in (state, info):
        require_exists(file, TABLE_LAYOUT)
        require_inside(file, root)
    with record_errors_begin_with(os.fspath(state), "save_to_disk"):
        files = [Path(file_inside(folder, file["filename"])) for file in load_json(state)["_data_files"]]
    for file in files:
        require_exists(file, TABLE_LAYOUT)
        require_inside(file, root)
    return [state, info, *files]


def _open_saved(folder: Path) -> pa.Table:
    """The table of one split of a folder of `save_to_disk`."""
    try:
        table = datasets.load_from_disk(os.fspath(folder), keep_in_memory=False).data.table
        table.validate(full=True)  # Arrow would follow wrong offsets out of its memory
        return table.replace_schema_metadata(None)
    except Exception as error:  # as in `_open_parquet`
        raise _unreadable(folder, error) from error


def _unreadable(file: Path, error: Exception) -> OSError | ValueError:
    """The error to raise where a library could not read a file."""
    raise_if_out_of_memory(error)
    reason: Any = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
    kind = OSError if isinstance(reason, OSError) else ValueError
    return kind(f"{file} cannot be read as a table ({one_line(reason or error)}); download or write it again.")
