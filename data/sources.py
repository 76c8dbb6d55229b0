"""Readers of further layouts; `open_records` opens a data set in any layout, REFER's among them.

The further layouts are the folders of JSON and PNG of CRIS, ETRIS and DETRIS, the Hub's tables of annotations without
pixels, and a folder of one's own images with a `metadata.jsonl`. docs/data.md shows each of them.
"""

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download

from configuration_detris import one_line, raise_if_out_of_memory, read_regular, short_repr

from .coco_names import COCO_CATEGORIES, coco_image_id
from .images import image_size, read_png_mask
from .records import NO_TARGET, Records, is_int64, lmdb_hint, make_row, require_exists, training_first
from .refer import COCO_IMAGES, Ref, ReferFiles, ReferRecords, read_row
from .table_layouts import TABLE_LAYOUTS
from .tables import TableRecords
from .untrusted import file_inside, load_json, record_errors_begin_with, require_inside

KINDS = ("refer", "cris", "hub_table", "folder", "table", "columns", *TABLE_LAYOUTS)
METADATA = "metadata.jsonl"
ALMOST = 0.85  # of 1: splt is split, and category_id is not category
CRIS_LAYOUT = (
    "the CRIS layout is <path>/anns/<set>/<split>.json, <path>/masks/<set>/<segment_id>.png and <images>/<img_name>"
)
HUB_LAYOUT = "the table's images are COCO's train2014, whose folder is given as `images`"
FOLDER_LAYOUT = (
    f"the layout of a folder is <path>/{METADATA} or <path>/<split>/{METADATA}, with file names relative to it"
)
OWN_KEYS = ("file_name", "mask", "sentences", "split", "category", "bbox", "ref_id", "ann_id", "image_id")
HUB_COLUMNS = ["ref_id", "ann_id", "image_id", "category_id", "split", "sentences", "raw_anns", "raw_image_info"]


def open_records(
    kind: str,
    path: str | os.PathLike,
    name: str = "",
    images: str | os.PathLike | None = None,
    columns: dict[str, str] | None = None,
    splits: Sequence[str] | None = None,
) -> Records:
    """Open a data set in any of the layouts of `KINDS`, and read its annotation files.

    Args:
        kind: `refer` (Ref-ZOM, R-RefCOCO and gRefCOCO included), `cris`, `hub_table`, `folder`, or for tables with
            pixels `table` or the name of one of their layouts.
        path: the folder that holds it; for tables also its id on the Hub, and for those with pixels a Parquet file.
        name: which data set of the folder is meant: for `refer` dataset and split_by, such as `refcoco/unc`; for
            `cris` the folder in `anns`, such as `refcocog_u`. For the other kinds, what to call it; by default the
            path's end.
        images: folder of the images, if it is not where the layout has it.
        columns: for a table with pixels, which of its columns hold `image`, `mask`, `text` and so on.
        splits: for a table with pixels, those to read; others are not even downloaded.

    Raises:
        OSError: an annotation file is missing or unreadable.
        ValueError: the kind or name is unknown, or an annotation file is broken.
    """
    if kind in ("refer", "cris") and not name:
        raise ValueError(
            f"{path} may hold several data sets: give the name of one, such as refcoco/unc or, for cris, refcoco."
        )
    if kind in ("table", "columns", *TABLE_LAYOUTS):
        return TableRecords(path, name, images, columns, splits, kind)
    if kind in KINDS and (columns or splits):
        raise ValueError(
            f"`columns` and `splits` are for tables with pixels, not for the kind {kind}: leave them out."
        )
    if kind == "refer":
        return ReferRecords(path, *name.partition("/")[::2], images=images)
    if kind == "cris":
        return CrisRecords(path, name, images)
    if kind == "hub_table":
        return HubTableRecords(path, name, images)
    if kind == "folder":
        if images is not None:
            raise ValueError(f"A folder's images are named relative to its {METADATA}: leave `images` out.")
        return FolderRecords(path, name)
    lmdb = (
        "; LMDB files were made from the folders anns/ and masks/, which are of the kind cris"
        if kind == "lmdb"
        else ""
    )
    raise ValueError(f"There is no layout {kind!r}; choose from {', '.join(KINDS)}{lmdb}.")


