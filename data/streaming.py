"""Training rows that are read from Parquet files when they are needed, not downloaded or converted before."""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from configuration_detris import one_line, raise_if_out_of_memory, require_regular

from .records import FEATURES, require_columns, require_embedded


def parquet_files(name: str) -> dict[str, list[str]]:
    """Find the Parquet files of a data set.

    Args:
        name: a folder made by `data.prepare`, or the id or address of a data set on the Hub.

    Returns:
        Paths or URLs of the files of each split.

    Raises:
        ValueError: its files are not Parquet, or its card is broken or names a file elsewhere.
        OSError: there is no such data set.
    """
    try:
        builder = datasets.load_dataset_builder(name)
    except OSError:
        raise
    except Exception as error:  # a stranger's card can hold anything
        raise_if_out_of_memory(error)
        raise ValueError(
            f"The card of {name} cannot be read ({one_line(error)}): correct its README.md, or prepare the set anew."
        ) from error
    if builder.name != "parquet":
        raise ValueError(f"{name} holds {builder.name} files; only Parquet is read: see data.prepare.")
    home = builder.base_path if builder.repo_id else os.path.abspath(name)
    files = {str(split): list(paths) for split, paths in builder.config.data_files.items()}
    for file in (file for paths in files.values() for file in paths):
        if not (file if builder.repo_id else os.path.abspath(file)).startswith(f"{home}/"):
            raise ValueError(
                f"The card of {name} names the file {file}, which is not in this data set: remove it there."
            )
    return files


def column_names(file: str) -> list[str]:
    """The names of a Parquet file's columns; OSError if it is missing or broken.

    Args:
        file: path or URL.
    """
    with _opened_parquet(file) as parquet:
        return parquet.schema_arrow.names


class RowGroup(NamedTuple):
    """A part of a Parquet file, which is read as a whole."""

    file: str  # path or URL
    index: int  # in the file
    rows: int  # how many


class StreamedRows:
    """Rows of Parquet files. Only the footers of the files are read when it is made; `len` is the number of rows.

    Args:
        files: paths, or URLs that `fsspec` opens, such as `hf://…`.
        shuffle_buffer_size: how many rows each worker keeps in memory, with the images that are embedded in them, and
            draws the next one from.

    Raises:
        ValueError: a file lacks a column, or is no regular file.
        OSError: a file is missing or broken.
    """

    def __init__(self, files: Sequence[str], shuffle_buffer_size: int = 1000) -> None:
        self.shuffle_buffer_size = shuffle_buffer_size
        self.groups = []
        for file in files:
            with _opened_parquet(file) as parquet:
                metadata = parquet.metadata
            require_columns(file, metadata.schema.to_arrow_schema().names)
            self.groups += [
                RowGroup(file, index, metadata.row_group(index).num_rows) for index in range(metadata.num_row_groups)
            ]

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    def read(self, order: Sequence[int], start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Read a range of rows, without decoding images and masks.

        Args:
            order: all row groups by their numbers, in the order in which rows are counted.
            start, stop: the first row, and the row after the last.

        Raises:
            OSError: a file is missing or broken.
            ValueError: rows of the Hub do not hold their images.
        """
        position = 0  # number of the row group's first row
        for group in (self.groups[index] for index in order):
            first, last = max(start - position, 0), min(stop - position, group.rows)
            if first < last:
                with _opened_parquet(group.file) as parquet:
                    rows = parquet.read_row_group(group.index, columns=list(FEATURES)).select(list(FEATURES))
                    rows = rows.cast(FEATURES.arrow_schema)
                if "://" in group.file:
                    require_embedded(group.file, rows["image"])
                yield from rows.slice(first, last - first).to_pylist()
            position += group.rows


@contextmanager
def _opened_parquet(file: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; OSError if it is missing, or broken where it is read inside the `with` block."""
    try:
        require_regular(file)
        with fsspec.open(file) as opened, pq.ParquetFile(opened) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise_if_out_of_memory(error)
        raise OSError(
            f"{file} cannot be read ({one_line(error)}): restore it, or prepare the data set anew."
        ) from error


class StreamedBatches(torch.utils.data.IterableDataset):
    """The batches of one process, as lists of rows. In an epoch each row is in exactly one batch of one process.

    Seed and epoch draw an order of the row groups. Their rows, in that order, are divided into runs of equal length,
    one for each worker of each process. A worker shuffles its run through a buffer and divides it evenly into batches.
    So all processes have the same number of batches, `len`, as training in step needs, and no batch is filled up with
    rows that were seen before. Where the number of rows does not divide into batches of `batch_size`, they are a
    little smaller, or, if `batch_size` is 1, larger. The order of rows depends on the numbers of processes and
    workers.

    Args:
        rows: the rows to read.
        batch_size: how many rows a batch has at most.
        rank: number of this process, from 0.
        world_size: number of processes.
        workers: number of workers of the `DataLoader`, which must be given `batch_size=None`; 1 if it has none.
        seed: draws the order.

    Raises:
        ValueError: there are fewer rows than workers of all processes.
    """

    def __init__(
        self, rows: StreamedRows, batch_size: int, rank: int, world_size: int, workers: int, seed: int
    ) -> None:
        self.rows = rows
        self.rank = rank
        self.workers = workers
        self.seed = seed
        self.runs = world_size * workers
        if not len(rows):
            raise ValueError("The split to train on has no rows.")
        if len(rows) < self.runs:
            raise ValueError(
                f"{len(rows)} rows are too few for {world_size} processes of {workers} workers: take fewer processes, "
                "or a smaller dataloader_num_workers."
            )
        shortest, longest = len(rows) // self.runs, -(-len(rows) // self.runs)
        self.batches_per_run = min(-(-longest // batch_size), shortest)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with workers that outlive an epoch

    def __len__(self) -> int:
        return self.batches_per_run * self.workers

    def set_epoch(self, epoch: int) -> None:
        """Draw another order from the next iteration on, in all workers, too; Trainer calls this."""
        self.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        worker = torch.utils.data.get_worker_info()
        run = self.rank * self.workers + (0 if worker is None else worker.id)
        start, stop = (len(self.rows) * number // self.runs for number in (run, run + 1))
        order = list(range(len(self.rows.groups)))
        random.Random(f"{self.seed}/{int(self.epoch)}").shuffle(order)
        rows = self._shuffle(self.rows.read(order, start, stop), random.Random(f"{self.seed}/{int(self.epoch)}/{run}"))
        for indices in np.array_split(np.arange(start, stop), self.batches_per_run):
            yield [next(rows) for _ in indices]

    def _shuffle(self, rows: Iterator[dict[str, Any]], generator: random.Random) -> Iterator[dict[str, Any]]:
        """The rows, each drawn from the `shuffle_buffer_size` that were read and not given yet."""
        buffer = []
        for row in rows:
            if len(buffer) < self.rows.shuffle_buffer_size:
                buffer.append(row)
            else:
                index = generator.randrange(len(buffer))
                row, buffer[index] = buffer[index], row
                yield row
        generator.shuffle(buffer)
        yield from buffer
