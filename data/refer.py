"""Referring expressions as Hugging Face datasets: the row schema, and a reader of the official REFER layout.

A row is one referred object: an image, the object's mask and every phrase written for it. Importing this module
registers the mask's feature type with `datasets`, so it must be imported before saved rows are loaded again.
"""

import hashlib
import json
import logging
import math
import os
import re
import warnings
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import pyarrow as pa
import yaml
from datasets.features.features import register_feature
from datasets.table import array_cast
from pycocotools import mask as coco_mask

from configuration_detris import one_line, raise_if_out_of_memory, read_regular, require_regular, short_repr
from untrusted_pickles import load_plain_pickle

logger = logging.getLogger(__name__)

# Where each published data set keeps its images under the root, and who split it.
COCO_IMAGES = "images/train2014"
SOURCES = {
    "refcoco": (COCO_IMAGES, ("unc", "google")),
    "refcoco+": (COCO_IMAGES, ("unc",)),
    "refcocog": (COCO_IMAGES, ("umd", "google")),
    "refclef": ("images/saiapr_tc-12", ("unc", "berkeley")),
    "grefcoco": (COCO_IMAGES, ("unc",)),
}
REFER_NAME = re.compile(r"[\w+-][\w+. -]{0,99}")  # of a data set or of who split it, which becomes part of a path
LAYOUT = (
    "the REFER layout is <root>/<dataset>/refs(<split_by>).p, <root>/<dataset>/instances.json and "
    "<root>/<images>/<file name>"
)
NO_TARGET = -1  # gRefCOCO's ann_id of a phrase that nothing in the image answers to; here also that of several objects

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # for some others Pillow starts programs (EPS)
END_OF_JPEG, END_OF_PNG = b"\xff\xd9", b"IEND\xaeB`\x82"
MAX_PIXELS = 178_956_970  # Pillow refuses larger images; pycocotools would allocate whatever a record says
MAX_SIDE = 32_766  # pixels; OpenCV warps no larger images
MAX_OUTLINE = 2_000_000  # pixels around an object; pycocotools keeps some 100 bytes for each
FOREIGN_FORMATS = {  # the first bytes of images in formats that are not read here
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}
LMDB_FILES = ("*.lmdb", "data.mdb", "*/*.lmdb", "*/data.mdb", "lmdb/*/*.lmdb")  # below a data set's folder
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
EXIF_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
MAX_PHRASE, MAX_PHRASES = 10_000, 100_000  # characters of a phrase; of all of an object
MAX_NAME, MAX_SPLIT = 4_096, 200  # characters of a category or file name; bytes of a split's name
MAX_YAML = 100_000  # bytes; the recipes in configs/ have 2,000
RUN_BITS, RUN_MORE, RUN_SIGN, RUN_LONGEST = 5, 0x20, 0x10, 7  # COCO's compressed runs: bits a character, its flags


@dataclass
class RleMask:
    """Feature type of a binary mask: stored as COCO RLE (a few hundred bytes), read as an array.

    Takes an array (H, W), zero outside the object, or an RLE `{"size": [H, W], "counts": str, bytes or list of int}`;
    gives a uint8 array (H, W) of 0 and 1, or the stored RLE when `decode=False`. What `run_lengths` refuses raises its
    ValueError: a list of counts when it is stored, compressed counts when they are decoded.
    """

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "numpy.ndarray"
    pa_type: ClassVar[Any] = pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()})
    _type: str = field(default="RleMask", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: np.ndarray | list | dict) -> dict:
        if not isinstance(value, dict):
            value = coco_mask.encode(np.asfortranarray(np.asarray(value) != 0, dtype=np.uint8))
        elif isinstance(value["counts"], list):
            value = _compressed(run_lengths(value), value["size"])
        counts = value["counts"]
        return {
            "size": [int(side) for side in value["size"]],
            "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
        }

    def decode_example(self, value: np.ndarray | dict, token_per_repo_id: dict | None = None) -> np.ndarray:
        if isinstance(value, np.ndarray):
            return value  # (H, W)
        run_lengths(value)
        return coco_mask.decode(value)  # (H, W)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        if pa.types.is_list(storage.type):  # `Dataset.map` hands back the arrays it decoded as nested lists
            masks = [None if mask is None else self.encode_example(mask) for mask in storage.to_pylist()]
            storage = pa.array(masks, self.pa_type)
        return array_cast(storage, self.pa_type)