class CrisRecords(Records):
    """Records in the folders that `tools/data_process.py` of CRIS, and with it of ETRIS and DETRIS, writes.

    The segment_id of a record is its ref_id and here also its ann_id. image_id is the number in COCO's file names;
    images with other names are numbered -1, -2, … in the order of their names. Boxes have lost their fractions of
    pixels, and refclef's categories their names.
    """

    layout = CRIS_LAYOUT

    def __init__(self, path: str | os.PathLike, name: str, images: str | os.PathLike | None = None) -> None:
        root = Path(path).absolute()
        if not re.fullmatch(r"[\w+-]+", name):
            raise ValueError(f"{name!r} is no folder in {root / 'anns'}; name one, such as refcoco.")
        annotations, self._root = root / "anns" / name, root
        images = root / COCO_IMAGES if images is None else Path(images).absolute()
        for folder in (annotations, root / "masks" / name, images):
            require_exists(folder, CRIS_LAYOUT, root)
        files = sorted(annotations.glob("*.json"), key=_training_first)
        if not files:
            raise FileNotFoundError(f"{annotations} has no .json file; {CRIS_LAYOUT}{lmdb_hint(root)}.")
        self._records = []
        for file in files:
            require_inside(file, root)
            items = load_json(file)
            if not isinstance(items, list):
                raise ValueError(f"{file} holds a {type(items).__name__}, not a list of records.")
            if not items:
                raise ValueError(f"{file} has no records: leave the file out, or get it again.")
            self._records += [(file, number, item) for number, item in enumerate(items)]
        img_names = (item.get("img_name") for *_, item in self._records if isinstance(item, dict))
        others = {img_name for img_name in img_names if isinstance(img_name, str) and not coco_image_id(img_name)}
        self._ids_of_others = {img_name: -number for number, img_name in enumerate(sorted(others), 1)}
        super().__init__(name, annotations, images, files)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> tuple[str, dict]:
        file, number, item = self._records[index]
        with record_errors_begin_with(f"{file}, entry {number}", "CRIS"):
            ref_id, img_name = item["segment_id"], item["img_name"]
            if not is_int64(ref_id):
                raise ValueError(f"segment_id is {short_repr(ref_id)}; give a whole number of 64 bits.")
            image = file_inside(self.images, img_name, self._root)
            size = image_size(image, self.layout)
            mask = file_inside(self._root, f"masks/{self.name}/{ref_id}.png")
            left, top, right, bottom = item["bbox"]
            return make_row(
                split=file.stem,
                image=image,
                size=size,
                mask=read_png_mask(mask, size, self.layout, wrapped=True),
                sentences=[sentence["sent"] for sentence in item["sentences"]],
                ref_id=ref_id,
                ann_id=ref_id,
                image_id=coco_image_id(img_name) or self._ids_of_others[img_name],
                category="" if self.name.startswith("refclef") else self._category(item["cat"]),
                bbox=[left, top, right - left, bottom - top],
            )

    @staticmethod
    def _category(position: int) -> str:
        """The name of the category that CRIS calls by its place among COCO's 80."""
        if not is_int64(position) or not 0 <= position < len(COCO_CATEGORIES):
            raise ValueError(f"cat is {short_repr(position)}; give one of COCO's 80 categories, from 0.")
        return list(COCO_CATEGORIES.values())[position]


