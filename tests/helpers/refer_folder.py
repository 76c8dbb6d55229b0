"""A small data set in the REFER layout, and what hostile files and rows look like."""

import json
import pickle
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask

from data.records import FEATURES
from data.refer import load_refer

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT.parent / "shared" / "refer_mini"
HEIGHT, WIDTH = 30, 40
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)  # how a telephone's photograph begins

HOSTILE_RLES = [  # in rows of strangers; each crashes pycocotools or makes it read or write behind its memory
    ({"size": [10, 10], "counts": "~~~~~"}, "not COCO's compressed counts"),
    ({"size": [10, 10], "counts": "1" * 1000}, "runs are more than 10 x 10 pixels"),
    ({"size": [10, 10], "counts": "1"}, "runs are fewer than 10 x 10 pixels"),
    ({"size": [0, 0], "counts": "00"}, r"the mask's size is \[0, 0\]"),
    ({"size": [-10, -10], "counts": "T3"}, r"the mask's size is \[-10, -10\]"),
    ({"size": [2**31 - 1, 2**31 - 1], "counts": "T3"}, r"the mask's size is \[2147483647, 2147483647\]"),
    ({"size": [100], "counts": "T3"}, r"the mask's size is \[100\]"),
    ({"size": [10, 10], "counts": ""}, "not COCO's compressed counts"),
]


def rectangle(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def pixels(*rectangles):
    """COCO fills a rectangle with whole corners from its left top pixel up to, not including, right and bottom."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for left, top, right, bottom in rectangles:
        mask[top:bottom, left:right] = 1
    return mask


def runs(mask):
    """Run lengths down the columns, zeros first, counted one pixel after another."""
    counts, value = [0], 0
    for pixel in mask.T.ravel():
        if pixel != value:
            counts, value = [*counts, 0], pixel
        counts[-1] += 1
    return counts


def rle(mask, compressed=False):
    if compressed:
        return {"size": [HEIGHT, WIDTH], "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}
    return {"size": [HEIGHT, WIDTH], "counts": runs(mask)}


A, B, EDGE = (3, 4, 20, 15), (15, 10, 33, 25), (30, 0, WIDTH, HEIGHT)
MASKS = {  # ann_id -> segmentation, the pixels it stands for
    10: ([rectangle(*A)], pixels(A)),
    11: ([rectangle(*A), rectangle(*B)], pixels(A, B)),
    12: (rle(pixels(B)), pixels(B)),
    13: (rle(pixels(A, EDGE), compressed=True), pixels(A, EDGE)),
    14: ([rle(pixels(A), compressed=True), rle(pixels(EDGE))], pixels(A, EDGE)),
    15: ([rectangle(25, 20, WIDTH + 9, HEIGHT + 9)], pixels((25, 20, WIDTH, HEIGHT))),
    16: (rle(pixels()), pixels()),
}
SPLITS = ["train", "train", "val", "testA", "train", "testB", "train"]


class ReferFolder:
    def __init__(self, root):
        self.root, self.images = root, root / "images" / "train2014"
        self.images.mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise[0]).save(self.images / "first.jpg")
        PIL.Image.fromarray(noise[1]).save(self.images / "second.png")
        self.instances = {
            "images": [
                {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH}
                for number, name in ((1, "first.jpg"), (2, "second.png"))
            ],
            "annotations": [
                {"id": ann_id, "image_id": 1 + ann_id % 2, "segmentation": segmentation, "bbox": [1.25, 2, 3, ann_id]}
                for ann_id, (segmentation, _) in MASKS.items()
            ],
            "categories": [{"id": 17, "name": "cat"}, {"id": 75, "name": "remote"}],
        }
        self.refs = [
            {
                "ref_id": 100 + ann_id,
                "ann_id": ann_id,
                "image_id": 1 + ann_id % 2,
                "category_id": 17 if ann_id % 2 else 75,
                "split": split,
                "file_name": "not_the_image.jpg",
                "sent_ids": [0, 1],
                "sentences": [{"sent": f" cat {ann_id} ", "raw": "CAT"}, {"sent": "l'été, left", "raw": ""}],
            }
            for ann_id, split in zip(MASKS, SPLITS, strict=True)
        ]

    def load(self, dataset="refcoco", split_by="unc", protocol=2):
        self.write(dataset, split_by, protocol)
        return load_refer(self.root, dataset, split_by)

    def write(self, dataset="refcoco", split_by="unc", protocol=2):
        folder = self.root / dataset
        folder.mkdir(exist_ok=True)
        (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(self.refs, protocol))
        (folder / "instances.json").write_text(json.dumps(self.instances))


def by_annotation(loaded):
    return {row["ann_id"]: row for rows in loaded.values() for row in rows}


def same_rows(ours, theirs):
    assert ours.features == theirs.features and len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in FEATURES:
            np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]), err_msg=name)


def truncate(path, kept):
    """Leave so many bytes of a file, or, if negative, leave out so many."""
    path.write_bytes(path.read_bytes()[:kept])


@contextmanager
def not_waiting(seconds=10):
    """Whoever opens a pipe that nobody writes to waits for ever: here for some seconds."""

    def stop(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
