"""RefCOCO and its relatives in the layout of the official reader, REFER (lichengunc/refer), and in what others made of
it: gRefCOCO and Ref-ZOM, whose phrases may name several objects or none, and R-RefCOCO, some of whose name nothing.

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
MERGED_COCO_IMAGES = "images/trainval2014"  # train2014 and val2014 in one folder
SOURCES = {  # the published data sets: their folder of images under the root, and who split them
    "refcoco": (COCO_IMAGES, ("unc", "google")),
    "refcoco+": (COCO_IMAGES, ("unc",)),
    "refcocog": (COCO_IMAGES, ("umd", "google")),
    "refclef": ("images/saiapr_tc-12", ("unc", "berkeley")),
    "grefcoco": (COCO_IMAGES, ("unc",)),
    "ref-zom": (MERGED_COCO_IMAGES, ("final",)),
    "refzom": (MERGED_COCO_IMAGES, ("final",)),
    "rrefcoco": (COCO_IMAGES, ("unc",)),
    "rrefcoco+": (COCO_IMAGES, ("unc",)),
    "rrefcocog": (COCO_IMAGES, ("unc", "umd", "google")),
    "rrsisd": ("images/rrsisd/JPEGImages", ("unc",)),
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

    Where a ref also has phrases that name nothing, as in R-RefCOCO, these are a second row.

    Every image file is opened once, and its size compared with the annotations.

    Args:
        root: folder that holds `images/` and one folder for each data set.
        dataset: one of `SOURCES`, such as `refcoco`; with `images` any other folder in the root that holds
            `refs(<split_by>).p`, or the same as JSON, and `instances.json`.
        split_by: who split it, which is the name in the brackets of its refs file, such as `unc`.
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
    """Records in the REFER layout: refs of a pickle or a JSON file, each of one object, several or none.

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
        return read_row(self.files, self._refs[index], self._instances)


class ReferFiles(NamedTuple):
    """The files that a data set consists of."""

    images: Path  # the folder of its images
    refs: Path
    instances: Path


class Ref(NamedTuple):
    """What one row is read from: a ref, or those of its phrases that name nothing."""

    index: int  # its place in the refs file
    record: Any  # the ref; that of a sound file is a dictionary
    exist: bool = True  # whether the phrases that name its objects are meant, or those that name nothing


def refer_files(
    root: str | os.PathLike, dataset: str, split_by: str, images: str | os.PathLike | None = None
) -> ReferFiles:
    """Where the files of a data set belong, whether they exist or not.

    Refs are a pickle, or the same as JSON where there is none; gRefCOCO's are never a pickle.

    Args:
        root, dataset, split_by, images: as in `load_refer`.

    Raises:
        ValueError: a name would lead out of the root, or the data set is unknown and `images` is not given.
    """
    if dataset in SOURCES and not split_by:
        named = " or ".join(f"{dataset}/{way}" for way in SOURCES[dataset][1])
        raise ValueError(f"{short_repr(dataset)} does not say who split the data set: write {named}.")
    known = dataset in SOURCES and split_by in SOURCES[dataset][1]
    if images is None and not known or not (REFER_NAME.fullmatch(dataset) and REFER_NAME.fullmatch(split_by)):
        names = ", ".join(f"{name} ({' or '.join(splits)})" for name, (_, splits) in SOURCES.items())
        raise ValueError(
            f"There is no data set {short_repr(dataset)} split by {short_repr(split_by)}; known are {names}, and any "
            "other folder in the root, if `images` says where its images are."
        )
    root = Path(root).absolute()
    names = [f"refs({split_by}).p", f"refs({split_by}).json", f"grefs({split_by}).json"]
    names = names[2:] if dataset == "grefcoco" else names
    refs = next((name for name in names if (root / dataset / name).exists()), names[0])
    images = root / SOURCES[dataset][0] if images is None else Path(images).absolute()
    return ReferFiles(images, root / dataset / refs, root / dataset / "instances.json")


def read_refs(path: Path) -> tuple[list[Ref], int]:
    """Read a refs file, which is a pickle or JSON.

    A ref of R-RefCOCO has phrases that name its object and others that name nothing, which is what `exist` says. They
    become two records, that of the object first.

    gRefCOCO has objects without phrases, which are skipped here. Its own loaders read phrase by phrase and so never
    meet them, as its authors say (henghuiding/gRefCOCO, issues 3 and 8). In other data sets such an object is a fault,
    and `read_row` refuses it.

    Returns:
        What each row is read from, in the file's order; and how many refs were skipped.

    Raises:
        ValueError: the file holds no list, or more than plain data, or is a link that leads out of the data set.
    """
    require_inside(path, path.parent, path.parent.parent)
    refs = load_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    if not isinstance(refs, list):
        raise ValueError(f"{path} holds a {type(refs).__name__}, not a list of refs.")
    is_grefcoco = path.name.startswith("grefs(")
    kept, skipped = [], 0
    for index, ref in enumerate(refs):
        sentences = ref.get("sentences") if isinstance(ref, dict) else None
        if is_grefcoco and sentences == []:
            skipped += 1
        elif isinstance(sentences, list) and any(map(_names_nothing, sentences)):
            parts = {not _names_nothing(sentence) for sentence in sentences}
            kept += [Ref(index, ref, exist) for exist in sorted(parts, reverse=True)]
        else:
            kept.append(Ref(index, ref))
    return kept, skipped


def _names_nothing(sentence: Any) -> bool:
    """Whether R-RefCOCO says of a phrase that it names nothing."""
    return isinstance(sentence, dict) and sentence.get("exist", True) == 0


