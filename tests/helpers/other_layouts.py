"""A data set in the REFER layout, written out in the other layouts that are read, and rows compared."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask

from data.records import FEATURES
from data.sources import open_records
from untrusted_pickles import load_plain_pickle

from .refer_folder import ReferFolder

# CRIS numbers COCO's categories without gaps: in these ranges of ids it subtracts so much (its `cat_process`).
CRIS_OFFSETS = ((1, 1), (13, 2), (27, 3), (31, 5), (46, 6), (67, 7), (70, 9), (72, 10), (84, 11))
HUB_FILES = {"train": "train", "val": "validation", "test": "test", "testA": "test", "testB": "testB"}


class ReferSet:
    """A data set in the REFER layout to write out in others: a small one, or refer_mini."""

    def __init__(self, folder, name):
        self.name, (dataset, split_by) = name, name.split("/")
        self.refer, self.images = folder, folder / "images" / "train2014"
        self.refs = load_plain_pickle(folder / dataset / f"refs({split_by}).p")
        self.instances = json.loads((folder / dataset / "instances.json").read_text())
        self.of_image = {image["id"]: image for image in self.instances["images"]}
        self.of_ann = {annotation["id"]: annotation for annotation in self.instances["annotations"]}
        self.splits = list(dict.fromkeys(ref["split"] for ref in self.refs))

    def parts(self, ref):
        """The object's polygons and RLEs as arrays (H, W), decoded one by one."""
        image, parts = self.of_image[ref["image_id"]], self.of_ann[ref["ann_id"]]["segmentation"]
        size = image["height"], image["width"]
        decoded = []
        for part in [parts] if isinstance(parts, dict) else parts:
            if isinstance(part, list):
                (part,) = coco_mask.frPyObjects([part], *size)
            elif isinstance(part["counts"], list):
                part = coco_mask.frPyObjects(part, *size)
            decoded.append(coco_mask.decode(part))
        return decoded

    def write_cris(self, root):
        (root / "anns" / "set").mkdir(parents=True)
        (root / "masks" / "set").mkdir(parents=True)
        for split in self.splits:
            records = []
            for ref in (ref for ref in self.refs if ref["split"] == split):
                left, top, width, height = (int(side) for side in self.of_ann[ref["ann_id"]]["bbox"])
                offset = [off for first, off in CRIS_OFFSETS if first <= ref["category_id"]][-1]
                sentences = [
                    {"idx": index, "sent_id": index, "sent": sentence["sent"].strip()}
                    for index, sentence in enumerate(ref["sentences"])
                ]
                records.append(
                    {
                        "bbox": [left, top, left + width, top + height],
                        "cat": ref["category_id"] - offset,
                        "segment_id": ref["ref_id"],
                        "img_name": self.of_image[ref["image_id"]]["file_name"],
                        "sentences": sentences,
                        "sentences_num": len(sentences),
                    }
                )
                parts = np.sum(self.parts(ref), axis=0).astype(np.uint8) * np.uint8(255)  # overlaps wrap around
                PIL.Image.fromarray(parts).save(root / "masks" / "set" / f"{ref['ref_id']}.png")
            (root / "anns" / "set" / f"{split}.json").write_text(json.dumps(records))
        return {"kind": "cris", "path": root, "name": "set", "images": self.images}

    def write_hub_table(self, root):
        (root / "data").mkdir(parents=True)
        for split in self.splits:
            rows = []
            for ref in (ref for ref in self.refs if ref["split"] == split):
                annotation, image = self.of_ann[ref["ann_id"]], self.of_image[ref["image_id"]]
                left, top, width, height = annotation["bbox"]
                sentences = [
                    {"raw": s["raw"], "sent": s["sent"], "sent_id": index, "tokens": s["sent"].split()}
                    for index, s in enumerate(ref["sentences"])
                ]
                rows.append(
                    {key: ref[key] for key in ("file_name", "ann_id", "ref_id", "image_id", "split", "category_id")}
                    | {
                        "sent_ids": [0],
                        "sentences": sentences,
                        "raw_anns": json.dumps(annotation | {"category_id": ref["category_id"], "iscrowd": 0}),
                        "raw_image_info": json.dumps(image | {"license": 3}),
                        "raw_sentences": json.dumps(sentences),
                        "image_path": f"coco/train2014/{image['file_name']}",
                        "bbox": [left, top, left + width, top + height],
                        "captions": [s["sent"] for s in sentences],
                        "global_image_id": f"coco.{image['id']}",
                        "anns_id": f"refcoco.{annotation['id']}",
                    }
                )
            pq.write_table(pa.Table.from_pylist(rows), root / "data" / f"{HUB_FILES[split]}-00000-of-00001.parquet")
        return {"kind": "hub_table", "path": root, "images": self.images}

    def write_folder(self, root, nested=False):
        """Masks by turns as the annotation has them, as RLE, and as a PNG of 1s or of 255s."""
        categories = {category["id"]: category["name"] for category in self.instances["categories"]}
        for index, ref in enumerate(self.refs):
            annotation, image = self.of_ann[ref["ann_id"]], self.of_image[ref["image_id"]]
            folder = root / ref["split"] if nested else root
            (folder / "images").mkdir(parents=True, exist_ok=True)
            shutil.copy(self.images / image["file_name"], folder / "images")
            mask = annotation["segmentation"]
            if index % 4 == 1:
                mask = coco_mask.encode(np.asfortranarray(np.any(self.parts(ref), axis=0).astype(np.uint8)))
                mask["counts"] = mask["counts"].decode()
            elif index % 4:
                mask = f"{ref['ref_id']}.png"
                inside = np.any(self.parts(ref), axis=0) * np.uint8(1 if index % 4 == 2 else 255)
                PIL.Image.fromarray(inside).save(folder / mask)
            line = {
                "file_name": f"images/{image['file_name']}",
                "sentences": [sentence["sent"] for sentence in ref["sentences"]],
                "mask": mask,
                "category": categories[ref["category_id"]],
                "bbox": annotation["bbox"],
            } | {key: ref[key] for key in ("ref_id", "ann_id", "image_id")}
            with open(folder / "metadata.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line | ({} if nested else {"split": ref["split"]})) + "\n")
        return {"kind": "folder", "path": root}


def small_set(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    folder.write()
    return ReferSet(folder.root, "refcoco/unc")


def rows_of(loaded):
    """Rows of each split by ref_id, with images by file name and masks as arrays."""
    plain = loaded.cast_column("image", datasets.Image(decode=False))
    return {
        split: {row["ref_id"]: row | {"image": Path(row["image"]["path"]).name} for row in rows}
        for split, rows in plain.items()
    }


def assert_same_rows(ours, theirs):
    assert all(rows.features == FEATURES for rows in ours.values())
    ours, theirs = rows_of(ours), rows_of(theirs)
    assert list(ours) == list(theirs)
    for split in theirs:
        assert list(ours[split]) == list(theirs[split])
        for ref_id, row in theirs[split].items():
            for column in FEATURES:
                np.testing.assert_array_equal(ours[split][ref_id][column], row[column], err_msg=f"{ref_id}, {column}")


def open_lines(folder, *lines):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "metadata.jsonl").write_bytes(b"\n\n".join(lines))
    return open_records("folder", folder)