with warnings.catch_warnings():  # `datasets` calls third-party feature types experimental, each time
    warnings.simplefilter("ignore")
    register_feature(RleMask, "RleMask")

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "mask": RleMask(),
        "sentences": datasets.List(datasets.Value("string")),
        "ref_id": datasets.Value("int64"),
        "ann_id": datasets.Value("int64"),
        "image_id": datasets.Value("int64"),
        "category": datasets.Value("string"),
        "bbox": datasets.List(datasets.Value("float64"), length=4),  # x, y, width, height, in pixels
    }
)


def require_columns(where: str, names: Iterable[str]) -> None:
    """Refuse rows that lack a column of `FEATURES` with a ValueError that begins with `where`."""
    if missing := FEATURES.keys() - set(names):
        raise ValueError(f"{where} has no columns {sorted(missing)}: see data/README.md.")


def require_rows(where: str, rows: datasets.Dataset) -> None:
    """Refuse with a ValueError that begins with `where` rows without a mask, phrases or a number of their own."""
    table = rows.select_columns(["ref_id", "mask", "sentences"]).with_format("arrow")[:]
    ref_ids = table["ref_id"].to_pylist()
    for column, remedy in (
        ("ref_id", "number the rows"),
        ("mask", "give an empty mask where nothing answers to the phrases, or leave the rows out"),
        ("sentences", "write phrases or leave the rows out"),
    ):
        if nulls := table[column].null_count:
            index = table[column].is_null().index(True).as_py()
            raise ValueError(
                f"{where} has {nulls} rows whose {column} is null, first row {index} with ref_id {ref_ids[index]}: "
                f"{remedy}."
            )
    check_ref_ids(where, ref_ids)


class Records:
    """The records of one data set, read one at a time. `open_records` (`sources.py`) opens every layout.

    Opening reads the annotation files. `read` then depends on its index alone, so forked processes can share the work.

    Attributes:
        name: of the data set, such as `refcoco/unc`.
        refs: the file or folder that says who refers to what; every complaint about a record starts with it.
        images: folder that its images are in.
        fingerprint: changes with the name, the folder of images and the annotation files, whose images and PNG masks
            it does not look at.
        without_phrases: objects of the annotation files that are none of the records, since nobody has described them.
        layout: a clause on where its files belong, for complaints about missing ones.
    """

    layout: str = LAYOUT
    without_phrases: int = 0

    def __init__(self, name: str, refs: Path, images: Path, annotation_files: Iterable[Path]) -> None:
        self.name, self.refs, self.images = name, refs, images
        digest = hashlib.sha256(repr((type(self).__name__, name, os.fspath(images))).encode())
        for path in annotation_files:
            require_regular(path)
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        self.fingerprint = digest.hexdigest()
        self._sound_images: set[tuple[str, tuple[int, int]]] = set()

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[str, dict]:
        """The split and row of a record.

        The row has the columns of `FEATURES`, its image as an absolute path and its mask as compressed RLE, whose
        `size` is the (height, width) that the image should have.

        Raises:
            OSError: a file that the record names is missing or unreadable.
            ValueError: the record is broken, or names a file outside the data set's folder.
        """
        raise NotImplementedError

    def check(self, row: dict) -> None:
        """Open the image of a row that was read, once; raises what `check_image` does, with the row named."""
        image = row["image"], tuple(row["mask"]["size"])
        if image not in self._sound_images:
            with naming(f"{self.refs}, ref_id {row['ref_id']}"):
                check_image(*image, self.layout)
            self._sound_images.add(image)


class ReferRecords(Records):
    """Records in the official REFER layout, or in that of gRefCOCO, which has a JSON file of refs.

    Raises:
        FileNotFoundError: a folder or annotation file is missing.
        ValueError: it is not known where its images are, or an annotation file holds what it should not.
    """

    def __init__(
        self, root: str | os.PathLike, dataset: str, split_by: str, images: str | os.PathLike | None = None
    ) -> None:
        files = refer_files(root, dataset, split_by, images)
        for path in (Path(root).absolute(), *files):
            require(path, root=root)
        super().__init__(f"{dataset}/{split_by}", files.refs, files.images, (files.refs, files.instances))
        self.files = files
        self._refs, self.without_phrases = read_refs(files.refs)
        self._instances = read_instances(files.instances)

    def __len__(self) -> int:
        return len(self._refs)

    def read(self, index: int) -> tuple[str, dict]:
        return read_row(self.files, *self._refs[index], self._instances)


