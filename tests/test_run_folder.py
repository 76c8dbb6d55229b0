"""The folder of a run: one run at a time, and never two runs' files in it."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from train_hf import main, run_as_program
from training.run_folder import PrepareFolderOnTrainBegin, check_unused, clear, locked

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(config_file):
    """Of a run of two steps with a checkpoint at each."""
    return [config_file, "--do_train", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"] + [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


# --- older runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left", ["checkpoint-7", "model.safetensors", "adapter_model.safetensors", "all_results.json"]
)
def test_a_folder_with_an_older_run_is_refused_before_anything_is_loaded(arguments, tmp_path, monkeypatch, left):
    run = tmp_path / "run"
    (run / "checkpoint-7").mkdir(parents=True) if left == "checkpoint-7" else run.mkdir()
    if left != "checkpoint-7":
        (run / left).write_text("older")
    monkeypatch.setattr("train_hf.load_rows", None)
    with pytest.raises(
        ValueError, match=f"/run holds an older run .{left}.: .*another --output_dir.*--overwrite"
    ) as no:
        main(arguments)
    assert ("--resume_from_checkpoint last" in str(no.value)) == (left == "checkpoint-7")
    assert "\n" not in str(no.value) and (run / left).exists()


@pytest.mark.slow
def test_a_run_that_may_overwrite_gives_what_it_gives_in_a_fresh_folder(arguments, tmp_path):
    """The older run's best checkpoint, of step 1, had a better figure than any of the newer one's."""
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    arguments += ["--do_predict", "--test_splits", "val", "--max_eval_samples", "3"]
    older = [*arguments[:-4], "--test_splits", "testA", "--max_eval_samples", "2", "--seed", "1", "--max_steps", "3"]
    main([*arguments, "--output_dir", str(fresh)])
    main(older)
    (run / "notes.txt").write_text("mine")
    main([*arguments, "--overwrite_output_dir"])
    assert {path.name for path in run.iterdir()} == {path.name for path in fresh.iterdir()} | {"notes.txt"}
    assert [path.name for path in (run / "predictions").iterdir()] == ["val"]
    assert equal(weights(run), weights(fresh))
    for step in (1, 2):
        assert equal(weights(run / f"checkpoint-{step}"), weights(fresh / f"checkpoint-{step}"))
    expected, found = (json.loads((folder / "all_results.json").read_text()) for folder in (fresh, run))
    assert expected.keys() == found.keys() and found["val_mean_iou"] == expected["val_mean_iou"]

    # To go on with it, or to evaluate into it, is no mixture.
    main([*arguments, "--max_steps", "3", "--resume_from_checkpoint", "last", "--overwrite_output_dir"])
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}  # the best, the last
    main([*arguments, "--do_train", "false", "--do_eval"])


def test_what_a_run_starts_from_is_not_overwritten(arguments, tmp_path, monkeypatch):
    run = tmp_path / "run"
    main(arguments)
    monkeypatch.setattr("train_hf.load_rows", None)
    for source in (run, run / "checkpoint-2"):
        again = ["--model_name_or_path", str(source), "--output_dir", str(run), "--do_train", "--overwrite_output_dir"]
        with pytest.raises(ValueError, match=f"would delete {source}, which this run starts from"):
            main([*again, "--report_to", "none"])
    assert (run / "model.safetensors").exists()
    other = shutil.copytree(run / "checkpoint-2", tmp_path / "other" / "checkpoint-2")
    with pytest.raises(ValueError, match="/run holds an older run"):
        main([*arguments, "--resume_from_checkpoint", str(other)])
    with pytest.raises(
        ValueError, match="/run holds checkpoint-2, which is newer than checkpoint-1: resume from `last`"
    ):
        main([*arguments, "--resume_from_checkpoint", str(run / "checkpoint-1")])


def test_a_start_that_fails_deletes_nothing(arguments, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(ValueError, match="'trian' does not exist"):
        main([*arguments, "--overwrite_output_dir", "--train_split", "trian"])
    assert (run / "checkpoint-7").exists()


@pytest.mark.slow
@pytest.mark.parametrize("other", ["model", "optimizer"])
def test_a_checkpoint_of_another_run_is_refused_in_a_sentence_before_the_older_run_is_deleted(
    arguments, tmp_path, monkeypatch, capsys, other
):
    run, start = tmp_path / "run", tmp_path / "start"
    main([*arguments, "--output_dir", str(start), "--max_steps", "1"])
    main(arguments)
    before = sorted(run.rglob("*"))
    path, name = start / "checkpoint-1" / "optimizer.pt", "mask_head.output_projection.weight"
    if other == "model":
        path = start / "checkpoint-1" / "model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})
    else:
        state = torch.load(path)
        del state["state"][0]
        torch.save(state, path)
    resume = ["--resume_from_checkpoint", str(start / "checkpoint-1"), "--overwrite_output_dir"]
    monkeypatch.setattr(sys, "argv", ["train_hf.py", *arguments, *resume])
    with pytest.raises(SystemExit) as ended:
        run_as_program()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in told
    assert re.search(name if other == "model" else "optimizer.pt .*is of another model", told.splitlines()[-1])
    assert sorted(run.rglob("*")) == before


def test_an_older_run_is_deleted_once_though_training_begins_again(tmp_path):
    """With auto_find_batch_size it begins again after it has saved checkpoints of its own."""
    args, state, control = TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl()
    begin = PrepareFolderOnTrainBegin(True, [])
    (tmp_path / "checkpoint-1").mkdir()
    begin.on_train_begin(args, state, control)
    assert not (tmp_path / "checkpoint-1").exists()
    (tmp_path / "checkpoint-1").mkdir()
    begin.on_train_begin(args, state, control)
    assert (tmp_path / "checkpoint-1").exists()


def test_what_a_killed_deletion_has_left_is_no_run(tmp_path, monkeypatch):
    """Killed between two checkpoints of an older run, whose rest would be resumed from."""
    for name in ("checkpoint-1", "checkpoint-2", "predictions"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: path.rmdir() if path.name == "checkpoint-1" else os._exit(9))
        child = os.fork()
        if not child:
            clear(tmp_path)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "checkpoint-2").exists() and not (tmp_path / "checkpoint-1").exists()
    with locked(tmp_path):
        check_unused(tmp_path, False, ())
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", ".lock"}


# --- one run at a time --------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_lives(arguments, tmp_path, monkeypatch):
    run = tmp_path / "run"
    read, write = os.pipe()
    first = os.fork()
    if not first:
        with locked(run):
            os.write(write, b"held")
            signal.pause()
    assert os.read(read, 4) == b"held"
    with monkeypatch.context() as patch:
        patch.setattr("train_hf.load_rows", None)
        for task in ([], ["--do_train", "false", "--do_eval"], ["--resume_from_checkpoint", "last"]):
            with pytest.raises(ValueError, match="Another run is at work in .*/run: wait until it has ended"):
                main([*arguments, *task])
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    main(arguments)
    assert (run / "model.safetensors").exists()


def test_the_lock_is_let_go_where_a_run_fails(arguments):
    for _ in range(2):
        with pytest.raises(ValueError, match="'trian' does not exist"):
            main([*arguments, "--train_split", "trian"])


@pytest.mark.parametrize("failing", ["mkdir", "open"])
def test_a_folder_that_cannot_be_written_is_noticed_at_the_start(arguments, tmp_path, monkeypatch, failing):
    monkeypatch.setattr("train_hf.load_rows", None)
    folder = tmp_path / "file" / "run"
    if failing == "mkdir":
        (tmp_path / "file").touch()
    else:  # as in a folder that may only be read, which root may write all the same
        folder.mkdir(parents=True)
        opened = os.open

        def refuse(path, flags, *args, **kwargs):
            if os.fspath(path).startswith(str(folder)) and flags & os.O_RDWR:
                raise PermissionError(13, "Permission denied", path)
            return opened(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=f"The output_dir {folder} cannot be written .*: name another one"):
        main([*arguments, "--output_dir", str(folder)])
