"""Preparing: the rows are the readers', whatever interrupts it, and what is bad is listed, not read or lost."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import PIL.Image
import pytest
from helpers.other_layouts import assert_same_rows, open_lines, small_set
from helpers.refer_folder import HEIGHT, MASKS, MINI, WIDTH, A, B, ReferFolder, pixels, rectangle, rle
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data import check, prepare
from data.refer import FEATURES, ReferRecords, load_records
from data.sources import open_records

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ("refer", "cris", "hub_table", "folder")


def opened(refer_set, layout, folder):
    if layout == "refer":
        return open_records("refer", refer_set.refer, refer_set.name)
    return open_records(**getattr(refer_set, f"write_{layout}")(folder))


def load(folder, tmp_path):
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


def problems_of(folder):
    return {item["record"]: item["reason"] for item in map(json.loads, open(folder / "problems.jsonl"))}


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_the_readers(tmp_path, layout):
    records = opened(small_set(tmp_path), layout, tmp_path / "in")
    summary = prepare.prepare(records, tmp_path / "out", num_proc=1)
    expected = load_records(records)
    assert_same_rows(load(tmp_path / "out", tmp_path), expected)
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
    loaded = load(tmp_path / "out", tmp_path)
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
    assert_same_rows(load(tmp_path / "out", tmp_path), load_records(records))


@pytest.mark.parametrize("split", ["123", "null", "no", "été", "_"])
def test_any_word_can_name_a_split(tmp_path, split):
    folder = ReferFolder(tmp_path / "refer")
    folder.refs[0]["split"] = split
    folder.write()
    records = open_records("refer", folder.root, "refcoco/unc")
    prepare.prepare(records, tmp_path / "out", num_proc=1)
    assert load(tmp_path / "out", tmp_path)[split]["ann_id"][:] == [10]


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
    path = tmp_path / "reads"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    read = ReferRecords.read
    monkeypatch.setattr(ReferRecords, "read", lambda self, index: os.write(log, b"%d\n" % index) and read(self, index))

    def since():
        indices = [int(line) for line in path.read_text().split()]
        os.truncate(path, 0)
        return indices

    yield since
    os.close(log)


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


def open_refer(folder):
    folder.write()
    return open_records("refer", folder.root, "refcoco/unc")


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
    loaded = load(tmp_path / "out", tmp_path)
    assert {split: rows["ref_id"][:] for split, rows in loaded.items()} == {"train": [110, 114], "val": [112]}
    assert "4 records were left out" in (tmp_path / "out" / "README.md").read_text()


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
    folder.write("rrsisd")
    images = folder.images.rename(tmp_path / "JPEGImages")
    arguments = ["refer", str(folder.root), "--name", "rrsisd/unc", "--output", str(tmp_path / "out")]
    prepare.main([*arguments, "--images", str(images), "--num_proc", "1"])
    assert "published" not in capsys.readouterr().out and not problems_of(tmp_path / "out")
    expected = load_records(open_records("refer", folder.root, "rrsisd/unc", images))
    assert_same_rows(load(tmp_path / "out", tmp_path), expected)
    with pytest.raises(SystemExit, match="no data set 'rrsisd' split by 'unc'"):
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


# Hostile records: each of RECORDS in a call is one case, and after it stands one that is left alone

CALLS, RECORDS = 25, 81
CASES = Counter()
FUZZ = settings(
    max_examples=CALLS,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a call tells which record it was; making it smaller would take minutes
    suppress_health_check=list(HealthCheck),
)
_guarded: tuple[str, int] | None = None  # folder, and file to write to when something in it is opened


def _guard(event, arguments):
    if _guarded and event == "open" and isinstance(arguments[0], str):
        if os.path.realpath(arguments[0].replace("\0", "")).startswith(_guarded[0]):
            os.write(_guarded[1], arguments[0].encode() + b"\n")


@pytest.fixture(scope="module", autouse=True)
def audit():
    sys.addaudithook(_guard)  # there is no way to remove it


@pytest.fixture
def canary(tmp_path):
    """A photograph and a mask that nobody may open, and the file that tells whether somebody did."""
    global _guarded
    folder = tmp_path / "canary"
    folder.mkdir()
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "canary.jpg")
    PIL.Image.fromarray(pixels(A)).save(folder / "canary.png")
    opened = tmp_path / "opened"
    descriptor = os.open(opened, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _guarded = (str(folder), descriptor)
    yield opened
    _guarded = None
    os.close(descriptor)


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def traps(folder, tmp_path):
    """Image files that no record may have: cut short, other sizes, code, links out; the names of all."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    whole = {}
    for suffix in ("jpg", "png"):
        PIL.Image.fromarray(noise).save(folder / f"whole.{suffix}")
        whole[suffix] = (folder / f"whole.{suffix}").read_bytes()
    names = []
    for suffix, content in whole.items():
        for length in range(0, len(content) - 99, 99):
            names.append(f"cut{length}.{suffix}")
            (folder / names[-1]).write_bytes(content[:length])
    (folder / "code.jpg").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "file.jpg").symlink_to(tmp_path / "canary" / "canary.jpg")
    (folder / "relative.jpg").symlink_to(os.path.relpath(tmp_path / "canary" / "canary.jpg", folder))
    (folder / "up").symlink_to(tmp_path / "canary")
    (folder / "link.jpg").symlink_to("file.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    up = os.path.relpath(tmp_path / "canary" / "canary.jpg", folder)
    links = ["file.jpg", "relative.jpg", "up/canary.jpg", "link.jpg", "loop.jpg", "up/../canary/canary.jpg"]
    paths = [str(tmp_path / "canary" / "canary.jpg"), up, f"./{up}", f"folder.jpg/../{up}", "..", "/", "", ".", "\0"]
    return [*names, *links, *paths, "code.jpg", "folder.jpg", "pipe.jpg", "none.jpg", "x" * 5000, "\ud800.jpg"]


NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e300, 10**400, -(10**9), 2**63]
JUNK = st.one_of(  # of no field's type
    st.sampled_from([None, True, {}, {"a": []}, [[]], [None], "\ud800", "x" * 10**4, *NUMBERS]),
    st.recursive(st.text(max_size=3), lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=2)),
)
BAD_IDS = st.sampled_from(["7", "", 7.5, 1.0, True, [], [7], {}, {"id": 7}, 2**63, -(2**63) - 1, 10**400])
CORNERS = st.floats(-20, 60, allow_nan=False)
BAD_POLYGONS = st.one_of(
    st.lists(CORNERS, max_size=5),  # up to 2 corners and a half
    st.lists(CORNERS, min_size=3, max_size=9).map(lambda sides: [*sides, *sides[:-1]]),  # an odd number
    st.tuples(st.lists(CORNERS, min_size=5, max_size=5), st.sampled_from(NUMBERS)).map(lambda it: [*it[0], it[1]]),
    st.lists(st.floats(1e3, 1e12), min_size=6, max_size=6),
    st.lists(JUNK, min_size=6, max_size=6).filter(lambda part: not all(isinstance(it, bool) for it in part)),
).map(lambda polygon: [rectangle(*A), polygon])
BAD_RLES = st.one_of(
    st.tuples(st.integers(0, 99), st.integers(0, 99))
    .filter(lambda size: size != (HEIGHT, WIDTH))
    .map(lambda size: {"size": list(size), "counts": [size[0] * size[1]]}),
    st.lists(st.integers(0, 300), max_size=9)
    .filter(lambda runs: sum(runs) != HEIGHT * WIDTH)
    .map(lambda runs: {"size": [HEIGHT, WIDTH], "counts": runs}),
    st.lists(st.integers(0, 2**33), min_size=1, max_size=99).map(
        lambda runs: {"size": [HEIGHT, WIDTH], "counts": [*runs, HEIGHT * WIDTH + 1]}
    ),
    st.tuples(st.integers(1, 2**40), st.integers(0, 10**6)).map(
        lambda it: {"size": [HEIGHT, WIDTH], "counts": [-it[0], HEIGHT * WIDTH + it[0], it[1] + 1]}
    ),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=3).map(
        lambda counts: {"size": [HEIGHT, WIDTH], "counts": counts + "~"}
    ),
    st.sampled_from([{}, {"size": [HEIGHT, WIDTH]}, {"counts": [1200]}, {"size": None, "counts": None}]),
)
BAD_BOXES = st.one_of(
    st.tuples(st.integers(0, 3), st.sampled_from([*NUMBERS[:3], 10**400, "1", None, True, [1]])).map(
        lambda it: [*[1.0] * it[0], it[1], *[1.0] * (3 - it[0])]
    ),
    st.lists(st.integers(0, 9), max_size=8).filter(lambda box: len(box) != 4),
    st.sampled_from(["abcd", {}, 4, float("nan")]),
)
BAD_PHRASES = st.one_of(
    st.lists(st.sampled_from(["", " ", "\t\n", "\u2003"]), min_size=1, max_size=2),
    st.just([]),
    st.integers(10_001, 10**5).map(lambda length: ["a cat", "x" * length]),
    st.sampled_from([None, 7, float("nan"), ["a cat"], {}, "half \ud83d"]).map(lambda phrase: ["a cat", phrase]),
)
BAD_SPLITS = st.sampled_from(["", "../up", "a/b", "a b", "x" * 65, "tr\nain", None, 3, ["train"], "\ud800"])
LONG = 10**7  # characters of one phrase of each call