def read_instances(path: Path) -> dict[str, dict[int, dict]]:
    """Read `instances.json`.

    Returns:
        Its `images`, `annotations` and `categories`: dictionaries of records by their ids. The last is empty if the
        file has none.

    Raises:
        ValueError: it is no COCO annotation file, or a link that leads out of the data set.
    """
    require_inside(path, path.parent, path.parent.parent)
    try:
        instances = load_json(path, object_hook=_pack_polygons)
        records = {key: instances[key] for key in ("images", "annotations")}
        records["categories"] = instances.get("categories") or []
        return {key: {record["id"]: record for record in records[key]} for key in records}
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
    files: ReferFiles, ref: Ref, instances: dict[str, dict[int, dict]], home: Path | None = None
) -> tuple[str, dict]:
    """Read one row, without looking at its image.

    In gRefCOCO and Ref-ZOM a ref has a list of ann_ids. Several objects become one, whose mask and box are the union
    of theirs. No object is `[-1]` in gRefCOCO; in Ref-ZOM the `source` of the ref is then `zero`, whatever its ann_ids
    are. Crowds count in Ref-ZOM but not in gRefCOCO. All this is as in their loaders (henghuiding/ReLA, `grefer.py`,
    `getMaskByRef`; toggle1995/RIS-DMMI, `refer/refer.py`, `getMask`).

    Phrases that do not `exist` (R-RefCOCO) have an empty mask and the ref_id `-1 - ref_id`, which no other ref has
    where all count from 0.

    Args:
        files: the data set's files.
        ref: as `read_refs` gives it.
        instances: as `read_instances` gives them.
        home: folder besides that of the images that links to images may lead into; by default the data set's root.

    Returns:
        The split and the row, as `Records.read` gives them.

    Raises:
        ValueError: the ref is broken, or a record that it names is missing or broken.
    """
    index, record, exist = ref
    ref_id = record.get("ref_id") if isinstance(record, dict) else None
    place = f"ref_id {ref_id}" if is_int64(ref_id) else f"entry {index}"
    with record_errors_begin_with(f"{files.refs}, {place}", "REFER"):
        several = isinstance(record["ann_id"], list)
        no_target = not exist or record.get("source") == "zero" or several and record["ann_id"] == [NO_TARGET]
        image = _record_with_id(instances["images"], "image_id", record["image_id"])
        annotations = [] if no_target else _annotations_of(record, image, instances["annotations"])
        boxes = [
            checked_bbox(annotation["bbox"], annotation["id"]) for annotation in annotations if "bbox" in annotation
        ]
        return make_row(
            split=record["split"],
            image=file_inside(files.images, image["file_name"], home or files.refs.parent.parent),
            size=(image["height"], image["width"]),
            mask=None if no_target else [part for one in annotations for part in mask_parts(one["segmentation"])],
            sentences=_phrases_of(record, exist),
            ref_id=record["ref_id"] if exist or not is_int64(ref_id) else -1 - ref_id,
            ann_id=annotations[0]["id"] if len(annotations) == 1 else NO_TARGET,
            image_id=image["id"],
            category="" if no_target else _category_of(record, instances["categories"]),
            bbox=box_around(boxes) if boxes and len(boxes) == len(annotations) else None,
        )


def _annotations_of(ref: dict, image: dict, annotations: dict[int, dict]) -> list[dict]:
    """The annotations of a ref's objects; ValueError if there are none, or one is missing or of another image."""
    several = isinstance(ref["ann_id"], list)
    ann_ids = ref["ann_id"] if several else [ref["ann_id"]]
    found = [_record_with_id(annotations, "ann_id", ann_id) for ann_id in dict.fromkeys(ann_ids)]
    for annotation in found:
        if annotation["image_id"] != image["id"]:
            raise ValueError(
                f"ann_id {short_repr(annotation['id'])} is of image {short_repr(annotation['image_id'])}, "
                f"not {short_repr(image['id'])}."
            )
    if several and "source" not in ref:  # gRefCOCO
        found = [annotation for annotation in found if not annotation.get("iscrowd")]
    if not found:
        remedy = "source zero" if "source" in ref else f"[{NO_TARGET}]"
        raise ValueError(f"the ann_ids {short_repr(ann_ids)} name no object; for no target give {remedy}.")
    return found


def _phrases_of(ref: dict, exist: bool) -> list:
    """The phrases of a ref that exist, or those that do not; ValueError if it is not said which."""
    phrases = []
    for sentence in ref["sentences"]:
        value = sentence.get("exist", True)
        if type(value) not in (bool, int) or value not in (0, 1):
            raise ValueError(f"exist is {short_repr(value)} at a phrase; give true or false.")
        if value == exist:
            phrases.append(sentence["sent"] if "sent" in sentence else sentence["raw"])
    return phrases


def _category_of(ref: dict, categories: dict[int, dict]) -> str:
    """The name of the category that all objects of a ref share; empty if they do not, or the set has none."""
    if not categories:
        return ""
    several = isinstance(ref["ann_id"], list) and isinstance(ref["category_id"], list)
    keys = ref["category_id"] if several else [ref["category_id"]]
    names = {_record_with_id(categories, "category_id", key)["name"] for key in keys}
    return names.pop() if len(names) == 1 else ""


def _record_with_id(records: dict[int, dict], name: str, key: int) -> dict:
    """The record of this id; ValueError if there is none."""
    if key not in records:
        raise ValueError(f"{name} {short_repr(key)} is not in instances.json; take both files from the same release.")
    return records[key]
