"""Segments what phrases name in pictures: a mask for each phrase, a picture of them all, and results as JSON.

    python segment.py photo.jpg "left cat" "the remote" --model runs/quickstart
    python segment.py photos "the dog" --model runs/quickstart --output dogs
    python segment.py "photos/2026-*.jpg" "the dog" --model runs/quickstart
    python segment.py https://example.org/photo.jpg "left cat" --model runs/quickstart
    curl -s https://example.org/photo.jpg | python segment.py - "left cat" --model runs/quickstart
    python segment.py photos --phrases phrases.jsonl --model runs/quickstart --batch_size 8

The first argument says which pictures: a file, a folder (with all below it), a pattern in quotes, an address, or - for
a picture on standard input. All that follow are phrases, each about every picture. With --phrases a file says which
phrases belong to which picture, a line of JSON for each: {"image": "a.jpg", "text": "left cat"}, where text may be a
list, and "adapter_name" may choose an adapter for them. Its pictures are looked for among those that the first
argument names, by name or path; without a first argument, their paths begin at the file's own folder.

The output folder gets a folder for each picture, under the picture's name. It holds 1_left-cat.png and so on, masks of
0 and 255 at the picture's size; overlay.jpg, all masks over the picture; and result.json. results.json, beside these
folders, holds the results of all pictures and comes last. Pictures that are finished already are not segmented again,
so the same command goes on after an interruption, and comes to the same files; only the fields "seconds" differ.
"""

import argparse
import hashlib
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets.utils import tqdm
from PIL import Image

from configuration_detris import checked_threshold, one_line, raise_if_out_of_memory, short_repr
from load_detris import DTYPES, load_pipeline, named_adapters
from pipeline_detris import ReferringImageSegmentationPipeline
from segment_inputs import (
    STANDARD_INPUT,
    SUFFIXES,
    Phrase,
    Picture,
    check_phrases,
    decode,
    find_pictures,
    match_phrases,
    read_bytes,
)
from segment_results import (
    OVERLAY,
    RESULT,
    RESULTS,
    assign_folders,
    find_difference,
    format_table,
    locked,
    put_in_place,
    read_result,
    write_json,
    write_picture,
)

PROGRESS_DELAY = 2  # seconds without a progress bar
MAX_LISTED = 20  # pictures that were not segmented
INTERRUPTED = 130  # exit status, as shells have it: 128 and SIGINT's number