def skipped(without_phrases: int) -> str:
    """What to tell of objects that are no records."""
    return f"{without_phrases} objects have no phrases and are skipped, as in the official loader."


def load_records(records: Records) -> datasets.DatasetDict:
    """Read all records; the first that is broken ends it. Every image file is opened once to compare its header.

    Returns:
        A dataset for each split that the records name, in their order, with the columns of `FEATURES`.

    Raises:
        OSError, ValueError: as `Records.read` and `Records.check`, or two records share their ref_id, or there are
            none.
    """
    require_records(records)
    splits = defaultdict(list)
    for index in range(len(records)):
        split, row = records.read(index)
        records.check(row)
        splits[split].append(row)
    check_ref_ids(records.refs, [row["ref_id"] for rows in splits.values() for row in rows])
    if records.without_phrases:
        logger.warning(f"{records.refs}: {skipped(records.without_phrases)}")
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows, features=FEATURES) for split, rows in splits.items()}
    )


def require_records(records: Records) -> None:
    """Refuse annotation files without any record with a ValueError."""
    if not len(records):
        raise ValueError(f"{records.refs} has no records.")


def load_refer(
    root: str | os.PathLike, dataset: str, split_by: str, images: str | os.PathLike | None = None
) -> datasets.DatasetDict:
    """Read one data set in the official REFER layout, one row for each referred object.

    The layout is that of the official reader (lichengunc/refer, `refer.py`), with COCO's images in
    `images/train2014`. Every image file is opened once to compare its header with the annotations.

    Args:
        root: folder that holds `images/` and one folder for each data set.
        dataset: `refcoco`, `refcoco+`, `refcocog`, `refclef` or `grefcoco`; with `images` any other folder in the root
            that holds `refs(<split_by>).p` and `instances.json`, such as RRSIS-D's `rrsisd`.
        split_by: who split it: `unc`, `umd`, `google` or `berkeley`, or what else its file of refs is called by.
        images: folder of the images, where it is not the published sets' own.

    Returns:
        A dataset for each split that the refs file names, in the file's order, with the columns of `FEATURES`.

    Raises:
        FileNotFoundError: a folder, annotation file or image is missing.
        OSError: an image is truncated or no image at all.
        ValueError: it is not known where the images are, or a file or row holds what it should not.
    """
    return load_records(ReferRecords(root, dataset, split_by, images))


def check_ref_ids(refs: str | os.PathLike, ref_ids: list[int]) -> None:
    """Refuse with a `ValueError` numbers that two refs share: predictions are named by them."""
    repeated = [ref_id for ref_id, count in Counter(ref_ids).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{refs}: {len(repeated)} ref_ids stand at several refs, such as {repeated[0]}; give each its own."
        )


class ReferFiles(NamedTuple):
    """Where a data set keeps what it consists of."""

    images: Path  # a folder
    refs: Path
    instances: Path


def refer_files(
    root: str | os.PathLike, dataset: str, split_by: str, images: str | os.PathLike | None = None
) -> ReferFiles:
    """Where under `root` a data set belongs, whether it is there or not.

    Args:
        images: folder of its images, where it is not a published set's own.

    Raises:
        ValueError: a name leads elsewhere, or the data set is unknown and there are no `images`.
    """
    known = dataset in SOURCES and split_by in SOURCES[dataset][1]
    if images is None and not known or not (REFER_NAME.fullmatch(dataset) and REFER_NAME.fullmatch(split_by)):
        names = ", ".join(f"{name} ({' or '.join(splits)})" for name, (_, splits) in SOURCES.items())
        raise ValueError(
            f"There is no data set {short_repr(dataset)} split by {short_repr(split_by)}; known are {names}, and any "
            "other folder in the root of which `images` says where its images are."
        )
    root = Path(root).absolute()
    refs = f"grefs({split_by}).json" if dataset == "grefcoco" else f"refs({split_by}).p"
    images = root / SOURCES[dataset][0] if images is None else Path(images).absolute()
    return ReferFiles(images, root / dataset / refs, root / dataset / "instances.json")


