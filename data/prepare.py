"""Read referring data of any layout once, check every record, and keep the rows as Parquet for training.

    python -m data.prepare refer path/to/refer --name refcoco/unc --output prepared/refcoco
    python -m data.prepare folder path/to/mine --output prepared/mine --push_to_hub someone/mine
    python -m data.prepare table hub:someone/table --splits val --output prepared/table

The output folder appears when it is whole. It holds `<split>-*.parquet`, a `README.md` that tells `datasets` and the
Hub the splits, `summary.json`, and `problems.jsonl`, a line for each record that was left out, with the reason. Until
then the work is in `<output>.partial`, and the same command goes on from there after an interruption.
"""

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from datasets.utils import tqdm
from huggingface_hub import DatasetCardData
from huggingface_hub.utils import validate_repo_id
from pycocotools import mask as coco_mask

from configuration_detris import MAX_REASON, one_line, raise_if_out_of_memory

from .check import PUBLISHED
from .records import FEATURES, STORED_FEATURES, Records, require_records, skipped_notice
from .sources import KINDS, open_records
from .tables import parse_columns
from .untrusted import load_json, require_regular_files

RECORDS_PER_CHUNK = 1000  # after an interruption, each process reads at most so many records again
ROWS_PER_FILE, ROWS_PER_FILE_OF_IMAGES = 5000, 1000  # all rows of a file are in memory at once
IMAGES_AT_ONCE = 100  # embedded ones in memory
RESERVED_SPLIT = "all"  # `datasets` calls all splits together so
SUMMARY, PROBLEMS = "summary.json", "problems.jsonl"
# In the folder of work: the file that names the job, the files of what was read, the folder that becomes the output.
JOB_FILE, CHUNK_PREFIX, WHOLE_FOLDER = "job", "chunk-", "whole"

CARD_TEMPLATE = """---
{metadata}
---

# {name}

Prepared by `python -m data.prepare`: one row for each referred object. Read it with `import data.refer` and
`datasets.load_dataset`.

```
{table}
```

{left_out}
"""

_shared_records: Records  # worker processes are forked from one that has set it, and so share the annotations


def prepare(
    records: Records, output: str | os.PathLike, num_proc: int = 2, strict: bool = False, embed_images: bool = False
) -> dict:
    """Write the rows of `records` to the folder `output`.

    Args:
        records: the data set's records, from `open_records`.
        output: folder to make.
        num_proc: how many processes read.
        strict: whether to stop at the first broken record instead of leaving it out.
        embed_images: whether to copy the image files in; otherwise rows hold their paths.

    Returns:
        The content of `summary.json`: the `fingerprint` of all rows, figures of each split, and so on.

    Raises:
        FileExistsError: the output exists.
        ValueError: no record is sound; with `strict`, a record is broken.
        OSError: with `strict`, a file that a record names is missing or unreadable; or a process was killed.
    """
    output = Path(output).absolute()
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists: name a folder that does not, or remove it to prepare it anew.")
    require_records(records)
    work = output.with_name(f"{output.name}.partial")
    _open_work_folder(work, f"{records.fingerprint} in chunks of {RECORDS_PER_CHUNK}\n")
    _read_chunks(records, work, num_proc, strict)
    summary = _assemble(records, work, strict, embed_images)
    (work / WHOLE_FOLDER).rename(output)
    shutil.rmtree(work)
    return summary


def _open_work_folder(work: Path, job: str) -> None:
    """Make the folder of work, or leave it as it is if an interrupted run of the same job began there."""
    path, ours = work / JOB_FILE, (JOB_FILE, CHUNK_PREFIX, WHOLE_FOLDER)
    if work.is_file() or work.exists() and not all(entry.name.startswith(ours) for entry in work.iterdir()):
        raise FileExistsError(f"{work} is in the way and was not made here: move it, or name another output.")
    if work.exists() and not (path.is_file() and path.read_text() == job):
        shutil.rmtree(work)
    try:
        work.mkdir(parents=True, exist_ok=True)
        _write_whole(path, job)
    except OSError as error:
        raise OSError(f"{work} cannot be written ({error}): name another output.") from error


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either whole or does not exist, even if this process is killed."""
    scratch = _scratch_path(path)
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def _scratch_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")  # no two processes write the same file


def _read_chunks(records: Records, work: Path, num_proc: int, strict: bool) -> None:
    """Read all chunks that no earlier run has read, in `num_proc` processes."""
    global _shared_records
    _shared_records = records
    starts = range(0, len(records), RECORDS_PER_CHUNK)
    missing = [start for start in starts if not _chunk_is_read(_chunk_files(work, start)[1], strict)]
    num_proc = max(1, min(num_proc, len(missing), os.cpu_count() or 1))  # all are started at once
    context = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(num_proc, context, _end_with_parent) as pool,
        tqdm(total=len(records), desc=records.name, unit="record") as progress,
    ):
        progress.update(len(records) - sum(min(RECORDS_PER_CHUNK, len(records) - start) for start in missing))
        futures = [pool.submit(_read_chunk, work, start, strict) for start in missing]
        try:
            for start, future in zip(missing, futures):
                try:
                    progress.update(future.result())
                except BrokenProcessPool as error:
                    raise OSError(
                        f"A process that read {records.refs} from entry {start:,} on was ended, likely for want of "
                        "memory: give fewer --num_proc; the same command goes on from here."
                    ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this worker when its parent is killed. It would wait for ever, or write into the files of a later run."""

    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _chunk_is_read(problems_file: Path, strict: bool) -> bool:
    """Whether an earlier run has read a chunk; with `strict`, one with problems does not count."""
    return problems_file.exists() and not (strict and problems_file.stat().st_size)


