"""Measure how fast a referring set of RefCOCO's size is prepared and loaded, compared with bare decoding and warping.

    python -m benchmarks.data --output scratch
    python -m benchmarks.data --output scratch --stage loader    # one of the measurements again

The first call writes a synthetic set in the REFER layout to `<output>/refer`. Each measurement then runs in a process
of its own. All together need Linux, 500 MB of disk and about seven minutes.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
import psutil
import torch
from datasets.utils import tqdm
from PIL import Image
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data.check import PUBLISHED, Counts
from data.masks import RleMask
from data.streaming import StreamedBatches, StreamedRows, parquet_files
from letterbox_detris import letterbox_maps
from processing_detris import DetrisImageProcessor, DetrisProcessor
from training.collators import TrainingCollator

NAME = "refcoco/unc"
DISTINCT_IMAGES = 300
SIZES = [(480, 640), (480, 640), (480, 640), (640, 480)]  # heights and widths of one image after the other
GRAIN, JPEG_QUALITY = 21, 90  # with this noise a file has about 160 KB
ANNOTATIONS = 196_771  # as many as RefCOCO has for all objects of its images, to most of which no phrase refers
CORNERS = (20, 60)  # fewest and most of a polygon
WORDS = "left right woman man in the red blue shirt chair front back white cat dog bus of table far near top".split()
BATCH_SIZES = (8, 16, 32)
BLOCKS, ROWS_PER_BLOCK = 24, 32  # loader and bare loops take turns with blocks of rows
WORKERS = 2
SETTLED_ROWS = 500  # of each worker; afterwards its memory should no longer grow
POLL_SECONDS = 0.2
MEBIBYTE = 2**20


# --- the set ------------------------------------------------------------------------------------------------------


def write_refer(
    root: Path, seed: int = 0, splits: dict[str, Counts] = PUBLISHED[NAME], annotated: int = ANNOTATIONS
) -> None:
    """Write a set, by default with as many images, objects and phrases as RefCOCO's splits have by its publication.

    Args:
        root: is made, and holds the set once it is whole.
        splits: how many images, objects and phrases each split has.
        annotated: how many objects have polygons; to most of RefCOCO's no phrase refers.
    """
    rng = np.random.default_rng(seed)
    scratch = root.with_name(f"{root.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    folder = scratch / "images" / "train2014"
    folder.mkdir(parents=True)
    (scratch / "refcoco").mkdir()
    distinct = min(DISTINCT_IMAGES, sum(counts.images for counts in splits.values()))
    photographs = [_write_photograph(folder, index, rng) for index in tqdm(range(distinct), desc="photographs")]

    images, annotations, refs = [], [], []
    total = sum(counts.objects for counts in splits.values())
    progress = tqdm(total=total, desc="objects")
    for split, counts in splits.items():
        first = len(images)
        for image_id in range(first, first + counts.images):
            name, (height, width) = f"COCO_train2014_{image_id:012d}.jpg", SIZES[image_id % len(SIZES)]
            os.link(photographs[image_id % distinct], folder / name)
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        sentences = _shares(counts.phrases, counts.objects)
        for number in range(counts.objects):
            image = images[first + number % counts.images]
            refs.append(_ref(len(refs), len(annotations), image, split, sentences[number], rng))
            annotations.append(_annotation(len(annotations), image, rng))
            progress.update()
    progress.close()
    for photograph in photographs:
        photograph.unlink()
    for ann_id in tqdm(range(len(annotations), annotated), desc="other objects"):
        annotations.append(_annotation(ann_id, images[ann_id % len(images)], rng))
    categories = [{"id": index, "name": f"thing {index}", "supercategory": "things"} for index in range(1, 81)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (scratch / "refcoco" / "instances.json").write_text(json.dumps(instances))
    with open(scratch / "refcoco" / "refs(unc).p", "wb") as file:
        pickle.dump(refs, file, protocol=2)
    scratch.rename(root)


def _shares(total: int, parts: int) -> list[int]:
    """Divide a total into whole parts that differ by one at most."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def _write_photograph(folder: Path, index: int, rng: np.random.Generator) -> Path:
    """Write a JPEG of smooth colours and noise, and return its path."""
    height, width = SIZES[index % len(SIZES)]
    coarse = rng.uniform(0, 255, (height // 40, width // 40, 3)).astype(np.float32)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels += rng.normal(0, GRAIN, (height, width, 1)).astype(np.float32)
    path = folder / f"photograph_{index}.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=JPEG_QUALITY)
    return path


def _annotation(ann_id: int, image: dict, rng: np.random.Generator) -> dict:
    """Draw a star-shaped polygon inside the image, in hundredths of pixels as COCO's polygons are."""
    height, width = image["height"], image["width"]
    reach = rng.uniform(0.1, 0.45) * min(height, width)
    centre = rng.uniform((reach, reach), (width - reach, height - reach))
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(*CORNERS)))
    radii = reach * rng.uniform(0.7, 1, len(angles))
    corners = (centre + radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), 1)).round(2)
    low, high = corners.min(0), corners.max(0)
    return {
        "id": ann_id,
        "image_id": image["id"],
        "category_id": ann_id % 80 + 1,
        "segmentation": [corners.ravel().tolist()],
        "area": float(np.prod(high - low) / 2),
        "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
        "iscrowd": 0,
    }