def require(path: Path, layout: str = LAYOUT, root: str | os.PathLike | None = None) -> None:
    """Raise a FileNotFoundError that shows the layout if there is no such file or folder of the data set in `root`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {layout}{instead_of_lmdb(root)}.")


def instead_of_lmdb(root: str | os.PathLike | None) -> str:
    """A clause on what to read instead if a data set's folder holds LMDB files; otherwise nothing."""
    root = None if root is None else Path(root)
    if root is None or not (root.suffix == ".lmdb" or any(any(root.glob(pattern)) for pattern in LMDB_FILES)):
        return ""
    return (
        "; there are LMDB files, which are not read here: give the folders anns/ and masks/ that the official code "
        "made them from (`python -m data.prepare cris <folder of both> --name <set>`)"
    )


def require_regular_files(folder: str | os.PathLike) -> None:
    """Refuse a folder that holds, at any depth, what `require_regular` refuses or links to nothing."""
    for path in Path(folder).rglob("*"):
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is no regular file.")


def require_inside(path: str | os.PathLike, *folders: Path) -> None:
    """Refuse with a ValueError what is no regular file, or what links put outside of all the folders."""
    require_regular(path)
    _refuse_link_out(path, *folders)


def _refuse_link_out(path: str | os.PathLike, *folders: Path) -> None:
    homes = [*folders, *(folder.parent.parent / "blobs" for folder in folders if folder.parent.name == "snapshots")]
    real = Path(os.path.realpath(path))  # the Hub's cache links its snapshots' files to its blobs
    if not any(real.is_relative_to(os.path.realpath(home)) for home in homes):
        raise ValueError(f"{path} is a link that leads out of {folders[0]}; put a copy there.")


def file_inside(folder: Path, name: str, *homes: Path) -> str:
    """The path of the file that a record calls `name`, whether it is there or not.

    Raises:
        ValueError: the name is no relative path below the folder, or a link on the way leads out of folder and homes.
    """
    parts = Path(checked_text(name, "the file name", MAX_NAME)).parts
    if not parts or os.path.isabs(name) or ".." in parts:
        raise ValueError(f"{short_repr(name)} is not inside {folder}.")
    if "::" in name or "://" in name:  # `datasets` opens only what stands before or behind
        raise ValueError(f"{short_repr(name)} would be taken for an address; rename it without '::' and '://'.")
    path = os.fspath(folder)
    for part in parts:
        path = os.path.join(path, part)
        if os.path.islink(path):
            _refuse_link_out(os.path.join(folder, *parts), folder, *homes)
    return path


def read_refs(path: Path) -> tuple[list[tuple[int, Any]], int]:
    """Read a refs file, a pickle or gRefCOCO's JSON.

    gRefCOCO's has objects without phrases. Its loaders read phrase by phrase, so that they never meet them, as its
    authors say (henghuiding/gRefCOCO, issues 3 and 8). In other files they are a fault, for `read_row` to name.

    Returns:
        The refs, each with its place in the file, and how many without phrases were skipped.

    Raises:
        ValueError: it holds no list, or more than plain data, or is a link out of the data set.
    """
    require_inside(path, path.parent, path.parent.parent)
    refs = load_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    if not isinstance(refs, list):
        raise ValueError(f"{path} holds a {type(refs).__name__}, not a list of refs.")
    several = path.suffix == ".json"
    kept = [
        (index, ref)
        for index, ref in enumerate(refs)
        if not (several and isinstance(ref, dict) and ref.get("sentences") == [])
    ]
    return kept, len(refs) - len(kept)


def load_json(path: Path, **options: Any) -> Any:
    """Read a JSON file; raises ValueError if it is none."""
    try:
        content = read_regular(path)
        return json.loads(content, **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}); get it again from where it was published.") from error


class _LoaderWithoutAliases(yaml.SafeLoader):
    """Refuses aliases: with them, 300 bytes stand for more values than anybody can search, or for a list in itself."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            problem = f"an alias, *{alias.anchor}, stands where its values must be written out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=alias.start_mark)
        return super().compose_node(parent, index)


def load_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file, or a JSON file, which is YAML too; nothing in it is run.

    Raises:
        ValueError: it is neither, has aliases, or is larger than `MAX_YAML`.
        OSError: it cannot be read.
    """
    require_regular(path)
    with open(path, "rb") as file:
        content = file.read(MAX_YAML + 1)
    if len(content) > MAX_YAML:
        raise ValueError(f"{path} has over {MAX_YAML:,} bytes, which no file of settings needs: give another.")
    try:
        return yaml.load(content.decode(), _LoaderWithoutAliases)
    except Exception as error:  # PyYAML raises many types where a value does not fit its tag
        raise_if_out_of_memory(error)
        raise ValueError(f"{path} is not YAML ({one_line(error)}): correct it there.") from error


