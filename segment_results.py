"""What segment.py leaves behind: a folder for each picture, one file of all results, and a table for the terminal."""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import filelock
import numpy as np
import pandas as pd
from PIL import Image

from configuration_detris import one_line, read_regular
from data.masks import RleMask
from gallery import draw_masks
from segment_inputs import MAX_FOLDER_NAME, Phrase, Picture, is_address, read_bytes

RESULT, RESULTS, OVERLAY, LOCK, UNFINISHED = "result.json", "results.json", "overlay.jpg", ".lock", ".unfinished"
OWN_FILES = re.compile(r"\d+(_[a-z0-9-]+)?\.png|overlay\.jpg|result\.json")  # of a picture's folder
MAX_SLUG = 40  # characters of a phrase in a file's name
MAX_TABLE_ROWS, MAX_TABLE_TEXT = 20, 50
JPEG_QUALITY = 92


def assign_folders(names: dict[str, str]) -> dict[str, str]:
    """Give each source a folder of its own: named like the picture, and a hash behind it if that is not enough.

    It is not if another picture has this name or lies below it; upper and lower case are the same on some disks.
    """
    paths = {source: [part for part in Path(name).parts if part != os.sep] for source, name in names.items()}
    keys = {source: PurePosixPath("/".join(path).casefold()) for source, path in paths.items()}
    users = Counter(folder for key in keys.values() for folder in (key, *key.parents))
    folders = {}
    for source, path in paths.items():
        if users[keys[source]] > 1 or path[0].startswith(".") or path == [RESULTS]:
            digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:10]
            path = [part.lstrip(".") or "_" for part in path]
            path[-1] = f"{path[-1][:MAX_FOLDER_NAME]}-{digest}"
        folders[source] = "/".join(path)
    return folders


@contextmanager
def locked(output: Path) -> Iterator[Path]:
    """Hold the output folder for this run, and yield a folder in it where things are written until they are whole.

    Raises:
        OSError: it cannot be written.
        ValueError: another run is at work there.
    """
    scratch, existed = output / UNFINISHED, output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(output / LOCK)
        lock.acquire(blocking=False)
        try:
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            scratch.mkdir()
        except BaseException:
            lock.release()
            raise
    except filelock.Timeout:
        raise ValueError(
            f"Another run is at work in {output}: wait until it has ended, or name another --output."
        ) from None
    except OSError as error:
        raise OSError(
            f"The output folder {output} cannot be written ({one_line(error)}): name another --output."
        ) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not existed and [path.name for path in output.iterdir()] == [LOCK]:  # nothing has come of it
            shutil.rmtree(output, ignore_errors=True)
        lock.release()


def read_result(path: Path) -> dict[str, Any] | None:
    """What an earlier run has left in a file of results; None if there is no whole one."""
    try:
        result = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) and isinstance(result.get("settings"), dict) else None


def find_difference(folder: Path, picture: Picture, settings: dict[str, Any]) -> str | None:
    """Say in what the results in a picture's folder differ from those that this run would come to.

    Returns:
        Empty if they do not differ; None if there are no whole ones.

    Raises:
        FileExistsError: the folder holds something else, which must not be overwritten.
    """
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir() or not all(OWN_FILES.fullmatch(path.name) for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is in the way and holds no results of pictures: name another --output.")
    result = read_result(folder / RESULT)
    if result is None:
        return None
    for name, value in settings.items():
        if result["settings"].get(name) != value:
            return f"other {name}" if name.endswith("s") else f"another {name}"
    try:
        phrases = [Phrase(entry["label"], entry["adapter_name"]) for entry in result["results"]]
        files = [OVERLAY, *(entry["mask"] for entry in result["results"])]
        digest = result["sha256"]
    except (LookupError, TypeError):
        return None
    if phrases != picture.phrases:
        return "other phrases"
    # What an address leads to is not fetched again to look whether it has changed.
    if (
        not is_address(picture.source)
        and digest != hashlib.sha256(picture.content or read_bytes(picture.source)).hexdigest()
    ):
        return "another picture of this name"
    return "" if all((folder / file).is_file() for file in files) else None


def write_picture(
    folder: Path, picture: Picture, image: Image.Image, found: list[dict[str, Any]], record: dict[str, Any]
) -> None:
    """Write masks, overlay and result of a picture into a new folder.

    Args:
        found: what the pipeline has found, a dict for each phrase.
        record: what else the result is to hold.
    """
    folder.mkdir(parents=True)
    digits, results = len(str(len(found))), []
    for number, (phrase, entry) in enumerate(zip(picture.phrases, found, strict=True), 1):
        slug = re.sub(r"[^a-z0-9]+", "-", phrase.text.lower())[:MAX_SLUG].strip("-")
        name = f"{number:0{digits}}{slug and '_'}{slug}.png"
        entry["mask"].save(folder / name)
        results.append(
            {
                "label": phrase.text,
                "adapter_name": phrase.adapter_name,
                "score": round(entry["score"], 6),
                "box": entry["box"],
                "mask": name,
                "rle": RleMask().encode_example(np.asarray(entry["mask"])),
            }
        )
    overlay = draw_masks(image, *zip(*[(e["mask"], e["label"]) for e in found]), scores=[e["score"] for e in found])
    overlay.save(folder / OVERLAY, quality=JPEG_QUALITY)
    record = record | {"width": image.width, "height": image.height, "overlay": OVERLAY, "results": results}
    write_json(folder / RESULT, record)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of results."""
    path.write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace"
    )


def put_in_place(new: Path, place: Path) -> None:
    """Move a whole folder to its place, in which an older one may be. At no time is there a mixture of both."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.rename(new.with_name("replaced"))
    new.rename(place)
    shutil.rmtree(new.with_name("replaced"), ignore_errors=True)


def format_table(rows: pd.DataFrame) -> str:
    """A table for the terminal: at most `MAX_TABLE_ROWS` rows, long phrases cut, no control characters."""
    shown = rows.head(MAX_TABLE_ROWS).copy()
    for column in ("picture", "phrase", "mask"):
        shown[column] = [one_line(text, MAX_TABLE_TEXT) for text in shown[column]]
    if rows["picture"].nunique() == 1:
        del shown["picture"]
    table = shown.to_string(index=False, float_format="{:.3f}".format)
    return table + (f"\n… and {len(rows) - len(shown):,} more" if len(rows) > len(shown) else "")