class HubTableRecords(Records):
    """Records in the Hub's tables `jxu124/refcoco`, `jxu124/refcocoplus` and `jxu124/refcocog`, which have no pixels.

    They hold everything else but the names of categories, which are COCO's for their ids. Splits are read from the
    column `split`, in which the rows of the Hub's `test` are testA.
    """

    layout = HUB_LAYOUT

    def __init__(self, path: str | os.PathLike, name: str = "", images: str | os.PathLike | None = None) -> None:
        root = Path(path).absolute()
        if root.exists() and not root.is_dir():
            raise FileNotFoundError(f"{root} is no folder; {HUB_LAYOUT}{lmdb_hint(root)}.")
        name = name or (root.name if root.is_dir() else os.fspath(path))
        if not root.is_dir():
            if images is None:
                raise ValueError(f"Say where COCO's train2014 is: {path} is no folder, so `images` has no default.")
            root = Path(snapshot_download(os.fspath(path), repo_type="dataset", allow_patterns="*.parquet"))
        images = root / COCO_IMAGES if images is None else Path(images).absolute()
        require_exists(images, HUB_LAYOUT)
        files = sorted(root.rglob("*.parquet"), key=_training_first)
        if not files:
            raise FileNotFoundError(f"{root} has no .parquet file; download the table's files there{lmdb_hint(root)}.")
        tables = [self._read_table(file, root) for file in files]
        try:
            table = pa.concat_tables(tables, promote_options="default")
        except pa.ArrowException as error:
            raise_if_out_of_memory(error)
            raise ValueError(
                f"{root}: its tables are not of one kind ({one_line(error)}); download them again."
            ) from error
        self._rows = datasets.Dataset(table.replace_schema_metadata(None))
        super().__init__(name, root, images, files)
        self._categories = {number: {"name": category} for number, category in COCO_CATEGORIES.items()}

    @staticmethod
    def _read_table(file: Path, root: Path) -> pa.Table:
        """The columns of one Parquet file; ValueError if it is none, or lacks one."""
        require_inside(file, root)
        try:
            with pq.ParquetFile(file) as parquet:
                if missing := set(HUB_COLUMNS) - set(parquet.schema_arrow.names):
                    raise ValueError(f"the columns {', '.join(sorted(missing))} are missing")
                return parquet.read(columns=HUB_COLUMNS)
        except Exception as error:  # Arrow's extension types run code of many libraries
            raise_if_out_of_memory(error)
            raise ValueError(
                f"{file} is no table like jxu124/refcoco ({one_line(error)}); download it again."
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[str, dict]:
        ref = self._rows[index]
        with record_errors_begin_with(f"{self.refs}, entry {index}", "the table"):
            image, annotation = json.loads(ref["raw_image_info"]), json.loads(ref["raw_anns"])
            instances = {
                "images": {image["id"]: image},
                "annotations": {annotation["id"]: annotation},
                "categories": self._categories,
            }
        return read_row(ReferFiles(self.images, self.refs, self.refs), Ref(index, ref), instances, home=self.images)


class FolderRecords(Records):
    """Records in a folder of one's own images with a `metadata.jsonl`, a JSON object a line, as `datasets` has it.

    Each line needs `file_name`, `sentences`, and `mask`: a PNG's path, polygons, RLE, or null if the phrases name
    nothing in the image. For fields that are left out, `ref_id` counts the lines and `image_id` the images, both from
    0 and without numbers that other lines give; `ann_id` is the ref_id, or -1 if the mask is null; `category` is
    empty; and `bbox` is the box around the mask.
    """

    layout = FOLDER_LAYOUT

    def __init__(self, path: str | os.PathLike, name: str = "") -> None:
        root = Path(path).absolute()
        require_exists(root, FOLDER_LAYOUT)
        files = metadata_files(root)
        if not files:
            raise FileNotFoundError(f"{root} has no {METADATA}; {FOLDER_LAYOUT}{lmdb_hint(root)}.")
        self._lines = []  # file, line number, text
        for file in files:
            require_inside(file, root)
            lines = enumerate(read_regular(file).splitlines(), 1)
            filled = [(file, number, line) for number, line in lines if line.strip()]
            if not filled:
                raise ValueError(f"{file} has no records: write one JSON object a line, or leave the file out.")
            self._lines += filled
        super().__init__(name or root.name, files[0] if files == [root / METADATA] else root, root, files)
        self._assign_ids()

    def _assign_ids(self) -> None:
        """Choose a ref_id for each line and an image_id for each image that has none; no number is given twice."""
        images, image_ids, ref_ids, unnumbered = {}, set(), set(), []
        for index, (file, _, line) in enumerate(self._lines):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # `read` refuses it
            if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
                continue
            image = _image_key(file, record)
            images.setdefault(image)
            if is_int64(image_id := record.get("image_id")):
                images[image] = image_id if images[image] is None else images[image]
                image_ids.add(image_id)
            if is_int64(ref_id := record.get("ref_id")):
                ref_ids.add(ref_id)
            else:
                unnumbered.append(index)
        free = (number for number in range(len(images) + len(image_ids)) if number not in image_ids)
        self._image_ids = {image: next(free) if number is None else number for image, number in images.items()}
        free = (number for number in range(len(self._lines) + len(ref_ids)) if number not in ref_ids)
        self._ref_ids = {index: next(free) for index in unnumbered}

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, index: int) -> tuple[str, dict]:
        file, number, line = self._lines[index]
        with record_errors_begin_with(f"{file}, line {number}", METADATA):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"it is not JSON in UTF-8 ({error}); write one object a line.") from error
            if not isinstance(record, dict):
                raise ValueError(f"it holds {short_repr(record)}; write one JSON object a line, {{...}}.")
            _require_no_slip(record)
            image = file_inside(file.parent, record["file_name"], self.images)
            size = image_size(image, self.layout)
            mask, sentences = record["mask"], record["sentences"]
            if isinstance(mask, str):
                mask = read_png_mask(file_inside(file.parent, mask, self.images), size, self.layout)
            if not isinstance(mask, dict | list | None):
                raise ValueError(f"mask is {short_repr(mask)}; give a PNG's path, polygons, RLE or null.")
            if not isinstance(sentences, list):
                raise ValueError(f"sentences is {short_repr(sentences)}; give a list of phrases.")
            given = {key: value for key, value in record.items() if value is not None}
            ref_id = given["ref_id"] if "ref_id" in given else self._ref_ids[index]
            image_id = self._image_ids[_image_key(file, record)]
            if is_int64(given.setdefault("image_id", image_id)) and given["image_id"] != image_id:
                raise ValueError(f"image_id is {given['image_id']}, but {image_id} in another line with this image.")
            return make_row(
                split=given.get("split", "train" if file.parent == self.images else file.parent.name),
                image=image,
                size=size,
                mask=mask,
                sentences=sentences,
                ref_id=ref_id,
                ann_id=given.get("ann_id", NO_TARGET if mask is None else ref_id),
                image_id=given["image_id"],
                category=given.get("category", ""),
                bbox=given.get("bbox"),
                own=True,
            )


def _require_no_slip(record: dict) -> None:
    """Refuse a key that is almost one of ours which the line lacks; others can be of use to somebody else."""
    lacking = [key for key in OWN_KEYS if key not in record]
    for key in record.keys() - set(OWN_KEYS):
        if near := difflib.get_close_matches(key, lacking, 1, ALMOST):
            raise ValueError(f"it has the unknown key {short_repr(key)}: write {near[0]}, or name it otherwise.")


def _image_key(file: Path, record: dict) -> str:
    """The path of an image in one spelling, by which it is told from other images."""
    return os.path.normpath(os.path.join(file.parent, record["file_name"]))


def metadata_files(folder: Path) -> list[Path]:
    """The `metadata.jsonl` of a folder of one's own, or else those of its splits, training before the others."""
    file = folder / METADATA
    return [file] if file.exists() else sorted(folder.glob(f"*/{METADATA}"), key=_training_first)


def _training_first(file: Path) -> tuple[int, Path]:
    """A key that sorts files of training before those of validation, and these before all others."""
    return training_first(file.parent.name if file.name == METADATA else file.name)[0], file