def read_instances(path: Path) -> dict[str, dict[int, dict]]:
    """Read `instances.json`: its images, annotations and categories, each by id.

    Raises:
        ValueError: it is no COCO annotation file, or is a link out of the data set.
    """
    require_inside(path, path.parent, path.parent.parent)
    try:
        instances = load_json(path, object_hook=_pack_polygons)
        return {
            key: {record["id"]: record for record in instances[key]} for key in ("images", "annotations", "categories")
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO annotation file ({one_line(repr(error))}).") from error


def _pack_polygons(record: dict) -> dict:
    """A quarter of the memory, while the file is still being read. What is no polygon stays for `_rle` to refuse."""
    if isinstance(record.get("segmentation"), list):
        try:
            record["segmentation"] = [array("d", polygon) for polygon in record["segmentation"]]
        except (TypeError, OverflowError):
            pass
    return record


def read_row(
    files: ReferFiles, index: int, ref: dict, instances: dict[str, dict[int, dict]], home: Path | None = None
) -> tuple[str, dict]:
    """The split and row of the ref at `index`, whose image is not looked at.

    A list of ann_ids is gRefCOCO's way to refer to several objects, whose masks and boxes are united, or, as `[-1]`,
    to none. As in its official loader, crowds do not count (henghuiding/ReLA, `grefer.py`, `getMaskByRef`).

    Args:
        home: folder that images may be linked to, besides their own; by default the data set's root.

    Raises:
        ValueError: the ref is broken, or a record that it names is missing or broken.
    """
    ref_id = ref.get("ref_id") if isinstance(ref, dict) else None
    with naming(f"{files.refs}, " + (f"ref_id {ref_id}" if is_int64(ref_id) else f"entry {index}")):
        several = isinstance(ref["ann_id"], list)
        ann_ids = ref["ann_id"] if several else [ref["ann_id"]]
        category_ids = ref["category_id"] if several else [ref["category_id"]]
        no_target = several and ann_ids == [NO_TARGET]
        if no_target:
            ann_ids, category_ids = [], []
        image = _record(instances["images"], "image_id", ref["image_id"])
        annotations = [_record(instances["annotations"], "ann_id", ann_id) for ann_id in dict.fromkeys(ann_ids)]
        for annotation in annotations:
            if annotation["image_id"] != image["id"]:
                raise ValueError(
                    f"ann_id {short_repr(annotation['id'])} is of image {short_repr(annotation['image_id'])}, "
                    f"not {short_repr(image['id'])}."
                )
        if several:
            annotations = [annotation for annotation in annotations if not annotation.get("iscrowd")]
        if not annotations and not no_target:
            raise ValueError(f"the ann_ids {short_repr(ann_ids)} name no object; for no target give [{NO_TARGET}].")
        categories = {_record(instances["categories"], "category_id", key)["name"] for key in category_ids}
        masks = [part for annotation in annotations for part in _parts(annotation["segmentation"])]
        boxes = [checked_bbox(annotation["bbox"], annotation["id"]) for annotation in annotations]
        return make_row(
            split=ref["split"],
            image=file_inside(files.images, image["file_name"], home or files.refs.parent.parent),
            size=(image["height"], image["width"]),
            mask=None if no_target else masks,
            sentences=[sentence["sent"] for sentence in ref["sentences"]],
            ref_id=ref["ref_id"],
            ann_id=annotations[0]["id"] if len(annotations) == 1 else NO_TARGET,
            image_id=image["id"],
            category=categories.pop() if len(categories) == 1 else "",
            bbox=_box_around(boxes) if boxes else None,
        )


def make_row(
    *,
    split: str,
    image: str,
    size: tuple[int, int],
    mask: dict | list | None,
    sentences: list[str],
    ref_id: int,
    ann_id: int,
    image_id: int,
    category: str,
    bbox: list[float] | None,
) -> tuple[str, dict]:
    """Check what every layout has in common; the result is that of `Records.read`.

    Args:
        size: (height, width) in pixels.
        mask: COCO's polygons or RLEs; None for no target.
        bbox: x, y, width, height in pixels; None for the mask's own.

    Raises:
        ValueError: names the first part that is wrong.
    """
    if sum(len(checked_text(sentence, "a phrase", MAX_PHRASE)) for sentence in sentences) > MAX_PHRASES:
        raise ValueError(f"the phrases have over {MAX_PHRASES:,} characters in all; leave some out.")
    phrases = [sentence.strip() for sentence in sentences]
    if not phrases:
        raise ValueError("there are no phrases; write at least one.")
    if not all(phrases):
        raise ValueError(f"one of the phrases {short_repr(phrases)} is empty; write it or remove it.")
    # It becomes a folder's name when the rows are saved.
    if not isinstance(split, str) or not re.fullmatch(r"\w{1,64}", split) or len(split.encode()) > MAX_SPLIT:
        raise ValueError(f"{short_repr(split)} cannot name a split; use letters and digits.")
    for name, number in (("ref_id", ref_id), ("ann_id", ann_id), ("image_id", image_id)):
        if not is_int64(number):
            raise ValueError(f"{name} is {short_repr(number)}; give a whole number of 64 bits.")
    if not all(type(side) is int and 0 < side <= MAX_SIDE for side in size) or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"image_id {image_id} is recorded as {short_repr(size[0])} x {short_repr(size[1])} pixels; a side has at "
            f"most {MAX_SIDE:,} and an image {MAX_PIXELS:,}."
        )
    if mask is None:
        mask = {"size": list(size), "counts": [size[0] * size[1]]}
    rle = _rle(mask, size, f"ann_id {ann_id}")
    row = {
        "image": checked_text(image, "the image's path", 2 * MAX_NAME),
        "mask": rle,
        "sentences": phrases,
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "category": checked_text(category, "the category", MAX_NAME),
        "bbox": coco_mask.toBbox(rle).tolist() if bbox is None else checked_bbox(bbox, ann_id),
    }
    return split, row