@st.composite
def changes(draw, bad, removable):
    """Parts of a record to replace, or, as `...`, to remove; none will do."""
    kind = draw(st.sampled_from(["remove", *bad]))
    return (draw(st.sampled_from(removable)), ...) if kind == "remove" else (kind, draw(bad[kind]))


def apply(record, key, value):
    record.pop(key, None)
    return record if value is ... else record | {key: value}


def run_fuzz(records, output, tmp_path, canary, root, sound):
    """All but the sound records are listed, and nothing outside was opened or run."""
    prepare.prepare(records, output, num_proc=1)
    problems = problems_of(output)
    assert list(problems) == [index for index in range(len(records)) if index not in sound]
    assert all(isinstance(reason, str) and 10 < len(reason) < 2000 for reason in problems.values())
    loaded = load(output, tmp_path).cast_column("image", datasets.Image(decode=False))
    rows = {row["ref_id"]: row for split in loaded.values() for row in split}
    assert set(rows) == set(sound.values())
    for row in rows.values():
        assert os.path.realpath(row["image"]["path"]).startswith(os.path.realpath(root))
        np.testing.assert_array_equal(row["mask"], pixels(A))
    assert canary.read_text() == "" and not (tmp_path / "ran").exists()
    assert entries(output) == ["README.md", "problems.jsonl", "summary.json", "train-00000-of-00001.parquet"]
    CASES[type(records).__name__] += len(problems)


