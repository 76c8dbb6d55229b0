"""RefCOCO and its relatives in the layout of the official reader, REFER (lichengunc/refer), and gRefCOCO's variant.

`load_refer` reads a whole data set. Importing this module also registers the masks' feature type (`masks.py`) with
`datasets`: import it before you load saved rows.
"""

import os
import re
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from configuration_detris import one_line, short_repr
from untrusted_pickles import load_plain_pickle

from .masks import box_around, checked_bbox, mask_parts
from .records import NO_TARGET, Records, is_int64, load_records, make_row, require_exists
from .untrusted import file_inside, load_json, record_errors_begin_with, require_inside

COCO_IMAGES = "images/train2014"  # under the root
SOURCES = {  # the published data sets: their folder of images under the root, and who split them
    "refcoco": (COCO_IMAGES, ("unc", "google")),
    "refcoco+": (COCO_IMAGES, ("unc",)),
    "refcocog": (COCO_IMAGES, ("umd", "google")),
    "refclef": ("images/saiapr_tc-12", ("unc", "berkeley")),
    "grefcoco": (COCO_IMAGES, ("unc",)),
}
REFER_NAME = re.compile(r"[\w+-][\w+. -]{0,99}")  # names a data set or who split it, and becomes part of a path
REFER_LAYOUT = (
    "the REFER layout is <root>/<dataset>/refs(<split_by>).p, <root>/<dataset>/instances.json and "
    "<root>/<images>/<file name>"
)


def load_refer(
    root: str | os.PathLike, dataset: str, split_by: str, images: str | os.PathLike | None = None
) -> datasets.DatasetDict:
    """Read one data set in the REFER layout, one row for each referred object.

    Every image file is opened once, and its size compared with the annotations.

    Args:
        root: folder that holds `images/` and one folder for each data set.
        dataset: `refcoco`, `refcoco+`, `refcocog`, `refclef` or `grefcoco`; with `images` any other folder in the root
            that holds `refs(<split_by>).p` and `instances.json`, such as RRSIS-D's `rrsisd`.
        split_by: who split it: `unc`, `umd`, `google` or `berkeley`, or the name in the brackets of its refs file.
        images: folder of the images, if it is not that of a published data set.

    Returns:
        A dataset for each split that the refs file names, in the file's order, with the columns of `FEATURES`.

    Raises:
        FileNotFoundError: a folder, annotation file or image is missing.
        OSError: an image is cut short, or no image at all.
        ValueError: it is not known where the images are, or a file or record is broken.
    """
    return load_records(ReferRecords(root, dataset, split_by, images))


class ReferRecords(Records):
    """Records in the REFER layout, or in gRefCOCO's, whose refs are in a JSON file.

    Args:
        root, dataset, split_by, images: as in `load_refer`.

    Raises:
        FileNotFoundError: a folder or annotation file is missing.
        ValueError: it is not known where the images are, or an annotation file is broken.
    """

    layout = REFER_LAYOUT

    def __init__(
        self, root: str | os.PathLike, dataset: str, split_by: str, images: str | os.PathLike | None = None
    ) -> None:
        files = refer_files(root, dataset, split_by, images)
        for path in (Path(root).absolute(), *files):
            require_exists(path, REFER_LAYOUT, root)
        super().__init__(f"{dataset}/{split_by}", files.refs, files.images, (files.refs, files.instances))
        self.files = files
        self._refs, self.without_phrases = read_refs(files.refs)
        self._instances = read_instances(files.instances)

    def __len__(self) -> int:
        return len(self._refs)

    def read(self, index: int) -> tuple[str, dict]:
        return read_row(self.files, *self._refs[index], self._instances)


class ReferFiles(NamedTuple):
    """The files that a data set consists of."""

    images: Path  # the folder of its images
    refs: Path
    instances: Path


def refer_files(
    root: str | os.PathLike, dataset: str, split_by: str, images: str | os.PathLike | None = None
) -> ReferFiles:
    """Where the files of a data set belong, whether they exist or not.

    Args:
        root, dataset, split_by, images: as in `load_refer`.

    Raises:
        ValueError: a name would lead out of the root, or the data set is unknown and `images` is not given.
    """
    known = dataset in SOURCES and split_by in SOURCES[dataset][1]
    if images is None and not known or not (REFER_NAME.fullmatch(dataset) and REFER_NAME.fullmatch(split_by)):
        names = ", ".join(f"{name} ({' or '.join(splits)})" for name, (_, splits) in SOURCES.items())
        raise ValueError(
            f"There is no data set {short_repr(dataset)} split by {short_repr(split_by)}; known are {names}, and any "
            "other folder in the root, if `images` says where its images are."
        )
    root = Path(root).absolute()
    refs = f"grefs({split_by}).json" if dataset == "grefcoco" else f"refs({split_by}).p"
    images = root / SOURCES[dataset][0] if images is None else Path(images).absolute()
    return ReferFiles(images, root / dataset / refs, root / dataset / "instances.json")