def checked_bbox(bbox: list[float], ann_id: int) -> list[float]:
    """The box, if it is x, y, width and height; ValueError if not."""
    if (
        not isinstance(bbox, list)
        or len(bbox) != 4
        or not all(type(side) in (int, float) and math.isfinite(side) for side in bbox)
    ):
        raise ValueError(
            f"ann_id {short_repr(ann_id)} has the bbox {short_repr(bbox)}; give x, y, width and height in pixels."
        )
    return [float(side) for side in bbox]


def _box_around(boxes: list[list[float]]) -> list[float]:
    if len(boxes) == 1:  # as it was written: right - left would round
        return boxes[0]
    left, top = (min(box[axis] for box in boxes) for axis in (0, 1))
    right, bottom = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    return [left, top, right - left, bottom - top]


def _record(records: dict[int, dict], name: str, key: int) -> dict:
    if key not in records:
        raise ValueError(f"{name} {short_repr(key)} is not in instances.json; take both files from the same release.")
    return records[key]


@contextmanager
def naming(where: str, format_name: str = "REFER") -> Iterator[None]:
    """Begin what a broken record raises inside with `where`, as ValueError or OSError."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {one_line(error)}") from error
    except OSError as error:
        raise OSError(f"{where}: {one_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error)}") from error
    except KeyError as error:
        reason = f"a field is missing ({one_line(error)}); see data/README.md for what {format_name} has"
        raise ValueError(f"{where}: {reason}.") from error
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"a field is missing or not of {format_name}'s type ({one_line(repr(error))})."
        raise ValueError(f"{where}: {reason}") from error


def checked_text(value: str, name: str, limit: int) -> str:
    """The value, if it is text that Arrow can store; ValueError if not."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {short_repr(value)}; give text.")
    if len(value) > limit:
        raise ValueError(f"{name} has {len(value):,} characters; at most {limit:,} are allowed.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} {short_repr(value)} holds half a character; write it as Unicode text.") from error
    return value


def is_int64(value: Any) -> bool:
    """Whether it is a whole number that the columns of ids can hold."""
    return type(value) is int and -(2**63) <= value < 2**63


def check_image(path: str | os.PathLike, size: tuple[int, int], layout: str = LAYOUT) -> None:
    """Make sure that an image's file is whole and as large, (height, width), as its record says.

    Raises:
        FileNotFoundError: there is none; says what its layout is.
        OSError: it is truncated or no image at all.
        ValueError: it has another size.
    """
    found, turned = _image_header(path, layout, whole=True)
    if found != size:
        upright = " when upright, as its EXIF orientation says" if turned else ""
        remedy = "annotate the upright image" if turned else "take the image that was annotated, or correct the record"
        raise ValueError(
            f"image {path} is {found[0]} x {found[1]} pixels (height x width){upright}, but its record says "
            f"{size[0]} x {size[1]}: {remedy}."
        )


