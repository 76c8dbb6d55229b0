"""Preparing: the rows are those of the readers, however often it is interrupted, and broken records are listed."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import PIL.Image
import pytest
from helpers.other_layouts import assert_same_rows, small_set
from helpers.prepared import entries, load_prepared, open_refer, problems_of, reads_of
from helpers.refer_folder import HEIGHT, MASKS, MINI, WIDTH, A, ReferFolder, rectangle

from data import check, prepare
from data.records import load_records
from data.refer import ReferRecords
from data.sources import open_records

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ("refer", "cris", "hub_table", "folder")


def opened(refer_set, layout, folder):
    if layout == "refer":
        return open_records("refer", refer_set.refer, refer_set.name)
    return open_records(**getattr(refer_set, f"write_{layout}")(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_the_readers(tmp_path, layout):
    records = opened(small_set(tmp_path), layout, tmp_path / "in")
    summary = prepare.prepare(records, tmp_path / "out", num_proc=1)
    expected = load_records(records)
    assert_same_rows(load_prepared(tmp_path / "out", tmp_path), expected)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {split: figures["objects"] for split, figures in summary["splits"].items()} == {
        split: len(rows) for split, rows in expected.items()
    }
    assert summary["left_out"] == 0 and problems_of(tmp_path / "out") == {}
    files = [f"{split}-00000-of-00001.parquet" for split in expected]
    assert entries(tmp_path / "out") == sorted([*files, "README.md", "problems.jsonl", "summary.json"])
    assert not (tmp_path / "out.partial").exists()


def test_images_can_be_embedded(tmp_path):
    refer_set = small_set(tmp_path)
    records = opened(refer_set, "refer", None)
    expected = load_records(records)
    files = {path.name: path.read_bytes() for path in refer_set.images.iterdir()}
    prepare.prepare(records, tmp_path / "out", num_proc=1, embed_images=True)
    for path in refer_set.images.iterdir():
        path.unlink()
    loaded = load_prepared(tmp_path / "out", tmp_path)
    for rows in loaded.cast_column("image", datasets.Image(decode=False)).values():
        for image in rows["image"][:]:
            assert image["bytes"] == files[image["path"]]
    assert_same_rows(loaded, expected)


@pytest.mark.parametrize("name", ["refcoco/unc", "refcocog/umd"])
def test_photographs(tmp_path, name):
    if not MINI.exists():
        pytest.skip("needs the photographs of ../shared/refer_mini")
    records = open_records("refer", MINI, name)
    prepare.prepare(records, tmp_path / "out")
    assert_same_rows(load_prepared(tmp_path / "out", tmp_path), load_records(records))


@pytest.mark.parametrize("split", ["123", "null", "no", "été", "_"])
def test_any_word_can_name_a_split(tmp_path, split):
    folder = ReferFolder(tmp_path / "refer")
    folder.refs[0]["split"] = split
    folder.write()
    records = open_records("refer", folder.root, "refcoco/unc")
    prepare.prepare(records, tmp_path / "out", num_proc=1)
    assert load_prepared(tmp_path / "out", tmp_path)[split]["ann_id"][:] == [10]


def test_a_split_that_datasets_could_not_read_is_listed(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    folder.refs[0]["split"] = "all"
    prepare.prepare(open_refer(folder), tmp_path / "out", num_proc=1)
    (reason,) = problems_of(tmp_path / "out").values()
    assert "ref_id 110: `datasets` allows no split named all" in reason


def large_set(root, times):
    """The small set's refs many times over, of which every 37th names no annotation."""
    folder = ReferFolder(root)
    folder.refs = [
        ref | {"ref_id": number, "ann_id": 999 if number % 37 == 36 else ref["ann_id"]}
        for number, ref in enumerate(folder.refs * times)
    ]
    folder.write()
    return open_records("refer", root, "refcoco/unc")


def test_processes_and_chunks_do_not_matter(tmp_path, monkeypatch):
    records = large_set(tmp_path / "refer", 20)
    monkeypatch.setattr(prepare, "ROWS_PER_FILE", 30)
    found = []
    for run, (num_proc, size) in enumerate([(1, 1000), (1, 7), (2, 7), (2, 33)]):
        monkeypatch.setattr(prepare, "RECORDS_PER_CHUNK", size)
        output = tmp_path / f"out{run}"
        prepare.prepare(records, output, num_proc)
        found.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert all(files == found[0] for files in found[1:])
    assert len([name for name in found[0] if name.startswith("train-")]) == 3  # 78 or so rows
    assert sorted(problems_of(tmp_path / "out0")) == [36, 73, 110]