def _chunk_files(work: Path, start: int) -> tuple[Path, Path]:
    """The files of the chunk whose first record is `start`: its rows, and its problems."""
    return work / f"{CHUNK_PREFIX}{start:09d}.parquet", work / f"{CHUNK_PREFIX}{start:09d}.jsonl"


def _read_chunk(work: Path, start: int, strict: bool) -> int:
    """Read a chunk of records and write their rows, then their problems; the file of problems says that it is done.

    Returns:
        How many records it has read.
    """
    records = _shared_records
    indices = range(start, min(start + RECORDS_PER_CHUNK, len(records)))
    rows, problems = [], []
    for index in indices:
        try:
            split, row = records.read(index)
            if split == RESERVED_SPLIT:
                raise ValueError(f"{records.refs}, ref_id {row['ref_id']}: `datasets` allows no split named {split}.")
            records.check(row)
            path = row["image"]["path"] if isinstance(row["image"], dict) else row["image"]
            rows.append(row | {"image": {"path": path, "bytes": None}, "split": split, "record": index})
        except Exception as error:
            raise_if_out_of_memory(error)
            if not isinstance(error, OSError | ValueError):  # a stranger's file can raise what no reader foresees
                error = ValueError(f"{records.refs}, entry {index}: it cannot be read ({one_line(repr(error))}).")
            if strict:
                raise error
            problems.append({"record": index, "reason": str(error)})
    columns = [*STORED_FEATURES.arrow_schema, pa.field("split", pa.string()), pa.field("record", pa.int64())]
    table = pa.Table.from_pylist(rows, schema=pa.schema(columns))
    rows_file, problems_file = _chunk_files(work, start)
    scratch = _scratch_path(rows_file)
    pq.write_table(table, scratch)
    os.replace(scratch, rows_file)
    _write_whole(problems_file, "".join(json.dumps(problem) + "\n" for problem in problems))
    return len(indices)


