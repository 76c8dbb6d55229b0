"""What a run predicts, as files: a line for each phrase, its mask, and a picture of the mask."""

import json
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import datasets
import evaluate
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from data.decoding import read_whole_mask
from gallery import Sample, draw_sample

from .evaluating_trainer import SegmentedObject

RESULTS = "results.jsonl"  # is written last: without it a folder of predictions is not whole
THREADS = min(16, os.cpu_count() or 1)  # a picture takes some 25 ms of one
IN_WORK = 2 * THREADS  # objects at most, which bounds memory


def make_anew(folder: Path) -> None:
    """Make a folder for predictions, so that nothing of an earlier run is left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


class PictureWriter:
    """Within `with`, writes masks (PNG, 0 and 255) and pictures of them in threads, while the model goes on.

    At its end all of them are written, unless an error ends it.

    Args:
        folder: gets the folders `masks` and `overlays`.
        rows: the objects that are segmented.
        metric: turns counts into IoU.
        shows_progress: whether to show a bar.

    Raises:
        OSError, ValueError: a file cannot be written, or a row not be read; from `add` or at the end.
    """

    def __init__(self, folder: Path, rows: datasets.Dataset, metric: evaluate.Metric, shows_progress: bool):
        self.folder, self.rows, self.metric = folder, rows, metric
        self.shows_progress = shows_progress

    def __enter__(self) -> "PictureWriter":
        for name in ("masks", "overlays"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.tasks: deque[Future] = deque()
        self.pool = ThreadPoolExecutor(THREADS)
        self.bar = tqdm(desc="Masks and pictures", unit=" objects", disable=not self.shows_progress)
        return self

    def __exit__(self, error_type, *_) -> None:
        try:
            while self.tasks and error_type is None:
                self._await_oldest()
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.bar.close()

    def add(self, index: int, segmented: SegmentedObject) -> None:
        """Write the masks and pictures of the row at `index` soon; wait if too many objects are in work."""
        while len(self.tasks) >= IN_WORK:
            self._await_oldest()
        self.tasks.append(self.pool.submit(self._write, index, segmented))

    def _await_oldest(self) -> None:
        self.tasks.popleft().result()
        self.bar.update()

    def _write(self, index: int, segmented: SegmentedObject) -> None:
        row = self.rows[index]
        image, truth = datasets.Image().decode_example(row["image"]), read_whole_mask(row)
        ious = self.metric.iou(*segmented.counts.T[:2])
        for phrase, (sentence, iou) in enumerate(zip(row["sentences"], ious.tolist(), strict=True)):
            mask = segmented.mask(phrase)
            Image.fromarray(mask * 255).save(self.folder / mask_path(row["ref_id"], phrase))
            picture = draw_sample(Sample(image, sentence, truth, mask, iou))
            picture.save(self.folder / "overlays" / f"{row['ref_id']}_{phrase}.jpg")


def mask_path(ref_id: int, phrase: int) -> str:
    """Where a phrase's mask lies in the folder of predictions."""
    return f"masks/{ref_id}_{phrase}.png"


def write_results(
    folder: Path, rows: datasets.Dataset, counts: np.ndarray, metric: evaluate.Metric, with_masks: bool
) -> None:
    """Write a line of `results.jsonl` for each phrase.

    Args:
        folder: exists.
        rows: the `R` objects that were segmented.
        counts (`(R, K, 3)`): pixels in intersection, in union and in the truth.
        metric: turns counts into IoU.
        with_masks: whether the lines name the files of masks.
    """
    unfinished = folder / f"unfinished-{RESULTS}"
    with open(unfinished, "w", encoding="utf-8") as file:
        for row, row_counts in zip(rows.remove_columns(["image", "mask"]), counts.tolist(), strict=True):
            for phrase, sentence in enumerate(row["sentences"]):
                intersection, union, reference_area = row_counts[phrase]
                result = {
                    "ref_id": row["ref_id"],
                    "image_id": row["image_id"],
                    "sentence": sentence,
                    "iou": float(metric.iou(intersection, union)),
                    "intersection": intersection,
                    "union": union,
                    "reference_area": reference_area,
                }
                if with_masks:
                    result["mask"] = mask_path(row["ref_id"], phrase)
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
    unfinished.replace(folder / RESULTS)