def test_the_fingerprint_is_of_rows_and_splits(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    found = set()
    for run, change in enumerate([{}, {"split": "test"}, {"ref_id": 7}, {"sentences": [{"sent": "a dog"}]}]):
        folder.refs[2].update(change)
        folder.write()
        records = open_records("refer", folder.root, "refcoco/unc")
        found.add(prepare.prepare(records, tmp_path / f"out{run}", num_proc=1)["fingerprint"])
    assert len(found) == 4


# Interruption

SLOW = """
import os, sys, time
from data import prepare, refer

read = refer.ReferRecords.read

def slow_read(self, index):
    os.write(log, b"%d\\n" % index)
    time.sleep({pause})
    return read(self, index)

log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
refer.ReferRecords.read = slow_read
prepare.RECORDS_PER_CHUNK = {chunk}
prepare.main(["refer", {refer!r}, "--name", "refcoco/unc", "--output", {output!r}, "--num_proc", "2"])
"""
CHUNK = 20


def start_slow(tmp_path, chunk=CHUNK, pause=0.003):
    paths = {"log": str(tmp_path / "log"), "refer": str(tmp_path / "refer"), "output": str(tmp_path / "out")}
    code = SLOW.format(pause=pause, chunk=chunk, **paths)
    with open(tmp_path / "stderr", "w") as stderr:
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True, stderr=stderr)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "it ended before it could be interrupted"
        time.sleep(0.005)