def read_refs(path: Path) -> tuple[list[tuple[int, Any]], int]:
    """Read a refs file, which is a pickle or gRefCOCO's JSON.

    gRefCOCO has objects without phrases, which are skipped here. Its own loaders read phrase by phrase and so never
    meet them, as its authors say (henghuiding/gRefCOCO, issues 3 and 8). In other data sets such an object is a fault,
    and `read_row` refuses it.

    Returns:
        The refs, each with its place in the file; and how many were skipped.

    Raises:
        ValueError: the file holds no list, or more than plain data, or is a link that leads out of the data set.
    """
    require_inside(path, path.parent, path.parent.parent)
    refs = load_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    if not isinstance(refs, list):
        raise ValueError(f"{path} holds a {type(refs).__name__}, not a list of refs.")
    is_grefcoco = path.suffix == ".json"
    kept = [
        (index, ref)
        for index, ref in enumerate(refs)
        if not (is_grefcoco and isinstance(ref, dict) and ref.get("sentences") == [])
    ]
    return kept, len(refs) - len(kept)


def read_instances(path: Path) -> dict[str, dict[int, dict]]:
    """Read `instances.json`.

    Returns:
        Its `images`, `annotations` and `categories`: dictionaries of records by their ids.

    Raises:
        ValueError: it is no COCO annotation file, or a link that leads out of the data set.
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
    """Turn a record's polygons into arrays while the file is read: they take a quarter of the memory of lists.

    What is no polygon stays as it is, and `union_of_parts` refuses it.
    """
    if isinstance(record.get("segmentation"), list):
        try:
            record["segmentation"] = [array("d", polygon) for polygon in record["segmentation"]]
        except (TypeError, OverflowError):
            pass
    return record


def read_row(
    files: ReferFiles, index: int, ref: dict, instances: dict[str, dict[int, dict]], home: Path | None = None
) -> tuple[str, dict]:
    """Read one ref, without looking at its image.

    In gRefCOCO a ref has a list of ann_ids. Several objects become one, whose mask and box are the union of theirs;
    `[-1]` stands for no object. Crowds do not count, as in its loader (henghuiding/ReLA, `grefer.py`, `getMaskByRef`).

    Args:
        files: the data set's files.
        index: place of the ref in its file.
        ref: as `read_refs` gives it.
        instances: as `read_instances` gives them.
        home: folder besides that of the images that links to images may lead into; by default the data set's root.

    Returns:
        The split and the row, as `Records.read` gives them.

    Raises:
        ValueError: the ref is broken, or a record that it names is missing or broken.
    """
    ref_id = ref.get("ref_id") if isinstance(ref, dict) else None
    place = f"ref_id {ref_id}" if is_int64(ref_id) else f"entry {index}"
    with record_errors_begin_with(f"{files.refs}, {place}", "REFER"):
        several = isinstance(ref["ann_id"], list)
        ann_ids = ref["ann_id"] if several else [ref["ann_id"]]
        category_ids = ref["category_id"] if several else [ref["category_id"]]
        no_target = several and ann_ids == [NO_TARGET]
        if no_target:
            ann_ids, category_ids = [], []
        image = _record_with_id(instances["images"], "image_id", ref["image_id"])
        annotations = [
            _record_with_id(instances["annotations"], "ann_id", ann_id) for ann_id in dict.fromkeys(ann_ids)
        ]
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
        categories = {_record_with_id(instances["categories"], "category_id", key)["name"] for key in category_ids}
        masks = [part for annotation in annotations for part in mask_parts(annotation["segmentation"])]
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
            bbox=box_around(boxes) if boxes else None,
        )


def _record_with_id(records: dict[int, dict], name: str, key: int) -> dict:
    """The record of this id; ValueError if there is none."""
    if key not in records:
        raise ValueError(f"{name} {short_repr(key)} is not in instances.json; take both files from the same release.")
    return records[key]
