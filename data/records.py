"""What the readers of all layouts share: the schema of a row, how a row is checked, and the `Records` of a data set.

A row is one referred object: an image, the object's mask, and every phrase written for it.
"""

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute
from pycocotools import mask as coco_mask

from configuration_detris import require_regular, short_repr
from letterbox_detris import MAX_SIDE

from .images import check_image
from .masks import MAX_PIXELS, RleMask, checked_bbox, require_in_image, union_of_parts
from .untrusted import MAX_FILE_NAME, checked_text, record_errors_begin_with

logger = logging.getLogger(__name__)

NO_TARGET = -1  # the ann_id where phrases name nothing, as in gRefCOCO; here also where they name several objects
MAX_PHRASE, MAX_PHRASES = 10_000, 100_000  # characters of one phrase, and of all phrases of an object
MAX_SPLIT = 200  # bytes of a split's name, which becomes a folder's
LMDB_FILES = ("*.lmdb", "data.mdb", "*/*.lmdb", "*/data.mdb", "lmdb/*/*.lmdb")  # in a data set's folder

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
# The same columns with images and masks as they are stored, not decoded.
STORED_FEATURES = datasets.Features(FEATURES | {"image": datasets.Image(decode=False), "mask": RleMask(decode=False)})


class Records:
    """The records of one data set, read one at a time. `open_records` (`sources.py`) opens a data set of any layout.

    The annotation files are read when it is made. What `read` gives then depends on the index alone, so that forked
    processes can share the work.

    Attributes:
        name: the data set's name, such as `refcoco/unc`.
        refs: the file or folder that says which phrases name which object; errors about a record begin with it.
        images: folder of the images.
        fingerprint: changes with the name, the folder of images and the annotation files, but not with images and PNG
            masks.
        without_phrases: how many objects of the annotation files are left out of the records, having no phrases.
        layout: a clause on where its files belong, for errors about missing ones.
        embedded: whether the annotation files hold the images, too.
        unique_ref_ids: the columns by which no two rows may be the same.
    """

    layout: str = ""
    without_phrases: int = 0
    embedded: bool = False
    unique_ref_ids: tuple[str, ...] = ("ref_id",)

    def __init__(
        self, name: str, refs: str | Path, images: Path, annotation_files: Iterable[Path], settings: tuple = ()
    ) -> None:
        self.name, self.refs, self.images = name, refs, images
        digest = hashlib.sha256(repr((type(self).__name__, name, os.fspath(images), *settings)).encode())
        for path in annotation_files:
            require_regular(path)
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        self.fingerprint = digest.hexdigest()
        self._sound_images: set[tuple[str | bytes, tuple[int, int]]] = set()

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[str, dict]:
        """Read one record.

        Returns:
            Its split, and a row with the columns of `FEATURES`. The image is an absolute path, or, where it is
            embedded, its file's name or None as `path` and its `bytes`. The mask is a compressed RLE whose `size` is
            the (height, width) that the image should have.

        Raises:
            OSError: a file that the record names is missing or unreadable.
            ValueError: the record is broken, or names a file outside the data set's folder.
        """
        raise NotImplementedError

    def pixels(self, index: int) -> bytes | None:
        """The bytes of a record's image if the annotation files hold it, None if it has a file of its own."""

    def split_of(self, index: int) -> str:
        """The split of a record, for `embedded` ones, without reading all of it."""
        raise NotImplementedError

    def check(self, row: dict) -> None:
        """Check the image of a row that `read` gave, each file once.

        Raises:
            OSError, ValueError: as `check_image`, after the row's number.
        """
        image, size = row["image"], tuple(row["mask"]["size"])
        if isinstance(image, dict):
            image = image["bytes"]
        key = hashlib.sha256(image).digest() if isinstance(image, bytes) else image, size
        if key not in self._sound_images:
            with record_errors_begin_with(f"{self.refs}, ref_id {row['ref_id']}", self.name):
                check_image(image, size, self.layout)
            self._sound_images.add(key)