def kill(process, group=True):
    (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()


def done(work):
    return {int(path.stem.removeprefix("chunk-")) for path in work.glob("chunk-*.jsonl")}


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Indices that were read in any process since the last call."""
    yield from reads_of(ReferRecords, tmp_path / "reads", monkeypatch)


@pytest.mark.slow
def test_killed_and_started_again(tmp_path, monkeypatch, reads):
    records = large_set(tmp_path / "refer", 200)
    expected = prepare.prepare(records, tmp_path / "uninterrupted")
    assert sorted(reads()) == list(range(len(records)))
    output, work = tmp_path / "out", tmp_path / "out.partial"
    seen = set()
    for count in (3, 15):  # twice: the second goes on from the first
        process = start_slow(tmp_path)
        wait_for(lambda count=count: len(done(work)) >= count, process)
        kill(process)
        assert not output.exists() and seen <= done(work)
        seen = done(work)
    assert 15 <= len(seen) < len(records) / CHUNK

    monkeypatch.setattr(prepare, "RECORDS_PER_CHUNK", CHUNK)
    assert prepare.prepare(records, output) == expected
    left = [index for index in range(len(records)) if index - index % CHUNK not in seen]
    assert sorted(reads()) == left
    assert not work.exists() and entries(output) == entries(tmp_path / "uninterrupted")
    for name in entries(output):
        assert (output / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes(), name


def test_a_folder_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "photographs").write_text("mine")
    with pytest.raises(FileExistsError, match="out.partial is in the way and was not made here"):
        prepare.prepare(large_set(tmp_path / "refer", 2), tmp_path / "out")
    assert (tmp_path / "out.partial" / "photographs").read_text() == "mine"


def test_an_output_that_cannot_be_written_is_told_as_such(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file/out.partial cannot be written .*: name another output"):
        prepare.prepare(open_refer(ReferFolder(tmp_path / "refer")), tmp_path / "file" / "out")
    (tmp_path / "file.partial").write_text("mine")
    (tmp_path / "file").unlink()
    with pytest.raises(FileExistsError, match="file.partial is in the way and was not made here"):
        prepare.prepare(open_refer(ReferFolder(tmp_path / "other")), tmp_path / "file")


def test_no_more_processes_than_chunks_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", Mock(wraps=prepare.ProcessPoolExecutor))
    monkeypatch.setattr(prepare, "RECORDS_PER_CHUNK", 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    prepare.prepare(open_refer(ReferFolder(tmp_path / "refer")), tmp_path / "out", num_proc=99999)
    assert prepare.ProcessPoolExecutor.call_args.args[0] == 2


def test_one_record_is_one(tmp_path, capsys):
    folder = ReferFolder(tmp_path / "refer")
    del folder.refs[5]["ann_id"]
    folder.write()
    arguments = ["refer", str(folder.root), "--name", "refcoco/unc", "--output", str(tmp_path / "out")]
    prepare.main([*arguments, "--num_proc", "1"])
    assert "\n1 record left out (see" in capsys.readouterr().out
    assert "\n1 record left out; `problems.jsonl` says" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("strict", [False, True])
def test_what_no_reader_foresees_is_listed(tmp_path, monkeypatch, strict):
    records = large_set(tmp_path / "refer", 5)
    read = type(records).read

    def fail(self, index):
        if index == 3:
            raise ZeroDivisionError("\x1b[2J")
        return read(self, index)

    monkeypatch.setattr(type(records), "read", fail)
    if strict:
        with pytest.raises(ValueError, match="entry 3: it cannot be read"):
            prepare.prepare(records, tmp_path / "out", strict=True)
        return
    prepare.prepare(records, tmp_path / "out")
    reason = problems_of(tmp_path / "out")[3]
    assert "entry 3: it cannot be read (ZeroDivisionError(" in reason and "\x1b" not in reason


def test_a_reader_that_is_killed_is_told(tmp_path, monkeypatch):
    records = large_set(tmp_path / "refer", 5)
    monkeypatch.setattr(type(records), "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OSError, match="from entry 0 on was ended, likely for want of memory"):
        prepare.prepare(records, tmp_path / "out")


def test_killed_while_the_files_are_written(tmp_path, monkeypatch, reads):
    records = large_set(tmp_path / "refer", 20)
    expected = prepare.prepare(records, tmp_path / "uninterrupted")
    reads()
    process = os.fork()
    if not process:
        monkeypatch.setattr(prepare, "ROWS_PER_FILE", 30)  # leaves files that the next run has no use for
        monkeypatch.setattr(prepare, "format_summary", lambda summary: os.kill(os.getpid(), signal.SIGKILL))
        prepare.prepare(records, tmp_path / "out")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "out").exists() and len(reads()) == len(records)
    assert prepare.prepare(records, tmp_path / "out") == expected
    assert reads() == [] and entries(tmp_path / "out") == entries(tmp_path / "uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["annotations", "chunks"])
def test_the_work_of_another_job_is_thrown_away(tmp_path, monkeypatch, reads, changed):
    records = large_set(tmp_path / "refer", 60)
    process = start_slow(tmp_path)
    wait_for(lambda: len(done(tmp_path / "out.partial")) >= 3, process)
    kill(process)
    if changed == "annotations":
        monkeypatch.setattr(prepare, "RECORDS_PER_CHUNK", CHUNK)
        records = large_set(tmp_path / "other", 60)
        (tmp_path / "refer").rename(tmp_path / "old")
        (tmp_path / "other").rename(tmp_path / "refer")
        refs = tmp_path / "refer" / "refcoco" / "refs(unc).p"
        refs.write_bytes(pickle.dumps(pickle.loads(refs.read_bytes())[1:]))
        records = open_records("refer", tmp_path / "refer", "refcoco/unc")
    expected = prepare.prepare(records, tmp_path / "expected")
    assert sorted(reads()) == list(range(len(records)))
    assert prepare.prepare(records, tmp_path / "out") == expected
    assert sorted(reads()) == list(range(len(records)))


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    large_set(tmp_path / "refer", 300)
    process = start_slow(tmp_path, chunk=1000, pause=0.02)
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and log.stat().st_size > 50, process)
    kill(process, group=False)
    end = time.monotonic() + 5
    while not all_gone(process.pid):
        assert time.monotonic() < end, "workers go on without their parent"
        time.sleep(0.05)


def all_gone(group):
    """Whether no process of the group is alive; dead ones that nobody waits for do not count."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        alive += [stat] if int(its_group) == group and state != "Z" else []
    return not alive


# Bad records


@pytest.fixture
def bad(tmp_path):
    """A set whose records 1, 3, 5 and 6 are bad: a missing image, another's ref_id, no ann_id, 10 MB."""
    folder = ReferFolder(tmp_path / "refer")
    image = {"id": 3, "file_name": "missing.jpg", "height": HEIGHT, "width": WIDTH}
    annotation = {"id": 50, "image_id": 3, "segmentation": [rectangle(*A)], "bbox": [3, 4, 17, 11]}
    folder.instances["images"].append(image)
    folder.instances["annotations"].append(annotation)
    folder.refs[1].update(image_id=3, ann_id=50)
    folder.refs[3]["ref_id"] = folder.refs[0]["ref_id"]
    del folder.refs[5]["ann_id"]
    folder.refs[6]["sentences"] = [{"sent": "x" * 10**7}]
    return folder


@pytest.mark.parametrize("chunk", [2, 1000])
def test_bad_records_are_listed_and_others_kept(tmp_path, monkeypatch, bad, chunk):
    monkeypatch.setattr(prepare, "RECORDS_PER_CHUNK", chunk)
    summary = prepare.prepare(open_refer(bad), tmp_path / "out")
    problems = problems_of(tmp_path / "out")
    assert list(problems) == [1, 3, 5, 6] and summary["left_out"] == 4
    assert "ref_id 111: image " in problems[1] and "missing.jpg does not exist" in problems[1]
    assert "ref_id 110 stands at an earlier record too" in problems[3]
    assert "ref_id 115" in problems[5] and "'ann_id'" in problems[5]
    assert "ref_id 116: a phrase has 10,000,000 characters" in problems[6]
    loaded = load_prepared(tmp_path / "out", tmp_path)
    assert {split: rows["ref_id"][:] for split, rows in loaded.items()} == {"train": [110, 114], "val": [112]}
    assert "4 records left out; `problems" in (tmp_path / "out" / "README.md").read_text()


def test_strict_stops_at_the_first(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(prepare, "RECORDS_PER_CHUNK", 2)
    with pytest.raises(FileNotFoundError, match="missing.jpg does not exist"):
        prepare.prepare(open_refer(bad), tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(bad.images / "missing.jpg")
    with pytest.raises(ValueError, match="ref_id 115: a field is missing"):
        prepare.prepare(open_refer(bad), tmp_path / "out", strict=True)
    bad.refs[5:] = []
    with pytest.raises(ValueError, match="ref_id 110 stands at an earlier record too"):
        prepare.prepare(open_refer(bad), tmp_path / "out", strict=True)
    bad.refs[3]["ref_id"] = 5
    summary = prepare.prepare(open_refer(bad), tmp_path / "out", strict=True)
    assert summary["left_out"] == 0 and sum(figures["objects"] for figures in summary["splits"].values()) == 5


def test_strict_does_not_overlook_what_an_interrupted_run_listed(tmp_path, monkeypatch, bad):
    records = open_refer(bad)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_assemble", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(records, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="missing.jpg"):
        prepare.prepare(records, tmp_path / "out", strict=True)


def test_want_of_memory_is_not_told_as_a_broken_record(tmp_path, monkeypatch):
    folder = ReferFolder(tmp_path / "refer")
    records = open_refer(folder)

    def fail(self, index):
        raise MemoryError("no room")

    monkeypatch.setattr(ReferRecords, "read", fail)
    with pytest.raises(MemoryError, match="no room"):
        prepare.prepare(records, tmp_path / "out", num_proc=1)
    assert not (tmp_path / "out").exists()


def test_objects_without_phrases_are_counted_in_the_summary(tmp_path, capsys):
    folder = ReferFolder(tmp_path / "refer")
    folder.refs[0]["sentences"] = folder.refs[3]["sentences"] = []
    folder.write("grefcoco")
    (folder.root / "grefcoco" / "refs(unc).p").unlink()
    (folder.root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(folder.refs))
    arguments = ["refer", str(folder.root), "--name", "grefcoco/unc", "--output", str(tmp_path / "out")]
    prepare.main([*arguments, "--num_proc", "1", "--strict"])
    assert "2 objects have no phrases and are skipped" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["left_out"], summary["without_phrases"]) == (0, 2)
    assert {split: figures["objects"] for split, figures in summary["splits"].items()} == {
        "train": 3,
        "val": 1,
        "testB": 1,
    }
    assert "2 objects have no phrases" in (tmp_path / "out" / "README.md").read_text()


def test_any_set_in_the_layout_is_prepared_with_its_images(tmp_path, capsys):
    folder = ReferFolder(tmp_path / "refer")
    folder.write("aerial")
    images = folder.images.rename(tmp_path / "JPEGImages")
    arguments = ["refer", str(folder.root), "--name", "aerial/unc", "--output", str(tmp_path / "out")]
    prepare.main([*arguments, "--images", str(images), "--num_proc", "1"])
    assert "published" not in capsys.readouterr().out and not problems_of(tmp_path / "out")
    expected = load_records(open_records("refer", folder.root, "aerial/unc", images))
    assert_same_rows(load_prepared(tmp_path / "out", tmp_path), expected)
    with pytest.raises(SystemExit, match="no data set 'aerial' split by 'unc'"):
        prepare.main([*arguments[:-1], str(tmp_path / "other")])


def test_nothing_sound(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    hidden = folder.images.rename(tmp_path / "hidden")
    folder.images.mkdir()
    records = open_refer(folder)
    with pytest.raises(ValueError, match=r"refcoco/unc has no sound record among 7, the first because: .* not exist"):
        prepare.prepare(records, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    folder.images.rmdir()
    hidden.rename(folder.images)
    assert prepare.prepare(records, tmp_path / "out")["left_out"] == 0
    folder.refs = []
    with pytest.raises(ValueError, match="refs.unc..p has no records"):
        prepare.prepare(open_refer(folder), tmp_path / "other")


@pytest.mark.parametrize("kind", ["folder", "file", "dead link"])
def test_what_is_there_is_not_touched(tmp_path, kind):
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="out exists: name a folder that does not"):
        prepare.prepare(open_refer(ReferFolder(tmp_path / "refer")), output)
    assert not (tmp_path / "out.partial").exists()


def test_figures(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    summary = prepare.prepare(open_refer(folder), tmp_path / "out", num_proc=1)
    train = summary["splits"]["train"]
    masks = [mask for (_, mask), ref in zip(MASKS.values(), folder.refs) if ref["split"] == "train"]
    assert train == {
        "objects": 4,
        "phrases": 8,
        "images": 2,
        "words_mean": 2.0,  # "cat 10" and "l'été, left"
        "words_max": 2,
        "mask_area_mean": pytest.approx(np.mean(masks)),
        "empty_masks": 1,
    }


def test_published_counts_are_named_where_ours_differ(tmp_path, monkeypatch, capsys):
    folder = ReferFolder(tmp_path / "refer")
    folder.write()
    published = {"train": check.Counts(4, 9, 2), "val": check.Counts(1, 2, 1), "lost": check.Counts(5, 6, 7)}
    monkeypatch.setitem(check.PUBLISHED, "refcoco/unc", published)
    arguments = ["refer", str(folder.root), "--name", "refcoco/unc", "--output", str(tmp_path / "out")]
    prepare.main([*arguments, "--num_proc", "1"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "8 (published: 9)" in lines["train"] and lines["train"].count("published") == 1
    assert "published" not in lines["val"] + lines["testA"]
    for count in (5, 6, 7):
        assert f"0 (published: {count})" in lines["lost"]
    assert "8 (published: 9)" in (tmp_path / "out" / "README.md").read_text()
    fingerprint = json.loads((tmp_path / "out" / "summary.json").read_text())["fingerprint"]
    assert lines["0"] == f"0 records left out (see {tmp_path / 'out' / 'problems.jsonl'}); {fingerprint}"


def test_push_to_hub(tmp_path, monkeypatch):
    folder = ReferFolder(tmp_path / "refer")
    folder.write()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pushed = {}
    monkeypatch.setattr(datasets.DatasetDict, "push_to_hub", lambda rows, repo: pushed.update({repo: rows}))
    arguments = ["refer", str(folder.root), "--name", "refcoco/unc", "--output", str(tmp_path / "out")]
    prepare.main([*arguments, "--num_proc", "1", "--push_to_hub", "someone/mine"])
    assert_same_rows(pushed["someone/mine"], load_records(open_records("refer", folder.root, "refcoco/unc")))


def test_what_cannot_be_pushed_is_told_in_one_line(tmp_path, monkeypatch):
    folder = ReferFolder(tmp_path / "refer")
    folder.write()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    command = [
        "refer",
        str(folder.root),
        "--name",
        "refcoco/unc",
        "--output",
        str(tmp_path / "out"),
        "--num_proc",
        "1",
    ]
    with pytest.raises(
        SystemExit, match="--push_to_hub is 'not an id/x/y', no name on the Hub: write <owner>/<name>.$"
    ):
        prepare.main([*command, "--push_to_hub", "not an id/x/y"])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(datasets.DatasetDict, "push_to_hub", Mock(side_effect=RuntimeError("no\nnetwork")))
    with pytest.raises(SystemExit) as caught:
        prepare.main([*command, "--push_to_hub", "someone/mine"])
    message = str(caught.value)
    assert f"{tmp_path / 'out'} is prepared, but could not be uploaded to someone/mine (no network)" in message
    assert "\n" not in message and load_prepared(tmp_path / "out", tmp_path)
    monkeypatch.setattr(datasets.DatasetDict, "push_to_hub", Mock())
    exec(message.partition("python -c '")[2].removesuffix("'"), {})
    datasets.DatasetDict.push_to_hub.assert_called_once_with("someone/mine")


def test_a_set_prepared_again_under_the_same_name_is_not_read_from_the_cache_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = ReferFolder(tmp_path / "refer")
    counts = []
    for place in ("here", "there"):
        folder.write()
        output = tmp_path / place / "mine"
        prepare.prepare(open_records("refer", folder.root, "refcoco/unc"), output, num_proc=1)
        counts.append(datasets.load_dataset(str(output))["train"].num_rows)
        folder.refs = folder.refs[:-1]
    assert counts == [4, 3]