@contextmanager
def opened_image(
    path: str | os.PathLike, what: str, layout: str, formats: Sequence[str]
) -> Iterator[tuple[BinaryIO, PIL.Image.Image]]:
    """A stranger's image file and what Pillow makes of its header.

    Args:
        what: what to call it in complaints.
        layout: a clause on where it belongs.
        formats: those that Pillow may take it for.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is none of the formats, or broken as far as it is read inside.
    """
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # reading a pipe would wait for ever
            raise OSError("it is no regular file")
        with open(path, "rb") as file, PIL.Image.open(file, formats=formats) as image:
            yield file, image
    except FileNotFoundError:
        raise FileNotFoundError(f"{what} {path} does not exist; {layout}.") from None
    except PIL.UnidentifiedImageError as error:
        wanted = " or ".join(formats)
        with open(path, "rb") as file:
            other = image_format(file)
        if other:
            raise OSError(f"{what} {path} cannot be read (it is {other}); convert it to {wanted}.") from error
        raise OSError(f"{what} {path} cannot be read (it is no {wanted}); copy or download it again.") from error
    except Exception as error:  # Pillow's decoders raise many types
        raise_if_out_of_memory(error)
        raise OSError(f"{what} {path} cannot be read ({one_line(error)}); copy or download it again.") from error


def image_format(file: BinaryIO) -> str:
    """The format of an image file by how it begins, whether it is read here or not; nothing if it is no image's."""
    start = file.read(16)
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
        return "HEIC or AVIF"
    if foreign := [name for begin, name in FOREIGN_FORMATS.items() if start.startswith(begin)]:
        return foreign[0]
    file.seek(0)
    try:
        with PIL.Image.open(file, formats=IMAGE_FORMATS) as image:
            return image.format
    except Exception as error:  # Pillow's decoders raise many types
        raise_if_out_of_memory(error)
        return ""


def image_size(path: str | os.PathLike, layout: str = LAYOUT, whole: bool = False) -> tuple[int, int]:
    """The (height, width) of an image seen upright, as `datasets.Image` turns it, from its header.

    Args:
        whole: whether to make sure that the file does not end early.

    Raises:
        FileNotFoundError: there is none; says what its layout is.
        OSError: it is no image, or truncated.
        ValueError: its pixels have 32 bits.
    """
    return _image_header(path, layout, whole)[0]


def _image_header(path: str | os.PathLike, layout: str, whole: bool) -> tuple[tuple[int, int], bool]:
    """What `image_size` gives, and whether EXIF swaps the sides for that."""
    with opened_image(path, "image", layout, IMAGE_FORMATS) as (file, image):
        size, mode = image.size[::-1], image.mode
        turned = image.getexif().get(PIL.ExifTags.Base.Orientation) in EXIF_SIDEWAYS
        if turned and image.format != "TIFF":  # Pillow turns a TIFF's size itself
            size = size[::-1]
        if whole:
            file.seek(-len(END_OF_PNG), os.SEEK_END)
            if not file.read().endswith((END_OF_JPEG, END_OF_PNG)):
                image.load()  # likely cut short: decode it to be sure, at 20 times the cost
    if mode in ("I", "F"):
        raise ValueError(f"image {path} has pixels of 32 bits (mode {mode}); write 8 bits a channel.")
    return size, turned


def _parts(segmentation: list | dict) -> list:
    if segmentation is None:
        raise ValueError("its mask is null; give polygons or RLE.")
    return [segmentation] if isinstance(segmentation, dict) else segmentation