def _assemble(records: Records, work: Path, strict: bool, embed_images: bool) -> dict:
    """Make the whole output folder from the chunks; return its summary."""
    table, problems = _merge(records, work, strict)
    whole = work / WHOLE_FOLDER
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    figures, files, digest = {}, [], hashlib.sha256()
    for split in dict.fromkeys(table["split"].to_pylist()):
        rows = table.filter(pa.compute.equal(table["split"], split)).drop_columns(["split"])
        figures[split] = split_figures(rows, records.embedded)
        for path in _write_split(whole, split, rows, embed_images, records):
            files.append(path.name)
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    summary = {
        "name": records.name,
        "fingerprint": digest.hexdigest(),
        "left_out": len(problems),
        "without_phrases": records.without_phrases,
        "splits": figures,
        "files": files,
    }
    (whole / PROBLEMS).write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    (whole / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    (whole / "README.md").write_text(_card(summary), encoding="utf-8")
    return summary


def _merge(records: Records, work: Path, strict: bool) -> tuple[pa.Table, list[dict]]:
    """The rows and the problems of all chunks, in the records' order. Of rows with the same ref_id the first stays."""
    chunks = [_chunk_files(work, start) for start in range(0, len(records), RECORDS_PER_CHUNK)]
    problems = [json.loads(line) for _, path in chunks for line in path.read_text(encoding="utf-8").splitlines()]
    table = pa.concat_tables([pq.read_table(rows) for rows, _ in chunks])
    repeated = pa.array(table.select(records.unique_ref_ids).to_pandas().duplicated(), pa.bool_())
    for row in table.filter(repeated).select(["ref_id", "record"]).to_pylist():
        reason = f"{records.refs}: ref_id {row['ref_id']} stands at an earlier record too; give each its own."
        if strict:
            raise ValueError(reason)
        problems.append({"record": row["record"], "reason": reason})
    problems.sort(key=lambda problem: problem["record"])
    table = table.filter(pa.compute.invert(repeated))
    if not len(table):
        reasons = f", the first because: {problems[0]['reason']}" if problems else ""
        shutil.rmtree(work)  # so that the next run reads the records that were corrected
        raise ValueError(f"{records.name} has no sound record among {len(records)}{reasons}")
    return table, problems


def _write_split(folder: Path, split: str, table: pa.Table, embed_images: bool, records: Records) -> Iterator[Path]:
    """Write the rows of a split, which have the number of their `record`; yield each file when it is written."""
    numbered = datasets.Features(FEATURES | {"record": datasets.Value("int64")})
    stored = datasets.Features(STORED_FEATURES | {"record": datasets.Value("int64")})
    rows = datasets.Dataset(table.cast(stored.arrow_schema), datasets.DatasetInfo(features=numbered))
    embed_images |= records.embedded  # a table has no files that rows could name
    count = -(-len(rows) // (ROWS_PER_FILE_OF_IMAGES if embed_images else ROWS_PER_FILE))
    for part in tqdm(range(count), desc=f"writing {split}", unit="file"):
        path = folder / f"{split}-{part:05d}-of-{count:05d}.parquet"
        shard = rows.shard(count, part, contiguous=True)
        if records.embedded:
            _write_pixels(shard, records, path)
        else:
            shard = shard.remove_columns("record")
            if embed_images:
                shard = shard.with_format("arrow").map(embed_table_storage, batched=True, batch_size=IMAGES_AT_ONCE)
            shard.with_format(None).to_parquet(path)
        yield path


def _write_pixels(rows: datasets.Dataset, records: Records, path: Path) -> None:
    """Write a file of rows with the images that the annotation files hold. They pass through a file, not memory."""

    def embed(batch: pa.Table) -> pa.Table:
        images = [
            {"path": image["path"], "bytes": records.pixels(number)}
            for image, number in zip(batch["image"].to_pylist(), batch["record"].to_pylist())
        ]
        column = batch.column_names.index("image")
        images = pa.array(images, datasets.Image.pa_type)
        return embed_table_storage(batch.set_column(column, batch.schema.field("image"), images))

    with tempfile.TemporaryDirectory(prefix=WHOLE_FOLDER, dir=path.parent.parent) as scratch:
        rows.with_format("arrow").map(
            embed,
            batched=True,
            batch_size=IMAGES_AT_ONCE,
            writer_batch_size=IMAGES_AT_ONCE,
            cache_file_name=os.path.join(scratch, "rows.arrow"),
            new_fingerprint=path.stem,  # else `datasets` would hash the tables
        ).with_format(None).remove_columns("record").to_parquet(path, batch_size=IMAGES_AT_ONCE)


def _card(summary: dict) -> str:
    """The README.md of a prepared folder."""
    files = [{"split": split, "path": f"{split}-*.parquet"} for split in summary["splits"]]
    # `datasets` caches by the folder's name and this configuration, so that another set prepared under the same name
    # would be read as the old one if the fingerprint did not stand here.
    configuration = {"config_name": "default", "description": summary["fingerprint"], "data_files": files}
    metadata = DatasetCardData(configs=[configuration], task_categories=["image-segmentation"])
    return CARD_TEMPLATE.format(
        metadata=metadata.to_yaml(),
        name=summary["name"],
        table=format_summary(summary),
        left_out=f"{_left_out(summary)}; `{PROBLEMS}` says which and why."
        + (f" {skipped_notice(summary['without_phrases'])}" if summary["without_phrases"] else ""),
    )


def _left_out(summary: dict) -> str:
    return "1 record left out" if summary["left_out"] == 1 else f"{summary['left_out']} records left out"


def require_whole(folder: str | os.PathLike) -> None:
    """Refuse a prepared folder from which files are missing: `datasets` would read the others without a word.

    Raises:
        FileNotFoundError: a file is missing; the message names the first.
        ValueError: its `summary.json` cannot be read, or there is a pipe or device in the folder.
    """
    require_regular_files(folder)
    try:
        files = load_json(Path(folder, SUMMARY))["files"]
        missing = [name for name in files if not Path(folder, name).exists()]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{Path(folder, SUMMARY)} does not say which files belong to it: prepare it anew.") from error
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of its {len(files)} files, such as {missing[0]}: copy them there, or "
            "prepare the data set anew."
        )


def split_figures(rows: pa.Table, embedded: bool = False) -> dict[str, float]:
    """Figures of a split: numbers of objects, phrases, images and empty masks, words of a phrase, and the masks' mean
    share of their images. Images are told apart by their files, or, if they are embedded, by their image_id."""
    words = [len(sentence.split()) for sentences in rows["sentences"].to_pylist() for sentence in sentences]
    rles = rows["mask"].to_pylist()
    images = pa.compute.struct_field(rows["image"], "path").to_pylist()
    areas = [coco_mask.area(rle) / (rle["size"][0] * rle["size"][1]) for rle in rles]
    return {
        "objects": len(rles),
        "phrases": len(words),
        "images": len(set(rows["image_id"].to_pylist() if embedded else images)),
        "words_mean": sum(words) / len(words),
        "words_max": max(words),
        "mask_area_mean": float(sum(areas) / len(areas)),
        "empty_masks": int(sum(area == 0 for area in areas)),
    }


def format_summary(summary: dict) -> str:
    """A table with a line for each split; published counts stand beside ours where they differ."""
    published = PUBLISHED.get(summary["name"], {})
    lines = {}
    for split in dict.fromkeys([*summary["splits"], *published]):
        known = published[split]._asdict() if split in published else {}
        figures = summary["splits"].get(split, dict.fromkeys(known, 0))
        lines[split] = {
            name: f"{figure} (published: {known[name]})" if known.get(name, figure) != figure else figure
            for name, figure in figures.items()
        }
    return pd.DataFrame.from_dict(lines, orient="index").to_string(float_format="{:.3f}".format, na_rep="")


def main(arguments: list[str] | None = None) -> None:
    """Prepare the data set that the command line names, and print its summary."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS, help="the layout, as docs/data.md describes it")
    parser.add_argument("path", help="folder that holds the data set, or for tables also a Parquet file or a Hub id")
    parser.add_argument("--name", default="", help="which one of several in that folder, such as refcoco/unc")
    parser.add_argument("--images", help="folder of the image files, if it is not where the layout has it")
    parser.add_argument("--splits", nargs="+", help="of a table with pixels, only these; others are not downloaded")
    parser.add_argument(
        "--columns", nargs="+", metavar="KEY=COLUMN", help="of a table with pixels: image=… mask=… text=… and so on"
    )
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="processes that read")
    parser.add_argument("--strict", action="store_true", help="stop at the first broken record")
    parser.add_argument(
        "--embed_images",
        action="store_true",
        help="copy the images in, to move the set elsewhere; tables with pixels always are",
    )
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the rows, images included, to this data set")
    options = parser.parse_args(arguments)
    if options.num_proc < 1:
        parser.error(f"--num_proc is {options.num_proc}: give 1 or more.")
    try:
        validate_repo_id(options.push_to_hub)
    except ValueError:
        sys.exit(f"{parser.prog}: --push_to_hub is {options.push_to_hub!r}, no name on the Hub: write <owner>/<name>.")
    try:
        columns = None if options.columns is None else parse_columns(options.columns)
        records = open_records(options.kind, options.path, options.name, options.images, columns, options.splits)
        summary = prepare(records, options.output, options.num_proc, options.strict, options.embed_images)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted; the same command goes on from here.")
    print(format_summary(summary))
    if summary["without_phrases"]:
        print(skipped_notice(summary["without_phrases"]))
    print(f"{_left_out(summary)} (see {Path(options.output) / PROBLEMS}); {summary['fingerprint']}")
    if summary["left_out"]:
        with open(Path(options.output) / PROBLEMS, encoding="utf-8") as file:
            print(f"The first: {json.loads(next(file))['reason']}")
    if options.push_to_hub:
        _push(options.output, options.push_to_hub)


def _push(output: str, repository: str) -> None:
    """Upload a prepared folder. It stays whole if that fails, and the message says how to upload it later."""
    try:
        datasets.load_dataset(output).push_to_hub(repository)
    except Exception as error:  # not all errors of the Hub's client are OSErrors
        raise_if_out_of_memory(error)
        sys.exit(
            f"python -m data.prepare: {output} is prepared, but could not be uploaded to {repository} "
            f"({one_line(error, MAX_REASON)}). To upload it later: python -c 'import data.refer, datasets; "
            f'datasets.load_dataset("{output}").push_to_hub("{repository}")\''
        )


if __name__ == "__main__":
    main()