BAD_LINES = {
    "file_name": st.one_of(st.integers(0, 99), st.sampled_from([None, 7, ["whole.jpg"], {}])),
    "mask": st.one_of(BAD_POLYGONS, BAD_RLES, st.sampled_from([7, True, [], "whole.jpg", "whole.png", ""])),
    "sentences": st.one_of(BAD_PHRASES, st.sampled_from(["a cat", None, 7])),
    "ref_id": BAD_IDS,
    "ann_id": BAD_IDS,
    "image_id": BAD_IDS,
    "bbox": BAD_BOXES,
    "category": st.sampled_from([["cat"], 7, "x" * 5000, "\ud800"]),
    "split": BAD_SPLITS.filter(lambda split: split is not None),  # that is train
    "line": st.one_of(st.binary(min_size=1, max_size=9).map(lambda line: b"{" + b"".join(line.splitlines())), JUNK),
}


def test_hostile_folders(tmp_path, canary):
    root = tmp_path / "mine"
    names = traps(root, tmp_path)
    masks = [name.replace(".jpg", ".png") for name in names if "canary" in name or name.endswith(".png")]
    sound_line = {"file_name": "whole.jpg", "sentences": ["a cat"], "mask": [rectangle(*A)]}
    PIL.Image.fromarray(pixels(A)).save(root / "sound.png")
    PIL.Image.fromarray(pixels(A)[1:]).save(root / "small.png")
    runs = iter(range(10**9))

    @FUZZ
    @given(st.lists(changes(BAD_LINES, ["file_name", "mask", "sentences"]), min_size=RECORDS, max_size=RECORDS))
    def fuzz(mutations):
        lines, sound = [], {}
        for number, (key, value) in enumerate(mutations):
            if key == "file_name" and type(value) is int and number % 3:
                value = names[(value * 7 + number) % len(names)]
            elif key == "mask" and value in ("", True):
                key, value = "mask", [*masks, "small.png"][number % (len(masks) + 1)]
            if key == "sentences" and number == 0:
                value = ["x" * LONG]
            bad = apply(sound_line | {"file_name": "whole.png"}, key, value)
            lines.append(bad if key != "line" else value)
            sound[len(lines)] = 10**6 + number
            mask = ([rectangle(*A)], rle(pixels(A)), "sound.png")[number % 3]
            lines.append(sound_line | {"ref_id": 10**6 + number, "mask": mask})
        run_fuzz(open_lines(root, *lines), tmp_path / f"out{next(runs)}", tmp_path, canary, root, sound)

    fuzz()
    assert CASES["FolderRecords"] >= 2000


