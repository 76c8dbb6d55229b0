"""Referring expressions as Hugging Face datasets: the row schema, and a reader of the official REFER layout.

A row is one referred object: an image, the object's mask and every phrase written for it. Importing this module
registers the mask's feature type with `datasets`, so it must be imported before saved rows are loaded again.
"""

import copyreg
import json
import os
import pickle
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
from datasets.features.features import register_feature
from datasets.table import array_cast
from pycocotools import mask as coco_mask

# Where each data set keeps its images under the root, and the splits of it that were published.
COCO_IMAGES = "images/train2014"
SOURCES = {
    "refcoco": (COCO_IMAGES, ("unc", "google")),
    "refcoco+": (COCO_IMAGES, ("unc",)),
    "refcocog": (COCO_IMAGES, ("umd", "google")),
    "refclef": ("images/saiapr_tc-12", ("unc", "berkeley")),
}
LAYOUT = "<root>/<dataset>/refs(<split_by>).p, <root>/<dataset>/instances.json and <root>/<images>/<file name>"

END_OF_JPEG, END_OF_PNG = b"\xff\xd9", b"IEND\xaeB`\x82"
MAX_PIXELS = 178_956_970  # Pillow refuses larger images; pycocotools would allocate whatever a record says
EXIF_ORIENTATION = 0x0112
EXIF_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height


@dataclass
class RleMask:
    """Feature type of a binary mask: stored as COCO RLE (a few hundred bytes), read as an array.

    Takes an array (H, W), zero outside the object, or an RLE `{"size": [H, W], "counts": str, bytes or list of int}`;
    gives a uint8 array (H, W) of 0 and 1, or the stored RLE when `decode=False`.
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
            value = coco_mask.frPyObjects(value, *value["size"])
        counts = value["counts"]
        return {
            "size": [int(side) for side in value["size"]],
            "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
        }

    def decode_example(self, value: np.ndarray | dict, token_per_repo_id: dict | None = None) -> np.ndarray:
        return coco_mask.decode(value) if isinstance(value, dict) else value  # (H, W)

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


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings and numbers; refuses by name everything a pickle would have to import."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"it asks for {module}.{name}")

    def persistent_load(self, key: Any):
        raise ValueError(f"it asks for the external object {key!r}")


def load_plain_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle from strangers, Python 2's included, without running anything in it.

    Raises:
        ValueError: the file is broken, or holds anything but plain containers, strings and numbers.
    """
    copyreg.clear_extension_cache()  # objects cached there would be handed out without asking `find_class`
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a broken pickle raises whatever its broken part means
            raise ValueError(
                f"{path} is not a pickle of plain containers, strings and numbers ({error}); nothing in it was run, "
                "get the file again from where the data set was published."
            ) from error


def load_refer(root: str | os.PathLike, dataset: str, split_by: str) -> datasets.DatasetDict:
    """Read one data set in the official REFER layout, one row for each referred object.

    The layout is that of the official reader (lichengunc/refer, `refer.py`), with COCO's images in
    `images/train2014`. Every image file is opened once to compare its header with the annotations.

    Args:
        root: folder that holds `images/` and one folder for each data set.
        dataset: `refcoco`, `refcoco+`, `refcocog` or `refclef`.
        split_by: who split it: `unc`, `umd`, `google` or `berkeley`.

    Returns:
        A dataset for each split that the refs file names, in the file's order, with the columns of `FEATURES`.

    Raises:
        FileNotFoundError: a folder, annotation file or image is missing.
        OSError: an image is truncated or no image at all.
        ValueError: the data set is unknown, or a file or row holds what it should not.
    """
    files = refer_files(root, dataset, split_by)
    for path in (Path(root).absolute(), *files):
        require(path)
    refs, instances = read_refs(files.refs), read_instances(files.instances)

    checked = set()  # images that were found in order
    splits = defaultdict(list)
    for index, ref in enumerate(refs):
        split, row, size = read_row(files, index, ref, instances)
        if (row["image"], size) not in checked:
            try:
                check_image(row["image"], size)
            except (OSError, ValueError) as error:
                raise type(error)(f"{files.refs}, ref_id {row['ref_id']}: {error}") from error
            checked.add((row["image"], size))
        splits[split].append(row)
    check_ref_ids(files, [row["ref_id"] for rows in splits.values() for row in rows])
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows, features=FEATURES) for split, rows in splits.items()}
    )