def _ref(ref_id: int, ann_id: int, image: dict, split: str, sentences: int, rng: np.random.Generator) -> dict:
    phrases = [" ".join(rng.choice(WORDS, rng.integers(1, 8))) for _ in range(sentences)]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image["id"],
        "category_id": ann_id % 80 + 1,
        "split": split,
        "file_name": image["file_name"],
        "sentences": [{"sent": phrase, "raw": phrase, "tokens": phrase.split()} for phrase in phrases],
    }


# --- measurements -------------------------------------------------------------------------------------------------


def measure_prepare(output: Path) -> dict[str, str]:
    """Measure time, memory and result of `data.prepare`, whose processes are watched from outside."""
    prepared = output / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    shutil.rmtree(output / "prepared.partial", ignore_errors=True)
    command = [sys.executable, "-m", "data.prepare", "refer", str(output / "refer"), "--name", NAME]
    start, resident, proportional = time.perf_counter(), 0, 0
    process = psutil.Popen([*command, "--output", str(prepared)])
    while process.poll() is None:
        figures = [memory_of(one) for one in (process, *process.children(recursive=True))]
        resident = max(resident, sum(memory.rss for memory in figures if memory))
        proportional = max(proportional, sum(memory.pss for memory in figures if memory))
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"data.prepare failed with status {process.returncode}.")
    size = sum(path.stat().st_size for path in prepared.iterdir())
    return {
        "prepare: time": f"{seconds:.0f} s",
        "prepare: peak of resident memory, summed over its processes": f"{resident / MEBIBYTE:.0f} MiB",
        "prepare: the same with shared pages counted once": f"{proportional / MEBIBYTE:.0f} MiB",
        "prepare: size on disk, images by path": f"{size / MEBIBYTE:.1f} MiB",
    }


def memory_of(process: psutil.Process) -> Any:
    """Return a process's memory in bytes, or None if the process has ended.

    `rss` counts all its pages, `pss` of each shared page only its part, `uss` only pages of its own.
    """
    try:
        return process.memory_full_info()
    except psutil.Error:
        return None


def measure_first_batch(output: Path) -> dict[str, str]:
    """Measure the time until the first training batch: streamed, then with an empty and with a filled cache."""
    figures = {}
    cache = output / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    collator = make_collator()
    for state in ("streamed", "empty cache", "warm cache"):
        start = time.perf_counter()
        if state == "streamed":
            rows = StreamedRows(parquet_files(str(output / "prepared"))["train"])
            batches = StreamedBatches(rows, BATCH_SIZES[-1], 0, 1, WORKERS, seed=0)
            loader = torch.utils.data.DataLoader(batches, None, collate_fn=collator, num_workers=WORKERS)
        else:
            loader = torch.utils.data.DataLoader(
                load_train(output), BATCH_SIZES[-1], shuffle=True, collate_fn=collator, num_workers=WORKERS
            )
        next(iter(loader))
        figures[f"first batch: from the prepared folder, {state}"] = f"{time.perf_counter() - start:.1f} s"
    return figures


def load_train(output: Path) -> datasets.Dataset:
    splits = datasets.load_dataset(str(output / "prepared"), cache_dir=str(output / "cache"))
    rows = splits["train"].cast_column("image", datasets.Image(decode=False))
    return rows.cast_column("mask", RleMask(decode=False))


def make_tokenizer() -> CLIPTokenizer:
    """Make a tokenizer that knows only CLIP's bytes, 514 symbols, because nothing is downloaded."""
    symbols = list(bytes_to_unicode().values())
    symbols += [f"{symbol}</w>" for symbol in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])


def make_collator() -> TrainingCollator:
    return TrainingCollator(DetrisProcessor(DetrisImageProcessor(), make_tokenizer()), seed=0)