BAD_REFS = {
    ("ref", "ref_id"): BAD_IDS,
    ("ref", "ann_id"): st.one_of(BAD_IDS, st.sampled_from([-1, [], [10**4], [-1, 3], 10**5000])),
    ("ref", "image_id"): BAD_IDS,
    ("ref", "category_id"): st.one_of(BAD_IDS, st.sampled_from([99, [17], 10**5000])),
    ("ref", "split"): BAD_SPLITS,
    ("ref", "sentences"): st.one_of(
        BAD_PHRASES.map(lambda phrases: [{"sent": phrase} for phrase in phrases]),
        st.sampled_from([None, 7, "a cat", ["a cat"], [{}], {"sent": "a cat"}]),
    ),
    ("ref", "itself"): st.sampled_from([None, 7, "ref", [], {}, {"ref_id": 10**5000}]),
    ("image", "file_name"): st.one_of(st.integers(0, 99), st.sampled_from([None, 7, ["whole.jpg"], {}])),
    ("image", "height"): st.one_of(st.integers(-3, 999).filter(lambda side: side != HEIGHT), BAD_IDS),
    ("image", "width"): st.one_of(st.integers(-3, 999).filter(lambda side: side != WIDTH), BAD_IDS),
    ("annotation", "segmentation"): st.one_of(BAD_POLYGONS, BAD_RLES, st.sampled_from([None, [], 7, "x", [[]], [7]])),
    ("annotation", "bbox"): BAD_BOXES,
    ("annotation", "image_id"): BAD_IDS,
}
REF_PARTS = {
    "ref": ("ref_id", "ann_id", "image_id", "category_id", "split", "sentences"),
    "image": ("file_name", "height", "width"),
    "annotation": ("segmentation", "bbox", "image_id"),
}


def test_hostile_refer_sets(tmp_path, canary):
    folder = ReferFolder(tmp_path / "refer")
    names = traps(folder.images, tmp_path)
    removable = [(part, key) for part, keys in REF_PARTS.items() for key in keys]
    runs = iter(range(10**9))

    @FUZZ
    @given(st.lists(changes(BAD_REFS, removable), min_size=RECORDS, max_size=RECORDS))
    def fuzz(mutations):
        folder.refs, folder.instances["images"], folder.instances["annotations"], sound = [], [], [], {}
        for number, ((part, key), value) in enumerate(mutations):
            if key == "file_name" and type(value) is int and number % 3:
                value = names[(value * 7 + number) % len(names)]
            if key == "sentences" and number == 0:
                value = [{"sent": "x" * LONG}]
            for id in (1000 + number, 2000 + number):
                record = {
                    "ref": {"ref_id": id, "ann_id": id, "image_id": id, "category_id": 17, "split": "train"},
                    "image": {"id": id, "file_name": "whole.jpg", "height": HEIGHT, "width": WIDTH},
                    "annotation": {"id": id, "image_id": id, "segmentation": [rectangle(*A)], "bbox": [3, 4, 17, 11]},
                }
                record["ref"]["sentences"] = [{"sent": "a cat"}]
                if id < 2000:
                    record[part] = value if key == "itself" else apply(record[part], key, value)
                else:
                    sound[len(folder.refs)] = id
                folder.refs.append(record["ref"])
                folder.instances["images"].append(record["image"])
                folder.instances["annotations"].append(record["annotation"])
        run_fuzz(open_refer(folder), tmp_path / f"out{next(runs)}", tmp_path, canary, folder.images, sound)

    fuzz()
    assert CASES["ReferRecords"] >= 2000


def test_a_pickle_with_code_ends_it_before_it_begins(tmp_path):
    folder = ReferFolder(tmp_path / "refer")
    for place in (lambda code: code, lambda code: [*folder.refs, code], lambda code: [folder.refs[0] | {"x": code}]):
        folder.write()
        (folder.root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(place(Code(tmp_path / "ran"))))
        arguments = ["refer", str(folder.root), "--name", "refcoco/unc", "--output", str(tmp_path / "out")]
        with pytest.raises(SystemExit, match=r"posix.mkdir.*nothing in it was run"):
            prepare.main(arguments)
        assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("out*"))


def test_rows_of_hostile_polygons_stay_in_their_image(tmp_path):
    """Corners a little outside are COCO's own; they are cut off."""
    folder = ReferFolder(tmp_path / "refer")
    folder.instances["annotations"][0]["segmentation"] = [rectangle(-9, -9, B[2], B[3])]
    prepare.prepare(open_refer(folder), tmp_path / "out", num_proc=1)
    row = load(tmp_path / "out", tmp_path)["train"][0]
    assert load(tmp_path / "out", tmp_path)["train"].features == FEATURES
    np.testing.assert_array_equal(row["mask"], pixels((0, 0, B[2], B[3])))