class Run:
    """Segments pictures into an output folder.

    Args:
        pipe: the pipeline.
        pictures: what to segment, in this order.
        output: the output folder.
        settings: what results depend on besides picture and phrases, by name; it is kept with them.
        batch_size: how many pictures go through the pipeline together.
    """

    def __init__(
        self,
        pipe: ReferringImageSegmentationPipeline,
        pictures: list[Picture],
        output: Path,
        settings: dict[str, Any],
        batch_size: int = 1,
    ) -> None:
        self.pipe, self.pictures, self.output, self.settings = pipe, pictures, output, settings
        self.batch_size = batch_size
        self.finished: set[str] = set()  # folders of pictures
        self.failed: dict[str, str] = {}  # reasons by source

    def survey(self, overwrite: bool) -> None:
        """Find the pictures that are finished, and refuse to replace the results of other runs unless it is allowed.

        The results of a single picture may always be replaced, because they are soon made again.

        Raises:
            FileExistsError: other results are in the way.
        """
        others = []
        for picture in tqdm(self.pictures, "looking for results", unit="picture", delay=PROGRESS_DELAY, leave=False):
            folder = self.output / picture.folder
            try:
                difference = find_difference(folder, picture, self.settings)
            except FileExistsError:
                raise
            except OSError:  # the picture cannot be read, which is said when its turn comes
                continue
            if difference == "":
                self.finished.add(picture.folder)
            elif difference:
                others.append(f"{folder} holds results of {difference}")
        if others and not overwrite and len(self.pictures) > 1:
            more = f", and so do {len(others) - 1:,} more" if len(others) > 1 else ""
            raise FileExistsError(f"{others[0]}{more}: name another --output, or replace them by --overwrite.")
        results = self.output / RESULTS
        if results.exists() and read_result(results) is None:
            raise FileExistsError(f"{results} is in the way and holds no results: name another --output.")
        results.unlink(missing_ok=True)
        for other in others:
            print(f"{other}, which this run replaces.", file=sys.stderr)

    def segment(self, scratch: Path) -> None:
        """Segment all pictures that are not finished.

        Batches are the same whichever pictures are finished, because another batch can change the last digits.
        """
        pictures = iter(self.pictures)
        with tqdm(total=len(self.pictures), unit="picture", disable=len(self.pictures) == 1) as bar:
            while batch := list(islice(pictures, self.batch_size)):
                if not all(picture.folder in self.finished for picture in batch):
                    self._segment_batch(batch, scratch)
                bar.update(len(batch))

    def _segment_batch(self, batch: list[Picture], scratch: Path) -> None:
        read, images, digests = [], [], []
        for picture in batch:
            try:
                content = picture.content or read_bytes(picture.source)
                images.append(decode(content, picture.source))
                digests.append(hashlib.sha256(content).hexdigest())
                read.append(picture)
            except (OSError, ValueError) as error:
                if picture.folder not in self.finished:
                    self._fail(picture, error)
        started = time.perf_counter()
        found = self._find(read, images)
        seconds = (time.perf_counter() - started) / max(len(read), 1)
        for picture, image, digest, results in zip(read, images, digests, found):
            if results is None or picture.folder in self.finished:
                continue
            record = {
                "image": picture.source,
                "sha256": digest,
                "settings": self.settings,
                "seconds": round(seconds, 3),
            }
            write_picture(scratch / "picture", picture, image, results, record)
            put_in_place(scratch / "picture", self.output / picture.folder)
            self.finished.add(picture.folder)

    def _find(self, pictures: list[Picture], images: list[Image.Image]) -> list[list[dict[str, Any]] | None]:
        """Let the pipeline work on a batch, and if it refuses that, on each of its pictures alone."""
        items = [
            {
                "image": image,
                "text": [phrase.text for phrase in picture.phrases],
                "adapter_name": [phrase.adapter_name for phrase in picture.phrases],
            }
            for picture, image in zip(pictures, images)
        ]
        try:
            return self.pipe(items, threshold=self.settings["threshold"], batch_size=self.batch_size) if items else []
        except (OSError, ValueError) as error:
            raise_if_out_of_memory(error)
            if len(items) == 1:
                self._fail(pictures[0], error)
                return [None]
        return [self._find([picture], [image])[0] for picture, image in zip(pictures, images)]

    def _fail(self, picture: Picture, error: Exception) -> None:
        self.failed[picture.source] = one_line(error)

    def write_results(self, scratch: Path, seconds: float) -> pd.DataFrame:
        """Write `results.json` from the results of all pictures, and return a row for each phrase."""
        pictures, rows = [], []
        for picture in self.pictures:
            if picture.source in self.failed:
                continue
            result = read_result(self.output / picture.folder / RESULT)
            if result is None:
                self.failed[picture.source] = "its results have been removed while others were made: run this again."
                continue
            del result["settings"]
            pictures.append(result | {"image": picture.source, "folder": picture.folder})
            rows += [
                {"picture": picture.folder, "phrase": entry["label"], "score": entry["score"]}
                | (entry["box"] or dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), "-"))
                | {"mask": entry["mask"]}
                for entry in result["results"]
            ]
        failed = [{"image": source, "error": reason} for source, reason in self.failed.items()]
        content = {"settings": self.settings, "seconds": round(seconds, 3), "pictures": pictures, "failed": failed}
        write_json(scratch / RESULTS, content)
        os.replace(scratch / RESULTS, self.output / RESULTS)
        return pd.DataFrame(rows)


