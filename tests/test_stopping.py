"""SIGTERM and SIGINT in a run: what is saved, what is said, and that going on gives the numbers of a straight run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import SIZES, in_child
from helpers.warm_python import warm_python
from safetensors.torch import load_file

from train_hf import DetrisTrainer, main, run_as_program
from training.checkpoints import check_whole
from training.stopping import StopAtSignal

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(config_file):
    return [config_file, "--do_train", "--num_train_epochs", "2", "--logging_steps", "1", "--max_train_samples", "16"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("straight")


@pytest.fixture
def straight(arguments, kept):
    """The run that no signal stops."""
    if not (kept / "run").exists():
        main([*arguments, "--output_dir", str(kept / "run")])
    return kept / "run"


@pytest.fixture
def send(monkeypatch):
    """Sends a signal to this process in the `call`-th call of a method of the trainer."""

    def prepare(method: str, call: int, number: int) -> None:
        original, calls = getattr(DetrisTrainer, method), []

        def with_signal(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(DetrisTrainer, method, with_signal)

    return prepare


def history(run: Path) -> list[dict]:
    """Losses and figures that a run has logged, without its timings."""
    entries = json.loads((run / "trainer_state.json").read_text())["log_history"]
    timing = ("runtime", "per_second", "preparation_time", "total_flos", "train_loss")
    return [{key: value for key, value in entry.items() if not key.endswith(timing)} for entry in entries]


def stopped(arguments: list[str], number: int, capsys) -> str:
    """What a run says that a signal stops."""
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 128 + number
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, step, checkpoint",
    [
        (signal.SIGTERM, 2, 2),  # within an epoch
        (signal.SIGINT, 6, 6),
        (signal.SIGTERM, 4, None),  # where an evaluation is due, and nothing has been saved before
        (signal.SIGTERM, 8, 4),  # where one is due again
    ],
)
def test_a_stopped_run_goes_on_to_the_numbers_of_a_straight_one(
    arguments, straight, tmp_path, send, monkeypatch, capsys, number, step, checkpoint
):
    """16 objects in batches of 4, so 4 steps an epoch, which ends with an evaluation and a checkpoint."""
    run = tmp_path / "run"
    with monkeypatch.context():
        send("training_step", step, number)
        said = stopped(arguments, number, capsys)
        monkeypatch.undo()
    assert said.startswith(f"{signal.Signals(number).name} has stopped the training at step {step} of 8")
    if checkpoint is None:
        assert not list(run.glob("checkpoint-*")) and said.endswith("before its first checkpoint: start it again.")
        return
    assert said.endswith(f"from checkpoint-{checkpoint} by the same command with --resume_from_checkpoint last.")
    assert max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")) == checkpoint
    check_whole(run / f"checkpoint-{checkpoint}", False)
    assert not list(run.glob("*.safetensors"))
    main([*arguments, "--resume_from_checkpoint", "last"])
    assert history(run)[:-1] == history(straight)[:-1]
    expected, found = (load_file(folder / "model.safetensors") for folder in (straight, run))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_stop_between_epochs_without_evaluation_saves(arguments, tmp_path, send, capsys):
    arguments += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    send("training_step", 4, signal.SIGTERM)
    assert "go on from checkpoint-4" in stopped(arguments, signal.SIGTERM, capsys)
    check_whole(tmp_path / "run" / "checkpoint-4", False)


def test_the_only_checkpoint_is_kept_beside_the_best(arguments, tmp_path, send, capsys):
    """Where training ends, Trainer deletes all but the best if save_total_limit is 1."""
    send("training_step", 6, signal.SIGTERM)
    assert "go on from checkpoint-6" in stopped([*arguments, "--save_total_limit", "1"], signal.SIGTERM, capsys)
    assert (tmp_path / "run" / "checkpoint-6").exists()


@pytest.mark.slow
def test_an_evaluation_ends_at_its_next_batch(arguments, config_file, tmp_path, send, monkeypatch, capsys):
    """In training the last checkpoint is what remains, afterwards the model."""
    run, batches = tmp_path / "run", 2  # of val
    with monkeypatch.context():
        send("prediction_step", batches + 1, signal.SIGTERM)
        said = stopped([*arguments, "--max_eval_samples", "4"], signal.SIGTERM, capsys)
        monkeypatch.undo()
    assert "at step 8 of 8: go on from checkpoint-4" in said and not list(run.glob("*.safetensors"))
    main([*arguments, "--max_eval_samples", "4", "--resume_from_checkpoint", "last"])

    after = [config_file, "--do_train", "--do_predict", "--test_splits", "val", "--max_steps", "1", "--save_strategy"]
    after += ["no", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--output_dir", str(tmp_path / "b")]
    with monkeypatch.context():
        send("prediction_step", 2, signal.SIGINT)
        said = stopped(after, signal.SIGINT, capsys)
        monkeypatch.undo()
    assert f"the trained model is in {tmp_path / 'b'}: evaluate it with --model_name_or_path" in said
    assert (tmp_path / "b" / "model.safetensors").exists() and not (tmp_path / "b" / "table.txt").exists()
    send("prediction_step", 1, signal.SIGTERM)
    again = ["--model_name_or_path", str(tmp_path / "b"), "--output_dir", str(tmp_path / "c"), "--do_eval"]
    again += ["--shapes_config", json.dumps({"sizes": SIZES, "image_size": 48}), "--report_to", "none"]
    assert stopped(again, signal.SIGTERM, capsys) == "SIGTERM has stopped the evaluation: start it again."


def run_program(arguments: list[str], log: Path, monkeypatch, at_third_step: Callable[[], None]) -> int:
    """The exit status of `python train_hf.py` in a process group of its own; what it says is in `log`."""
    original, calls = DetrisTrainer.training_step, []

    def training_step(self, *args):
        calls.append(1)
        if len(calls) == 3:
            at_third_step()
        return original(self, *args)

    def program() -> None:
        os.setsid()
        with open(log, "w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)  # in the place of pytest's
        run_as_program()

    monkeypatch.setattr(DetrisTrainer, "training_step", training_step)
    monkeypatch.setattr(sys, "argv", ["train_hf.py", *arguments])
    return in_child(program)


def test_workers_outlive_a_signal_to_the_whole_group(arguments, tmp_path, monkeypatch):
    """As launchers and clusters send it; a loader's workers would die, and the run with them before it can save.

    Not sent by the main process itself, whom its workers obey.
    """

    def send() -> None:
        assert in_child(lambda: os.killpg(0, signal.SIGTERM)) == 0
        time.sleep(1)  # in which a dead worker would be noticed

    arguments += ["--dataloader_num_workers", "2", "--dataloader_persistent_workers"]
    status = run_program(arguments, tmp_path / "log", monkeypatch, send)
    assert status == 143 and "go on from checkpoint-3" in (tmp_path / "log").read_text()
    check_whole(tmp_path / "run" / "checkpoint-3", False)


def test_a_second_interrupt_ends_at_once(arguments, tmp_path, monkeypatch):
    def send() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    assert run_program(arguments, tmp_path / "log", monkeypatch, send) == -signal.SIGINT
    assert "has stopped" not in (tmp_path / "log").read_text()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_signal_that_comes_while_processes_agree_is_not_lost(monkeypatch):
    stop, args = StopAtSignal(), SimpleNamespace(world_size=2, device="cpu")
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: backend)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: stop._receive(signal.SIGTERM, None))
    assert not stop._agree(args)  # the others have not heard of it
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    assert stop._agree(args) and stop.received == signal.SIGTERM


def test_processes_agree_without_their_devices(monkeypatch):
    """On the device "meta" nothing can be read: a GPU would first do all its work."""
    stop, reduced = StopAtSignal(), []
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: backend)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor, op, group: reduced.append((tensor.device.type, group))
    )
    for _ in range(3):
        assert not stop._agree(SimpleNamespace(world_size=2, device="meta"))
    assert reduced == [("cpu", "gloo")] * 3


@pytest.mark.slow
def test_two_processes_stop_together(arguments, tmp_path):
    """Only the launcher gets the signal, as from a cluster; it hands it on, to each process at a time of its own."""
    launch = [warm_python(), "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", "train_hf.py"]
    launch += [*arguments, "--use_cpu", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "1000"]
    launch += ["--load_best_model_at_end", "false", "--num_train_epochs", "1000"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            launch, cwd=ROOT, env=os.environ | {"PYTHON_EXEC": warm_python()}, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 120
        while "'loss'" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
    said = (tmp_path / "log").read_text()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"SIGTERM has stopped the training at step {checkpoint.name.split('-')[1]} of 2000: go on" in said
    check_whole(checkpoint, False)
    assert {path.name for path in checkpoint.glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert len([entry for entry in state["log_history"] if "loss" in entry]) == state["global_step"]
