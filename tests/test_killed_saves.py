"""A run is killed while it saves: going on gives the straight run's numbers or a refusal, never other numbers."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.runs import in_child, losses

from train_hf import DetrisTrainer
from training.run_folder import CLEARING, PrepareFolderOnTrainBegin, check_unused, find_checkpoint, locked

MOMENTS = 10
REFUSED = 3

pytestmark = pytest.mark.usefixtures("one_thread")


def count_changes(folder: Path, at_change: Callable[[Path | None], None]) -> None:
    """From here on, call `at_change` before each change to the folder's files, and with each large file just written.

    A run that deletes an older one has begun when the older one is marked as deleted; what is before does not count.
    """
    begun = not any(folder.glob("checkpoint-*"))
    change = at_change

    def at_change(path: Path | None) -> None:
        nonlocal begun
        begun = begun or (folder / CLEARING).exists()
        if begun:
            change(path)

    def hook(event: str, args: tuple) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            at_change(None)
        elif event == "open" and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(str(folder)):
            if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
                at_change(None)

    def in_halves(write: Callable, path_at: int) -> Callable:
        def writing(*args, **kwargs):
            at_change(None)
            write(*args, **kwargs)
            at_change(Path(args[path_at]))

        return writing

    sys.addaudithook(hook)
    torch.save = in_halves(torch.save, 1)
    safetensors.torch.serialize_file = in_halves(safetensors.torch.serialize_file, 1)


def train(trainer: DetrisTrainer, run: Path, result: Path, resumed: bool = False) -> None:
    """What `main` does with the run's folder, and how the training ends; exits with `REFUSED` where it is refused."""
    with locked(run):
        if resumed:
            trainer.args.resume_from_checkpoint = "last"
            try:
                checkpoint, broken = find_checkpoint(trainer.args)
            except ValueError:
                sys.exit(REFUSED)
            trainer.args.resume_from_checkpoint = str(checkpoint)
        else:
            check_unused(run, True, ())
            broken = []
        trainer.add_callback(PrepareFolderOnTrainBegin(not resumed, broken))
        trainer.train(trainer.args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
    torch.save({"losses": losses(trainer), "weights": trainer.model.state_dict()}, result)


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("adapter_only", [False, True], ids=["whole", "adapter only"])
def test_a_killed_save_leads_to_the_straight_runs_numbers_or_a_refusal(make_trainer, tmp_path, adapter_only, used):
    """The used folder holds a longer run from another start, with a checkpoint at each step."""
    run, kept, result = tmp_path / "run", tmp_path / "kept", tmp_path / "result.pt"
    options = {"save_strategy": "steps", "save_steps": 1, "save_adapter_only": adapter_only}
    if used:
        make_trainer(max_steps=3, seed=1, **options).train()
    run.mkdir(exist_ok=True)
    run.rename(kept)
    trainer = make_trainer(max_steps=2, **options)  # each child trains a copy of it

    def renew() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(kept, run)

    changes = tmp_path / "changes"

    def counted() -> None:
        number = []
        count_changes(run, lambda path: number.append(1))
        train(trainer, run, result)
        changes.write_text(str(len(number)))

    renew()
    assert in_child(counted) == 0
    expected = torch.load(result)
    assert len(expected["losses"]) == 2
    total = int(changes.read_text())
    assert total > 50
    resumed = []
    for moment in range(MOMENTS):
        deadly = 1 + moment * (total - 2) // (MOMENTS - 1)

        def killed(deadly: int = deadly) -> None:
            number = []

            def at_change(path: Path | None) -> None:
                number.append(1)
                if len(number) == deadly:
                    if path is not None:
                        os.truncate(path, path.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)

            count_changes(run, at_change)
            train(trainer, run, result)

        renew()
        result.unlink(missing_ok=True)
        assert in_child(killed) == -signal.SIGKILL and not result.exists()
        status = in_child(lambda: train(trainer, run, result, resumed=True))
        resumed.append(status == 0)
        if status == 0:
            found = torch.load(result)
            assert found["losses"] == expected["losses"], deadly
            assert all(torch.equal(found["weights"][name], value) for name, value in expected["weights"].items())
        else:
            assert status == REFUSED and not result.exists(), deadly
    assert resumed == sorted(resumed) and sum(resumed) >= MOMENTS // 3  # refused where nothing was whole yet