def check_ref_ids(files: "ReferFiles", ref_ids: list[int]) -> None:
    """Refuse with a `ValueError` numbers that two refs share: predictions are named by them."""
    repeated = [ref_id for ref_id, count in Counter(ref_ids).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{files.refs}: {len(repeated)} ref_ids stand at several refs, such as {repeated[0]}; give each its own."
        )


class ReferFiles(NamedTuple):
    """Where a data set keeps what it consists of."""

    images: Path  # a folder
    refs: Path
    instances: Path


def refer_files(root: str | os.PathLike, dataset: str, split_by: str) -> ReferFiles:
    """Where under `root` a data set belongs, whether it is there or not.

    Raises:
        ValueError: the data set is unknown.
    """
    if dataset not in SOURCES or split_by not in SOURCES[dataset][1]:
        known = ", ".join(f"{name} ({' or '.join(splits)})" for name, (_, splits) in SOURCES.items())
        raise ValueError(f"There is no data set {dataset!r} split by {split_by!r}; known are {known}.")
    root = Path(root).absolute()
    return ReferFiles(
        root / SOURCES[dataset][0], root / dataset / f"refs({split_by}).p", root / dataset / "instances.json"
    )


def require(path: Path) -> None:
    """Raise a FileNotFoundError that shows the layout if there is no such file or folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; the REFER layout is {LAYOUT}.")


def read_refs(path: Path) -> list:
    """Read a refs file.

    Raises:
        ValueError: it is no pickle of a list, or holds more than plain data.
    """
    refs = load_plain_pickle(path)
    if not isinstance(refs, list):
        raise ValueError(f"{path} holds a {type(refs).__name__}, not a list of refs.")
    return refs


def read_instances(path: Path) -> dict[str, dict[int, dict]]:
    """Read `instances.json`: its images, annotations and categories, each by id.

    Raises:
        ValueError: it is no COCO annotation file.
    """
    try:
        instances = json.loads(path.read_bytes())
        return {
            key: {record["id"]: record for record in instances[key]} for key in ("images", "annotations", "categories")
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO annotation file ({error!r}).") from error


def read_row(files: ReferFiles, index: int, ref: dict, instances: dict) -> tuple[str, dict, tuple[int, int]]:
    """The split and row of the ref at `index`, and the (height, width) of its image, whose file is not looked at.

    Raises:
        ValueError: the ref is broken, or a record that it names is missing or broken.
    """
    where = f"{files.refs}, entry {index}"
    try:
        where = f"{files.refs}, ref_id {ref['ref_id']}"
        image = _record(instances["images"], "image_id", ref["image_id"])
        annotation = _record(instances["annotations"], "ann_id", ref["ann_id"])
        if annotation["image_id"] != image["id"]:
            raise ValueError(f"ann_id {annotation['id']} is of image {annotation['image_id']}, not {image['id']}.")
        file_name = Path(image["file_name"])
        if file_name.is_absolute() or ".." in file_name.parts:
            raise ValueError(f"image {image['file_name']!r} is not inside {files.images}.")
        sentences = [sentence["sent"].strip() for sentence in ref["sentences"]]
        if not sentences or not all(sentences):
            raise ValueError(f"one of the phrases {sentences} is empty; write it or remove it.")
        if not re.fullmatch(r"\w+", ref["split"]):  # it becomes a folder's name when the rows are saved
            raise ValueError(f"{ref['split']!r} cannot name a split; use letters and digits.")
        size = (image["height"], image["width"])
        if not all(type(side) is int and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"image_id {image['id']} is recorded as {size[0]} x {size[1]} pixels; no image is.")
        if type(ref["ref_id"]) is not int:
            raise ValueError(f"ref_id is {ref['ref_id']!r}; give a whole number.")
        bbox = annotation["bbox"]
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(type(side) in (int, float) for side in bbox):
            raise ValueError(
                f"ann_id {annotation['id']} has the bbox {bbox!r}; give x, y, width and height in pixels."
            )
        row = {
            "image": str(files.images / file_name),
            "mask": _rle(annotation["segmentation"], size, f"ann_id {annotation['id']}"),
            "sentences": sentences,
            "ref_id": ref["ref_id"],
            "ann_id": annotation["id"],
            "image_id": image["id"],
            "category": _record(instances["categories"], "category_id", ref["category_id"])["name"],
            "bbox": bbox,
        }
        return ref["split"], row, size
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where}: a field is missing or not of REFER's type ({error!r}).") from error


def _record(records: dict[int, dict], name: str, key: int) -> dict:
    if key not in records:
        raise ValueError(f"{name} {key} is not in instances.json; take both files from the same release.")
    return records[key]


def check_image(path: str | os.PathLike, size: tuple[int, int]) -> None:
    """Make sure that an image's file is whole and as large, (height, width), as its record says.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is truncated or no image at all.
        ValueError: it has another size.
    """
    try:
        with open(path, "rb") as file, PIL.Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(EXIF_ORIENTATION) in EXIF_SIDEWAYS:  # `datasets.Image` turns it upright
                width, height = height, width
            file.seek(-len(END_OF_PNG), os.SEEK_END)
            if not file.read().endswith((END_OF_JPEG, END_OF_PNG)):
                image.load()  # likely cut short: decode it to be sure, at 20 times the cost
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} does not exist; the REFER layout is {LAYOUT}.") from None
    except Exception as error:  # Pillow's decoders raise many types
        raise OSError(f"image {path} cannot be read ({error}); copy or download it again.") from error
    if (height, width) != size:
        raise ValueError(
            f"image {path} is {height} x {width} pixels (height x width) when upright, as its EXIF orientation says, "
            f"but its record says {size[0]} x {size[1]}: annotate the upright image."
        )


def _rle(segmentation: list | dict, size: tuple[int, int], name: str) -> dict:
    """The union of COCO's polygons, RLEs and compressed RLEs as one compressed RLE of (height, width).

    pycocotools trusts its input: corners far away or not finite crash it, and runs that end early leave pixels
    undefined. So both are refused here.
    """
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not parts:
        raise ValueError(f"{name} has no mask; give polygons or RLE.")
    runs = []
    for part in parts:
        if isinstance(part, dict):
            runs.append(_checked_runs(part, size, name))
            continue
        corners = np.asarray(part, dtype=np.float64)
        # Corners may lie outside the image by its own size. Two corners would be taken for a box.
        if corners.size < 6 or corners.size % 2 or not (np.abs(corners) <= 2 * max(size)).all():
            raise ValueError(f"{name}: {str(part)[:80]} is no polygon x1, y1, x2, y2, x3, y3 … near its image.")
        runs += coco_mask.frPyObjects([part], *size)
    return coco_mask.merge(runs)


def _checked_runs(rle: dict, size: tuple[int, int], name: str) -> dict:
    height, width = size
    if tuple(rle["size"]) != size:
        raise ValueError(f"{name}: the mask is {rle['size']}, but its image is {[height, width]} (height, width).")
    rle = RleMask().encode_example(rle)
    try:
        coco_mask.decode(rle)  # refuses runs that go beyond the image
    except ValueError as error:
        raise ValueError(f"{name}: the mask's runs are more than {height} x {width} pixels.") from error
    try:
        coco_mask.decode(rle | {"size": [height * width - 1, 1]})
    except ValueError:  # one pixel less is too small, so the runs reach the last pixel
        return rle
    raise ValueError(f"{name}: the mask's runs are fewer than {height} x {width} pixels.")
