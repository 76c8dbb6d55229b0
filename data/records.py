"""What all layouts have in common: the schema of rows, one row made and checked, and the `Records` of a data set.

A row is one referred object: an image, the object's mask and every phrase written for it.
"""

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from pycocotools import mask as coco_mask

from configuration_detris import require_regular, short_repr

from .images import MAX_SIDE, check_image
from .masks import MAX_PIXELS, RleMask, _rle, checked_bbox
from .untrusted import MAX_NAME, checked_text, naming

logger = logging.getLogger(__name__)

NO_TARGET = -1  # gRefCOCO's ann_id of a phrase that nothing in the image answers to; here also that of several objects
MAX_PHRASE, MAX_PHRASES = 10_000, 100_000  # characters of a phrase; of all of an object
MAX_SPLIT = 200  # bytes of a split's name
LMDB_FILES = ("*.lmdb", "data.mdb", "*/*.lmdb", "*/data.mdb", "lmdb/*/*.lmdb")  # below a data set's folder

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

    layout: str
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


def is_int64(value: Any) -> bool:
    """Whether it is a whole number that the columns of ids can hold."""
    return type(value) is int and -(2**63) <= value < 2**63


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


def require_records(records: Records) -> None:
    """Refuse annotation files without any record with a ValueError."""
    if not len(records):
        raise ValueError(f"{records.refs} has no records.")


def check_ref_ids(refs: str | os.PathLike, ref_ids: list[int]) -> None:
    """Refuse with a `ValueError` numbers that two refs share: predictions are named by them."""
    repeated = [ref_id for ref_id, count in Counter(ref_ids).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{refs}: {len(repeated)} ref_ids stand at several refs, such as {repeated[0]}; give each its own."
        )


def skipped(without_phrases: int) -> str:
    """What to tell of objects that are no records."""
    return f"{without_phrases} objects have no phrases and are skipped, as in the official loader."


def require(path: Path, layout: str, root: str | os.PathLike | None = None) -> None:
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