def describe_settings(pipe: ReferringImageSegmentationPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """What results depend on besides picture and phrases: the model by its names and its weights, and so on."""
    weights = hashlib.sha256()
    for name, tensor in sorted(pipe.model.state_dict().items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    threshold = pipe.processor.mask_threshold if options.threshold is None else options.threshold
    return {
        "model": os.path.normpath(options.model) if os.path.isdir(options.model) else options.model,
        "revision": getattr(pipe.model.config, "_commit_hash", None),
        "adapters": options.adapter,
        "weights": weights.hexdigest(),
        "threshold": threshold,
    }


# --- the command line -----------------------------------------------------------------------------------------------


def probability(text: str) -> float:
    """A number from 0 to 1, for the command line; raises ArgumentTypeError if it is none."""
    try:
        return checked_threshold(float(text), "it")
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{short_repr(text)} is no probability: give a number from 0 to 1."
        ) from error


def positive(text: str) -> int:
    """A whole number above 0, for the command line; raises ArgumentTypeError if it is none."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{short_repr(text)} is no number of pictures: give 1 or more.")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; ends the process with status 2 if something on it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("picture", nargs="?", help="file, folder, pattern in quotes, address, or - for standard input")
    parser.add_argument("phrase", nargs="*", help="what to segment, each phrase in quotes")
    parser.add_argument("--model", required=True, help="folder or Hub id of a model, or of adapters")
    parser.add_argument("--phrases", metavar="FILE", help="JSON lines that say which phrases belong to which picture")
    parser.add_argument("--output", default="out", help="folder for the results; by default %(default)s")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="adapters to use instead of the model's own. Given several times, the first are used for all phrases "
        "whose line in --phrases names no other",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the first GPU if there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="precision; by default as the model was saved")
    parser.add_argument(
        "--threshold",
        type=probability,
        help="a mask has the pixels whose probability is above this; by default the model's",
    )
    parser.add_argument("--batch_size", type=positive, default=1, help="pictures at a time; by default %(default)s")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--vision_backbone", help="folder or Hub id, if it lies elsewhere than adapters say")
    parser.add_argument("--text_backbone", help="folder or Hub id, if it lies elsewhere than adapters say")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace results of another model, other phrases or another "
        "picture, which happens anyway if there is one picture alone",
    )
    options = parser.parse_intermixed_args(arguments)
    expanded = [text for text in options.phrase if text.lower().endswith(SUFFIXES) and os.path.exists(text)]
    if expanded:
        parser.error(
            f"{expanded[0]} is a picture, not a phrase. Only the first argument names pictures: put a pattern in "
            "quotes, so that the shell leaves it alone, or name a folder."
        )
    if options.phrases is None and not (options.picture and options.phrase):
        parser.error('name a picture and at least one phrase, as in: segment.py photo.jpg "left cat" --model …')
    if options.phrases is not None and options.phrase:
        parser.error(f"give phrases or --phrases, not both; the first phrase is {short_repr(options.phrase[0])}.")
    try:
        check_phrases(options.phrase or ["-"])
        options.adapter = named_adapters(options.adapter)
    except ValueError as error:
        parser.error(one_line(error))
    if len(options.adapter) > 1 and options.phrases is None:
        parser.error("several adapters need --phrases, whose lines choose among them; give one.")
    return options


def collect_pictures(options: argparse.Namespace) -> list[Picture]:
    """The pictures that the command line means.

    Raises:
        OSError, ValueError: there are none, or a file of phrases is broken.
    """
    found = find_pictures(options.picture, Path(options.output)) if options.picture else {}
    if options.phrases is None:
        phrases, names = dict.fromkeys(found, [Phrase(text) for text in options.phrase]), found
    else:
        folder = (
            options.picture if options.picture and os.path.isdir(options.picture) else os.path.dirname(options.phrases)
        )
        phrases, names = match_phrases(options.phrases, found, folder)
        if found.keys() - phrases.keys():
            print(
                f"{len(found.keys() - phrases.keys()):,} pictures have no phrases and are left out.", file=sys.stderr
            )
    default = next(iter(options.adapter), None)
    pictures = []
    for source, folder in assign_folders(names).items():
        texts = [
            phrase if phrase.adapter_name else phrase._replace(adapter_name=default) for phrase in phrases[source]
        ]
        content = read_bytes(source) if source == STANDARD_INPUT else None
        pictures.append(Picture(source, folder, texts, content))
    return pictures


def run(options: argparse.Namespace) -> int:
    """Segment what the command line asks for, and return the exit status.

    Raises:
        OSError, ValueError: an input is wrong, the model cannot be loaded, or the output cannot be written.
    """
    started, output = time.perf_counter(), Path(options.output)
    pictures = collect_pictures(options)
    with locked(output) as scratch:
        pipe = load_pipeline(
            options.model,
            options.adapter,
            options.device,
            options.dtype,
            options.revision,
            options.vision_backbone,
            options.text_backbone,
        )
        phrases = list(dict.fromkeys(phrase for picture in pictures for phrase in picture.phrases))
        pipe.processor(text=[phrase.text for phrase in phrases])
        pipe.model.check_adapter_names([phrase.adapter_name for phrase in phrases if phrase.adapter_name])
        segmenting = Run(pipe, pictures, output, describe_settings(pipe, options), options.batch_size)
        segmenting.survey(options.overwrite)
        try:
            segmenting.segment(scratch)
        except KeyboardInterrupt:
            done = f"{len(segmenting.finished):,} of {len(pictures):,} pictures are finished"
            print(f"\nInterrupted: {done} in {output}; the same command goes on from there.", file=sys.stderr)
            return INTERRUPTED
        table = segmenting.write_results(scratch, time.perf_counter() - started)
    if len(table):
        print(format_table(table))
        place = output / pictures[0].folder if len(pictures) == 1 else output
        overlays = OVERLAY if len(pictures) == 1 else "overlays"
        print(one_line(f"Masks and {overlays} are in {place}, all results in {output / RESULTS}."))
    for source, reason in islice(segmenting.failed.items(), MAX_LISTED):
        print(f"Not segmented: {reason if source in reason else f'{source}: {reason}'}", file=sys.stderr)
    if len(segmenting.failed) > MAX_LISTED:
        print(f"… and {len(segmenting.failed) - MAX_LISTED:,} more; {RESULTS} lists them.", file=sys.stderr)
    return 1 if segmenting.failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Run as a program: errors are one sentence each. Returns the exit status."""
    options = parse_arguments(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = (
            f"There is not enough memory ({one_line(error)}): give a smaller --batch_size, fewer phrases or --dtype."
        )
    except (OSError, ValueError) as error:
        reason = one_line(error)
    print(f"segment.py: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