def measure_loader(output: Path) -> dict[str, str]:
    """Measure one thread that reads and collates rows, in turn with bare decoding and warping of the same images.

    Bare decoding is once `datasets`' own, which Pillow does, and once OpenCV's, which the loader uses. The processor's
    seconds are counted, because other programs disturb them less than the clock's.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rows, collator = load_train(output).shuffle(seed=0), make_collator()
    image_processor = collator.processor.image_processor
    side, border = image_processor.size["height"], [255 * channel for channel in image_processor.image_mean]
    decoders = {
        "datasets": lambda image: np.asarray(datasets.Image().decode_example(image)),
        "OpenCV": lambda image: cv2.imdecode(np.fromfile(image["path"], np.uint8), cv2.IMREAD_COLOR_RGB),
    }
    seconds = {name: [] for name in (*decoders, *BATCH_SIZES)}
    for block in tqdm(range(BLOCKS + 1), desc="loader and bare loops"):
        indices = range(block * ROWS_PER_BLOCK, (block + 1) * ROWS_PER_BLOCK)
        images = [rows[index]["image"] for index in indices]
        for name, decode in decoders.items():
            start = time.process_time()
            for image in images:
                pixels = decode(image)
                maps = letterbox_maps(*pixels.shape[:2], side)
                cv2.remap(pixels, *maps, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT, borderValue=border)
            seconds[name].append(time.process_time() - start)
        for size in BATCH_SIZES:
            start = time.process_time()
            for first in indices[::size]:
                collator(rows.__getitems__(list(range(first, first + size))))
            seconds[size].append(time.process_time() - start)
    times = {name: np.array(measured[1:]) for name, measured in seconds.items()}  # the first block warms up
    figures = {}
    for name in decoders:
        rate = ROWS_PER_BLOCK / np.median(times[name])
        figures[f"loader: bare, decoded by {name} and warped once, samples a second"] = f"{rate:.0f}"
    for size in BATCH_SIZES:
        figures[f"loader: in turn with it, batches of {size}"] = f"{ROWS_PER_BLOCK / np.median(times[size]):.0f}"
        for name in decoders:
            share = np.median(times[name] / times[size])
            figures[f"loader: as a share of {name}, batches of {size}"] = f"{share:.2f}"
    return figures


def measure_workers(output: Path) -> dict[str, str]:
    """Measure by how much each worker's own pages grow from its first rows to the end of an epoch."""
    rows = load_train(output).shuffle(seed=0)
    loader = torch.utils.data.DataLoader(rows, BATCH_SIZES[-1], collate_fn=make_collator(), num_workers=WORKERS)
    settled = SETTLED_ROWS * WORKERS // BATCH_SIZES[-1]
    others = {process.pid for process in multiprocessing.active_children()}
    start = time.perf_counter()
    for index, _ in enumerate(tqdm(iter(loader), total=len(loader), desc="epoch", unit="batch")):
        if index == settled:
            before = _private_memory(others)
        if index == len(loader) - 3 * WORKERS:  # while both still run
            after = _private_memory(others)
    seconds = time.perf_counter() - start
    growth = [f"{(after[pid] - before[pid]) / MEBIBYTE:.1f}" for pid in before]
    return {
        f"workers: samples a second of {WORKERS}": f"{len(rows) / seconds:.0f}",
        "workers: private memory at first": ", ".join(f"{size / MEBIBYTE:.0f}" for size in before.values()) + " MiB",
        f"workers: its growth over an epoch of {len(rows)} rows": ", ".join(growth) + " MiB",
    }


def _private_memory(others: set[int]) -> dict[int, int]:
    """Return the bytes in pages of its own of each child process, by its id; leave out the `others`."""
    workers = {process.pid for process in multiprocessing.active_children()} - others
    return {pid: memory_of(psutil.Process(pid)).uss for pid in sorted(workers)}


STAGES = {
    "prepare": measure_prepare,
    "first_batch": measure_first_batch,
    "loader": measure_loader,
    "workers": measure_workers,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="scratch folder")
    parser.add_argument("--stage", choices=STAGES, help="run only this measurement, in this process")
    options = parser.parse_args()
    output = options.output.absolute()
    if not (output / "refer").exists():
        write_refer(output / "refer")
    if options.stage:
        for name, figure in STAGES[options.stage](output).items():
            print(f"{name:<66} {figure:>12}", flush=True)
        return
    for stage in STAGES:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.data", "--output", str(output), "--stage", stage], check=True
        )


if __name__ == "__main__":
    main()
