"""Training rows read from Parquet files while they are needed, not downloaded or converted before."""

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

from .records import FEATURES, require_columns


def parquet_files(name: str) -> dict[str, list[str]]:
    """Paths or URLs of the Parquet files of each split of a folder made by `data.prepare`, or of the Hub's data set.

    Raises:
        ValueError: its files are no Parquet.
        OSError: there is no such data set.
    """
    builder = datasets.load_dataset_builder(name)
    if builder.name != "parquet":
        raise ValueError(f"{name} holds {builder.name} files; only Parquet can be streamed: see data.prepare.")
    return {str(split): list(files) for split, files in builder.config.data_files.items()}


class RowGroup(NamedTuple):
    """The part of a Parquet file that is read at once."""

    file: str
    index: int
    rows: int


class StreamedRows:
    """Rows of Parquet files. At first only the files' footers are read; `len` is the number of rows.

    Args:
        files: paths, or URLs that `fsspec` opens, such as `hf://…`.
        shuffle_buffer_size: rows among which each worker draws the next one. Their images are in memory if they are
            embedded in the files.

    Raises:
        ValueError: columns are missing.
        OSError: a file is missing or broken.
    """

    def __init__(self, files: Sequence[str], shuffle_buffer_size: int = 1000):
        self.shuffle_buffer_size = shuffle_buffer_size
        self.groups = []
        for file in files:
            with _opened(file) as parquet:
                metadata = parquet.metadata
            require_columns(file, metadata.schema.to_arrow_schema().names)
            self.groups += [
                RowGroup(file, index, metadata.row_group(index).num_rows) for index in range(metadata.num_row_groups)
            ]

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    def read(self, order: Sequence[int], start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows from `start` to `stop` if the row groups stand in the given order, images and masks not decoded.

        Raises:
            OSError: a file is missing or broken.
        """
        position = 0  # of the row group's first row
        for group in (self.groups[index] for index in order):
            first, last = max(start - position, 0), min(stop - position, group.rows)
            if first < last:
                with _opened(group.file) as parquet:
                    rows = parquet.read_row_group(group.index, columns=list(FEATURES)).select(list(FEATURES))
                    rows = rows.cast(FEATURES.arrow_schema)
                yield from rows.slice(first, last - first).to_pylist()
            position += group.rows


@contextmanager
def _opened(file: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; raises OSError if it is missing or broken."""
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
    """The batches of one process, as lists of rows: in an epoch each row is in one batch of one process.

    The row groups are put in an order drawn from seed and epoch. What they hold is cut into runs of equal length, one
    for each worker of each process, which draws its run through a shuffle buffer and divides it evenly into batches.
    So all processes have as many batches, `len`, as training in step needs, and none is filled up with rows seen
    before. Where the number of rows does not allow batches of `batch_size`, they are a little smaller, or with a
    `batch_size` of 1 larger. The order depends on the numbers of processes and workers.

    Args:
        rows: what to read.
        batch_size: rows of a batch.
        rank: number of this process.
        world_size: number of processes.
        workers: of a `DataLoader`, which must be given `batch_size=None`; 1 if it has none.
        seed: draws the order.

    Raises:
        ValueError: there are fewer rows than workers of all processes.
    """

    def __init__(self, rows: StreamedRows, batch_size: int, rank: int, world_size: int, workers: int, seed: int):
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
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may outlive an epoch

    def __len__(self) -> int:
        return self.batches_per_run * self.workers

    def set_epoch(self, epoch: int) -> None:
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