def load_records(records: Records) -> datasets.DatasetDict:
    """Read all records and check their images; stop at the first that is broken.

    Returns:
        A dataset for each split that the records name, in the records' order, with the columns of `FEATURES`.

    Raises:
        OSError, ValueError: as `Records.read` and `Records.check`.
        ValueError: two records have the same ref_id, or there are no records.
    """
    require_records(records)
    if records.embedded:
        return _load_embedded(records)
    splits = defaultdict(list)
    for index in range(len(records)):
        split, row = records.read(index)
        records.check(row)
        splits[split].append(row)
    require_unique_ref_ids(records.refs, [row["ref_id"] for rows in splits.values() for row in rows])
    if records.without_phrases:
        logger.warning(f"{records.refs}: {skipped_notice(records.without_phrases)}")
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows, features=FEATURES) for split, rows in splits.items()}
    )


def _load_embedded(records: Records) -> datasets.DatasetDict:
    """As `load_records`, where images are embedded: `datasets` writes the rows to its cache, and maps them from there.

    Several processes can do this at once: all but one wait for its result.
    """
    splits = defaultdict(list)
    for index in range(len(records)):
        splits[records.split_of(index)].append(index)
    # Rows in the cache are of no use once the code reads them otherwise.
    digest = hashlib.sha256(records.fingerprint.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    loaded = datasets.DatasetDict()
    for split, indices in splits.items():

        def rows(indices: list[int] = indices) -> Iterator[dict]:
            ref_ids = []
            for index in indices:
                _, row = records.read(index)
                records.check(row)
                ref_ids.append(row["ref_id"])
                yield row
            require_unique_ref_ids(records.refs, ref_ids)

        of_split = hashlib.sha256(f"{digest.hexdigest()} {split}".encode())
        try:
            loaded[split] = datasets.Dataset.from_generator(
                rows, features=FEATURES, keep_in_memory=False, fingerprint=of_split.hexdigest()[:32]
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, OSError | ValueError):
                raise error.__cause__ from None
            raise
    return loaded


def make_row(
    *,
    split: str,
    image: str | dict,
    size: tuple[int, int],
    mask: dict | list | None,
    sentences: list[str],
    ref_id: int,
    ann_id: int,
    image_id: int,
    category: str,
    bbox: list[float] | None,
    own: bool = False,
) -> tuple[str, dict]:
    """Check the parts of a record, which strangers wrote, and put them together.

    Args:
        split: name of its split.
        image: path of its image; or `path`, its name or None, and `bytes` of an embedded one.
        size: (height, width) of the image in pixels.
        mask: COCO's polygons and RLEs; None if the phrases name nothing.
        sentences: its phrases.
        ref_id, ann_id, image_id: its numbers.
        category: name of the object's class.
        bbox: x, y, width, height in pixels; None for the box around the mask.
        own: whether it is somebody's own data, in which polygons without a pixel and boxes outside the image are
            refused, too.

    Returns:
        The split and the row, as `Records.read` gives them.

    Raises:
        ValueError: one of the parts is wrong; the message names the first.
    """
    if sum(len(checked_text(sentence, "a phrase", MAX_PHRASE)) for sentence in sentences) > MAX_PHRASES:
        raise ValueError(f"the phrases have over {MAX_PHRASES:,} characters in all; leave some out.")
    phrases = [sentence.strip() for sentence in sentences]
    if not phrases:
        raise ValueError("there are no phrases; write at least one.")
    if not all(phrases):
        raise ValueError(f"one of the phrases {short_repr(phrases)} is empty; write it or remove it.")
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
    rle = union_of_parts(mask, size, f"ann_id {ann_id}")
    row = {
        "image": image if isinstance(image, dict) else checked_text(image, "the image's path", 2 * MAX_FILE_NAME),
        "mask": rle,
        "sentences": phrases,
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "category": checked_text(category, "the category", MAX_FILE_NAME),
        "bbox": coco_mask.toBbox(rle).tolist() if bbox is None else checked_bbox(bbox, ann_id),
    }
    if own:
        require_in_image(mask, rle, row["bbox"])
    return split, row


def is_int64(value: Any) -> bool:
    """Whether the value is a whole number that a column of ids can hold."""
    return type(value) is int and -(2**63) <= value < 2**63


def require_columns(where: str, names: Iterable[str]) -> None:
    """Refuse columns that are not all those of `FEATURES` with a ValueError that begins with `where`."""
    if missing := FEATURES.keys() - set(names):
        raise ValueError(f"{where} has no columns {sorted(missing)}: see docs/data.md.")


def require_embedded(where: str, images: pa.ChunkedArray) -> None:
    """Refuse images without their bytes with a ValueError that begins with `where`.

    Rows of strangers must not say which files are opened.
    """
    if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = pa.compute.struct_field(images, "bytes")
    if images.null_count or not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise ValueError(
            f"{where} has images of which it holds only the paths, and these are not opened: prepare the data set "
            "with --embed_images."
        )


def require_rows(where: str, rows: datasets.Dataset) -> None:
    """Refuse rows without mask, phrases or a ref_id of their own with a ValueError that begins with `where`."""
    table = rows.select_columns(["ref_id", "mask", "sentences"]).with_format("arrow")[:]
    ref_ids = table["ref_id"].to_pylist()
    for column, remedy in (
        ("ref_id", "number the rows"),
        ("mask", "give an empty mask where the phrases name nothing, or leave the rows out"),
        ("sentences", "write phrases or leave the rows out"),
    ):
        if nulls := table[column].null_count:
            index = table[column].is_null().index(True).as_py()
            raise ValueError(
                f"{where} has {nulls} rows whose {column} is null, first row {index} with ref_id {ref_ids[index]}: "
                f"{remedy}."
            )
    require_unique_ref_ids(where, ref_ids)


def require_records(records: Records) -> None:
    """Refuse annotation files that hold no record with a ValueError."""
    if not len(records):
        raise ValueError(f"{records.refs} has no records.")


def require_unique_ref_ids(refs: str | os.PathLike, ref_ids: list[int]) -> None:
    """Refuse numbers that two refs share with a ValueError: predictions are told apart by them."""
    repeated = [ref_id for ref_id, count in Counter(ref_ids).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{refs}: {len(repeated)} ref_ids stand at several refs, such as {repeated[0]}; give each its own."
        )


def skipped_notice(without_phrases: int) -> str:
    """The sentence that tells how many objects were skipped."""
    skipped = "1 object has" if without_phrases == 1 else f"{without_phrases} objects have"
    return f"{skipped} no phrases and {'is' if without_phrases == 1 else 'are'} skipped, as in the official loader."


def training_first(split: str) -> tuple[int, str]:
    """A key that sorts the names of splits: training before validation, and this before all others."""
    return (0 if split.startswith("train") else 1 if split.startswith("val") else 2, split)


def require_exists(path: Path, layout: str, root: str | os.PathLike | None = None) -> None:
    """Refuse a file or folder that does not exist with a FileNotFoundError.

    Args:
        path: that belongs to a data set.
        layout: a clause on where such files belong, for the message.
        root: folder of the data set; if there are LMDB files, the message says what to give instead.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {layout}{lmdb_hint(root)}.")


def lmdb_hint(root: str | os.PathLike | None) -> str:
    """A clause on what to give in the place of the LMDB files in a data set's folder; empty if there are none."""
    root = None if root is None else Path(root)
    if root is None or not (root.suffix == ".lmdb" or any(any(root.glob(pattern)) for pattern in LMDB_FILES)):
        return ""
    return (
        "; there are LMDB files, which are not read here: give the folders anns/ and masks/ that the official code "
        "made them from (`python -m data.prepare cris <folder of both> --name <set>`)"
    )