def _rle(segmentation: list | dict, size: tuple[int, int], name: str) -> dict:
    """The union of COCO's polygons, RLEs and compressed RLEs as one compressed RLE of (height, width).

    pycocotools trusts its input: corners far away or not finite crash it, and so does an outline for whose points
    there is no memory. All of these are refused here.
    """
    if not (parts := _parts(segmentation)):
        raise ValueError(f"{name} has no mask; give polygons or RLE.")
    runs, outline = [], 0.0
    for part in parts:
        if isinstance(part, dict):
            runs.append(_checked_runs(part, size, name))
            continue
        try:
            corners = np.asarray(part, dtype=np.float64)
        except (ValueError, TypeError):  # said below
            corners = np.empty(0)
        # Corners may lie outside the image by its own size. Two corners would be taken for a box.
        if corners.ndim != 1 or corners.size < 6 or corners.size % 2 or not (np.abs(corners) <= 2 * max(size)).all():
            raise ValueError(f"{name}: {short_repr(part)} is no polygon x1, y1, x2, y2, x3, y3 … near its image.")
        outline += np.abs(np.diff(corners.reshape(-1, 2), axis=0)).max(axis=1).sum()
        if outline > MAX_OUTLINE:
            raise ValueError(
                f"{name}: the outline of {short_repr(parts)} is over {MAX_OUTLINE:,} pixels long; none is."
            )
        runs += coco_mask.frPyObjects([corners.tolist()], *size)
    return RleMask().encode_example(coco_mask.merge(runs))


def _checked_runs(rle: dict, size: tuple[int, int], name: str) -> dict:
    height, width = size
    if tuple(rle["size"]) != size:
        raise ValueError(
            f"{name}: the mask is {short_repr(rle['size'])}, but its image is {[height, width]} (height, width)."
        )
    with naming(name):
        lengths = run_lengths(rle)
    filled = np.flatnonzero(lengths)  # `merge` writes behind its memory where runs of no length outnumber the pixels
    values = filled % 2
    starts = np.flatnonzero(np.diff(values, prepend=1 - values[0]))
    lengths = np.add.reduceat(lengths[filled], starts)
    return _compressed(lengths if values[0] == 0 else np.concatenate(([0], lengths)), size)


def _compressed(lengths: np.ndarray, size: Sequence[int]) -> dict:
    return coco_mask.frPyObjects({"size": size, "counts": lengths.tolist()}, *size)


def run_lengths(rle: dict) -> np.ndarray:
    """How many pixels of 0 and of 1 follow each other by turns, down the columns, in COCO's RLE, compressed or not.

    No RLE of strangers may reach pycocotools before it was here: pycocotools reads on behind compressed runs that are
    cut off, writes behind its memory for runs of over 30 bits, divides by sides of 0, and leaves pixels undefined
    that no run covers.

    Raises:
        ValueError: the size is none, or the counts are none or not as many as the size has pixels.
    """
    size, counts = mask_size(rle), rle["counts"]
    if isinstance(counts, list):
        if not all(type(length) is int and 0 <= length <= MAX_PIXELS for length in counts):
            raise ValueError(f"the mask's runs {short_repr(counts)} are no numbers of pixels.")
        lengths = np.asarray(counts, dtype=np.int64)
    else:
        lengths = _decompressed(counts if isinstance(counts, bytes) else counts.encode())
        if lengths is None or (lengths < 0).any():
            raise ValueError(f"the mask's runs {short_repr(counts)} are not COCO's compressed counts.")
    total, pixels = int(lengths.sum()), size[0] * size[1]
    if total != pixels:
        raise ValueError(
            f"the mask's runs are {'more' if total > pixels else 'fewer'} than {size[0]} x {size[1]} pixels."
        )
    return lengths


def mask_size(rle: dict) -> tuple[int, int]:
    """The (height, width) of an RLE; ValueError if it has none."""
    if rle is None:
        raise ValueError("the mask is null; give an empty mask where nothing answers to the phrases")
    size = rle["size"]
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"the mask's size is {short_repr(size)}; give its height and width in pixels.")
    return tuple(size)


def _decompressed(counts: bytes) -> np.ndarray | None:
    """Run lengths that COCO compressed (cocoapi, `maskApi.c`, `rleToString`); None if these are not any.

    Each is a signed number, 5 bits a character and the lowest first; from the fourth on, what it adds to the one two
    before it.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(codes & RUN_MORE == 0)
    if not codes.size or not ends.size or codes.min() < 0 or codes.max() > 63 or ends[-1] != codes.size - 1:
        return None
    starts = np.concatenate(([0], ends[:-1] + 1))
    digits = ends - starts + 1
    if digits.max() > RUN_LONGEST:
        return None
    places = np.arange(codes.size) - np.repeat(starts, digits)
    values = np.add.reduceat((codes % RUN_MORE) << RUN_BITS * places, starts)
    values -= (codes[ends] & RUN_SIGN != 0).astype(np.int64) << RUN_BITS * digits
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values
