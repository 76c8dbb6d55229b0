"""What segment.py leaves behind: folders that no two pictures share, and the same files after an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import in_child
from helpers.segmenting import PHRASES, make_folder, results_in, save_picture, tree
from PIL import Image

import segment
import segment_results
from segment_results import assign_folders

pytestmark = pytest.mark.usefixtures("one_thread")


def test_names_that_are_unique_stay():
    names = {"p/a.jpg": "a.jpg", "p/a.png": "a.png", "p/s/a.jpg": "s/a.jpg"}
    assert assign_folders(names) == names


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.jpg", "a.jpg"],
        ["a.jpg", "A.JPG"],
        ["a", "a/b", "a/b/c"],
        ["results.json", "b"],
        [".unfinished", ".lock"],
        [".x/../y", "/a"],
        ["x" * 250, "x" * 250],
    ],
    ids=str,
)
def test_no_folder_is_used_twice(names):
    folders = list(assign_folders({f"source {number}": name for number, name in enumerate(names)}).values())
    for folder in folders:
        others = [other.casefold() for other in folders if other is not folder]
        assert len(others) == len(folders) - 1
        assert all(other != folder.casefold() and not other.startswith(f"{folder.casefold()}/") for other in others)
        assert folder not in ("results.json", ".lock", ".unfinished") and not folder.startswith(("/", "."))
        assert ".." not in folder.split("/") and all(len(part) < 255 for part in folder.split("/"))


def test_names_do_not_depend_on_the_order():
    names = {"x": "a.jpg", "y": "a.jpg", "z": "b.jpg"}
    assert assign_folders(names) == assign_folders(dict(reversed(names.items())))


# --- where it stopped ---------------------------------------------------------------------------------------------


class KilledAt:
    """A function that works like another, but ends the process, as `kill -9` does, when it is called so often."""

    def __init__(self, function, call: int, after: bool = False):
        self.function, self.call, self.after = function, call, after

    def __call__(self, *arguments, **options):
        self.call -= 1
        if self.call == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.function(*arguments, **options)
        if self.call == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


KILLS = {
    "before a picture": (segment, "write_picture", 4, False),
    "among its files": (Image.Image, "save", 8, True),
    "before its result": (segment_results, "write_json", 3, False),
    "before it is in place": (segment, "put_in_place", 4, False),
    "after it is in place": (segment, "put_in_place", 4, True),
    "before the results of all": (os, "replace", 1, False),
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_killed_and_started_again_leaves_the_same_files(run_segment, place, monkeypatch, kill, batch_size):
    owner, name, *when = kill
    make_folder(place / "photos", 7)
    (place / "photos" / "03.png").write_bytes(b"broken")
    command = ["photos", *PHRASES, "--batch_size", batch_size]
    assert run_segment(*command, "--output", "in_one_go") == 1

    def killed() -> None:
        setattr(owner, name, KilledAt(getattr(owner, name), *when))
        if owner is Image.Image:  # a method
            counter = getattr(owner, name)
            owner.save = lambda *arguments, **options: counter(*arguments, **options)
        run_segment(*command, "--output", "killed")

    assert in_child(killed) == -signal.SIGKILL
    assert not Path("killed/results.json").exists()
    assert run_segment(*command, "--output", "killed") == 1
    assert tree(place / "killed") == tree(place / "in_one_go")
    assert not Path("killed", segment_results.UNFINISHED).exists()


def test_finished_pictures_are_not_segmented_again(run_segment, segment_pipe, place, monkeypatch):
    make_folder(place / "photos")
    assert run_segment("photos", *PHRASES) == 0
    before = tree(place / "out")
    save_picture(place / "photos" / "new.png", 9)
    Path("out/02.png/1_the-bed.png").unlink()  # no longer whole
    asked = []
    find = segment.Run._find
    monkeypatch.setattr(
        segment.Run, "_find", lambda self, p, images: asked.extend(x.source for x in p) or find(self, p, images)
    )
    assert run_segment("photos", *PHRASES) == 0
    assert asked == ["photos/02.png", "photos/new.png"]
    after = tree(place / "out")
    assert {name: after[name] for name in before if name != "results.json"} == {
        name: content for name, content in before.items() if name != "results.json"
    }
    assert len(results_in("out")["pictures"]) == 6


@pytest.mark.parametrize(
    "change, difference",
    [
        (lambda photos: ["the bed"], "other phrases"),
        (lambda photos: [*PHRASES[::-1]], "other phrases"),
        (lambda photos: [*PHRASES, "--threshold", "0.5"], "another threshold"),
        (lambda photos: save_picture(photos / "01.png", 77) is None or PHRASES, "another picture of this name"),
    ],
    ids=["fewer phrases", "order", "threshold", "picture"],
)
def test_results_of_another_run_are_never_mixed_with_this_one(run_segment, place, capsys, change, difference):
    make_folder(place / "photos", 3)
    assert run_segment("photos", *PHRASES) == 0
    changed = change(place / "photos")
    before = tree(place / "out")
    capsys.readouterr()
    assert run_segment("photos", *changed) == 1
    assert difference in (error := capsys.readouterr().err) and "--overwrite" in error
    assert tree(place / "out") == before
    assert run_segment("photos", *changed, "--overwrite") == 0
    assert run_segment("photos", *changed, "--output", "fresh") == 0
    assert tree(place / "out") == tree(place / "fresh")


def test_trained_model_is_another_model(run_segment, segment_pipe, place, capsys):
    make_folder(place / "photos", 2)
    assert run_segment("photos", *PHRASES) == 0
    (bias, *_) = [parameter for name, parameter in segment_pipe.model.named_parameters() if name.endswith("bias")]
    with torch.no_grad():
        bias[0] += 1
    try:
        assert run_segment("photos", *PHRASES) == 1
        assert "results of other weights" in capsys.readouterr().err
    finally:
        with torch.no_grad():
            bias[0] -= 1
    assert run_segment("photos", *PHRASES) == 0


def test_single_picture_is_segmented_anew_with_other_phrases(run_segment, place, capsys):
    save_picture(place / "photo.png")
    assert run_segment("photo.png", "left cat", "the bed") == 0
    assert run_segment("photo.png", "the bed") == 0
    assert "results of other phrases, which this run replaces" in capsys.readouterr().err
    assert {path.name for path in Path("out/photo.png").iterdir()} == {"1_the-bed.png", "overlay.jpg", "result.json"}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"settings": {}}', b'{"settings": {}, "results": [1]}', b"[" * 9999]
)
def test_broken_results_are_made_anew(run_segment, place, content):
    make_folder(place / "photos", 2)
    assert run_segment("photos", *PHRASES) == 0
    before = tree(place / "out")
    result = Path("out/01.png/result.json")
    if b"settings" in content:
        content = content.replace(b"{}", json.dumps(json.loads(result.read_text())["settings"]).encode())
    result.write_bytes(content)
    assert run_segment("photos", *PHRASES) == 0
    assert tree(place / "out") == before


def test_what_others_have_written_is_left_alone(run_segment, place, capsys):
    make_folder(place / "photos", 2)
    for command, name in (
        (["photos", "a", "--output", "photos"], "photos/00.png"),
        (["photos/00.png", "a", "--output", "photos"], "photos/00.png"),
        (["photos", "a", "--output", "mine"], "mine/01.png"),
        (["photos", "a", "--output", "theirs"], "theirs/results.json"),
    ):
        Path("mine/01.png").mkdir(parents=True, exist_ok=True)
        Path("mine/01.png/precious.txt").write_text("mine")
        Path("theirs").mkdir(exist_ok=True)
        Path("theirs/results.json").write_text('{"theirs": 1}')
        before = tree(place)
        assert run_segment(*command) == 1
        assert f"{name} is in the way" in capsys.readouterr().err
        after = tree(place)
        assert {file: after[file] for file in before} == before


def test_earlier_results_are_no_pictures(run_segment, place):
    make_folder(place, 2)
    for _ in range(2):
        assert run_segment(".", "the bed") == 0
        assert [entry["folder"] for entry in results_in("out")["pictures"]] == ["00.png", "01.png"]


def test_ctrl_c_keeps_what_is_finished(run_segment, place, capsys, monkeypatch):
    make_folder(place / "photos")
    find = segment.Run._find

    def interrupted(self, pictures, images):
        if pictures[0].source.endswith("03.png"):
            raise KeyboardInterrupt
        return find(self, pictures, images)

    monkeypatch.setattr(segment.Run, "_find", interrupted)
    assert run_segment("photos", *PHRASES) == 130
    error = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert error == "Interrupted: 3 of 5 pictures are finished in out; the same command goes on from there."
    assert {path.name for path in Path("out").iterdir()} == {"00.png", "01.png", "02.png", ".lock"}
    monkeypatch.setattr(segment.Run, "_find", find)
    assert run_segment("photos", *PHRASES) == 0
    assert run_segment("photos", *PHRASES, "--output", "in_one_go") == 0
    assert tree(place / "out") == tree(place / "in_one_go")


def test_two_runs_do_not_share_a_folder(run_segment, place, capsys):
    save_picture(place / "photo.png")
    with segment_results.locked(place / "out"):
        assert run_segment("photo.png", "the bed") == 1
    assert "Another run is at work in out" in capsys.readouterr().err


def without_rights_of_root() -> None:
    """In a process that is about to start another program: let it have no files that their permissions forbid."""
    import ctypes

    drop_capability, override, read_search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    for capability in (override, read_search):
        ctypes.CDLL(None).prctl(drop_capability, capability, 0, 0, 0)


@pytest.mark.slow
def test_twenty_pictures_killed_half_way_as_a_program(segment_model, place):
    make_folder(place / "photos", 20)
    (place / "photos" / "07.png").write_bytes((place / "photos" / "07.png").read_bytes()[:1000])
    (place / "photos" / "11.png").chmod(0)
    program = Path(segment.__file__)
    command = [
        sys.executable,
        str(program),
        "photos",
        *PHRASES,
        "--model",
        str(segment_model),
        "--device",
        "cpu",
        "--output",
    ]

    def start(output: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, output],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=without_rights_of_root,
        )

    out, error = (whole := start("in_one_go")).communicate(timeout=120)
    assert whole.returncode == 1, error
    assert "07.png" in error and "11.png cannot be read (Permission denied)" in error and "Traceback" not in error
    assert "… and 16 more" in out and "100%" in error
    killed, started = start("killed"), time.monotonic()
    while len(list(Path("killed").glob("*/result.json"))) < 8 and time.monotonic() < started + 120:
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert 8 <= len(list(Path("killed").glob("*/result.json"))) < 18
    out_again, error = (again := start("killed")).communicate(timeout=120)
    assert again.returncode == 1, error
    assert out_again == out.replace("in_one_go", "killed")
    assert tree(place / "killed") == tree(place / "in_one_go")
    assert len(results_in("killed")["pictures"]) == 18
