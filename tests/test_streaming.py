"""Streamed rows: in an epoch each is seen once by one worker of one process, and no process waits for another."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.refer_folder import not_waiting
from torch.utils.data import DataLoader

from data.records import FEATURES, STORED_FEATURES
from data.streaming import StreamedBatches, StreamedRows, parquet_files

FILES = {"a.parquet": (37, 10), "b.parquet": (5, 100), "c.parquet": (61, 7)}  # rows, and those of a row group
ROWS = 103


def make_row(number):
    return {
        "image": {"path": f"{number}.jpg", "bytes": None},
        "mask": {"size": [4, 6], "counts": "h0"},
        "sentences": [f"phrase {number}", "another"],
        "ref_id": number,
        "ann_id": number,
        "image_id": number // 2,
        "category": "cat",
        "bbox": [0.0, 1.0, 2.0, number + 0.5],
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, number = tmp_path_factory.mktemp("parquet"), 0
    for name, (rows, group) in FILES.items():
        table = pa.Table.from_pylist(
            [make_row(number + row) for row in range(rows)], schema=STORED_FEATURES.arrow_schema
        )
        pq.write_table(table, folder / name, row_group_size=group)
        number += rows
    return [str(folder / name) for name in FILES]


def read(rows, batch_size, world_size=1, workers=1, seed=0, epoch=0):
    """For each process the batches of an epoch, as lists of ref_ids, read without worker processes."""
    found = []
    for rank in range(world_size):
        found.append([])
        for worker in range(workers):  # as `get_worker_info` would tell them apart
            batches = StreamedBatches(rows, batch_size, rank * workers + worker, world_size * workers, 1, seed)
            batches.set_epoch(epoch)
            found[-1] += [[row["ref_id"] for row in batch] for batch in batches]
    return found


def test_rows_from_elsewhere_name_no_files_here(files):
    rows = StreamedRows([f"file://{files[0]}"])
    with pytest.raises(ValueError, match="a.parquet has images of which it holds only the paths"):
        next(rows.read([0], 0, 1))


@pytest.mark.parametrize("buffer", [1, 8, 1000])
@pytest.mark.parametrize(
    "world_size, workers, batch_size",
    [
        (1, 1, 4),
        (2, 1, 4),
        (1, 3, 8),
        (3, 2, 5),
        (4, 4, 2),
        (2, 1, 1),
        (7, 1, 16),
        (2, 51, 1),
        (103, 1, 2),
        (1, 1, 200),
    ],
)
def test_each_row_is_in_one_batch_of_one_process(files, buffer, world_size, workers, batch_size):
    rows = StreamedRows(files, buffer)
    assert len(rows) == ROWS
    processes = read(rows, batch_size, world_size, workers)
    seen = [ref_id for batches in processes for batch in batches for ref_id in batch]
    assert sorted(seen) == list(range(ROWS))
    (length,) = {len(batches) for batches in processes}
    assert length == len(StreamedBatches(rows, batch_size, 0, world_size, workers, 0))
    sizes = [len(batch) for batches in processes for batch in batches]
    assert max(sizes) <= max(batch_size, 2) and min(sizes) > 0
    least = -(-ROWS // (world_size * workers * batch_size)) * workers  # with no batch but the last ones short
    assert length <= least


def test_rows_are_whole(files):
    (batches,) = [StreamedBatches(StreamedRows(files), 10, 0, 1, 1, 0)]
    assert sorted((row for batch in batches for row in batch), key=lambda row: row["ref_id"]) == [
        make_row(number) for number in range(ROWS)
    ]


def test_seed_and_epoch_draw_the_order(files):
    rows = StreamedRows(files, 20)
    first = read(rows, 4)
    assert read(rows, 4) == first
    assert read(rows, 4, epoch=1) != first != read(rows, 4, seed=1)
    assert read(rows, 4, epoch=1) == read(rows, 4, epoch=1)
    flat = [ref_id for batch in first[0] for ref_id in batch]
    in_order = sum(following == number + 1 for number, following in zip(flat, flat[1:]))
    assert in_order < ROWS / 4
    # Without a buffer the row groups still change places.
    plain = [read(StreamedRows(files, 1), ROWS, epoch=epoch)[0][0] for epoch in (0, 1)]
    assert plain[0] != plain[1] != sorted(plain[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_loaders_workers_share_a_process_rows(files, workers, persistent):
    rows = StreamedRows(files, 20)
    found = []
    for rank in range(2):
        batches = StreamedBatches(rows, 4, rank, 2, max(workers, 1), seed=5)
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            collate_fn=lambda batch: [row["ref_id"] for row in batch],
            persistent_workers=persistent and workers > 0,
        )
        epochs = []
        for epoch in range(2):
            batches.set_epoch(epoch)
            epochs.append([batch for batch in loader])
            assert len(epochs[-1]) == len(loader)
        found.append(epochs)
    for epoch in range(2):
        of_one, of_two = (found[rank][epoch] for rank in range(2))
        assert len(of_one) == len(of_two)
        assert sorted(ref_id for batch in of_one + of_two for ref_id in batch) == list(range(ROWS))
    assert found[0][0] != found[0][1]


def test_only_the_footers_are_read_at_first(files, monkeypatch):
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *_, **__: pytest.fail("rows were read"))
    StreamedBatches(StreamedRows(files), 4, 0, 1, 1, 0)


def test_a_worker_reads_no_more_than_its_rows(files, monkeypatch):
    """Each row group is read once, but for those that a border between two workers cuts."""
    read_row_group, groups = pq.ParquetFile.read_row_group, []
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda *args, **options: groups.append(1) or read_row_group(*args, **options)
    )
    rows = StreamedRows(files)
    read(rows, 4, world_size=3)
    assert len(rows.groups) <= len(groups) <= len(rows.groups) + 2


def test_fewer_rows_than_workers_are_refused(files):
    rows = StreamedRows(files)
    with pytest.raises(ValueError, match="103 rows are too few for 26 processes of 4 workers"):
        StreamedBatches(rows, 4, 0, 26, 4, 0)


def test_what_is_no_whole_parquet_file_is_named(files, tmp_path):
    with pytest.raises(OSError, match="missing.parquet"):
        StreamedRows([str(tmp_path / "missing.parquet")])
    content = open(files[0], "rb").read()
    for name, damaged in (("cut", content[:-10]), ("text", b"nothing"), ("empty", b"")):
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=f"{name}.parquet cannot be read"):
            StreamedRows([str(path)])
    # The footer is whole, the rows are not.
    path = tmp_path / "rows.parquet"
    path.write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    rows = StreamedRows([str(path)])
    with pytest.raises(OSError, match="rows.parquet cannot be read"):
        read(rows, 4)


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "device.parquet").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with not_waiting(), pytest.raises(ValueError, match=f"{name}.parquet is no regular file"):
            StreamedRows([str(tmp_path / f"{name}.parquet")])


@pytest.mark.parametrize("error", [MemoryError("no room"), pa.lib.ArrowMemoryError("no room")])
def test_want_of_memory_is_not_told_as_a_broken_file(files, monkeypatch, error):
    def fail(*_, **__):
        raise error

    rows = StreamedRows(files)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(type(error)) as caught:
        read(rows, 4)
    assert caught.value is error


def test_missing_columns_are_named(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"image": [b""], "caption": ["a cat"]}), path)
    with pytest.raises(ValueError, match="other.parquet has no columns .*'mask'.*'sentences'"):
        StreamedRows([str(path)])
    assert "caption" not in FEATURES


def test_other_files_than_parquet_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="csv files; only Parquet"):
        parquet_files(str(tmp_path))
