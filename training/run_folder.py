"""A run's folder: one run at a time, and never two runs' files in it."""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .arguments import DetrisTrainingArguments
from .checkpoints import (
    LAST,
    check_fits_run,
    check_whole,
    checkpoints_in,
    newest_whole_checkpoint,
    read_state,
    step_of,
)
from .processes import in_all_processes

LOCK = ".lock"
UNFINISHED = ".unfinished"  # where a checkpoint is written until it is whole
CLEARING = ".clearing"  # marks a deletion in progress; `locked` finishes it
BROKEN = "broken-"  # before the name of a checkpoint that is set aside
RUN_FILES = (
    "checkpoint-*",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "trainer_state.json",
    "all_results.json",
)
RESULT_FILES = ("adapter_config.json", "*_results.json", "predictions", "report.html")
RESULT_FILES += ("table.txt", "table.md", "table.json")

logger = logging.getLogger(__name__)


def lock_run_folder(
    args: DetrisTrainingArguments, sources: Iterable[str | None], stack: ExitStack
) -> "PrepareFolderOnTrainBegin":
    """Lock the output folder for this run and find the checkpoint to resume from.

    Afterwards `args.resume_from_checkpoint` is the path of the checkpoint, if there is one.

    Args:
        sources: the folders, files and Hub ids that the model is made from; they may not be deleted.
        stack: closing it releases the folder.

    Returns:
        The callback that prepares the folder when training begins.

    Raises:
        ValueError: another run is at work there, an older one is in the way, or the checkpoint does not fit.
        OSError: the folder cannot be written.
    """
    output_dir, broken = Path(args.output_dir), []
    in_all_processes(lambda: stack.enter_context(locked(output_dir, args.should_save)))
    if args.resume_from_checkpoint:
        found, broken = in_all_processes(lambda: find_checkpoint(args))
        args.resume_from_checkpoint = str(found)
    checkpoint = args.resume_from_checkpoint
    goes_on = bool(checkpoint) and lies_in(checkpoint, output_dir)
    if args.do_train and not goes_on:
        in_all_processes(lambda: check_unused(output_dir, args.overwrite_output_dir, (*sources, checkpoint)))
    return PrepareFolderOnTrainBegin(args.overwrite_output_dir and not goes_on, broken)


@contextmanager
def locked(folder: Path, main_process: bool = True) -> Iterator[None]:
    """Hold the folder for this run; the operating system lets it go when the process ends, however it ends.

    Args:
        main_process: whether this process is the one that holds it for all.

    Raises:
        ValueError: another run has it.
        OSError: it cannot be written.
    """
    if not main_process:
        yield
        return
    lock = filelock.FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(
            f"Another run is at work in {folder}: wait until it has ended, or name another output_dir."
        ) from None
    except OSError as error:
        raise OSError(f"The output_dir {folder} cannot be written ({error}): name another one.") from error
    try:
        if (folder / CLEARING).exists():
            clear(folder)
        yield
    finally:
        lock.release()


def check_unused(folder: Path, overwrite: bool, sources: Iterable[str | None]) -> None:
    """Refuse to begin a run where an older one's checkpoints or model are.

    Args:
        overwrite: they may be deleted.
        sources: what the run starts from, which may not be deleted.

    Raises:
        ValueError: names the folder and what to do.
    """
    older = _in_folder(folder, RUN_FILES)
    if not older:
        return
    if not overwrite:
        names = ", ".join(path.name for path in older[:3]) + (" and more" if len(older) > 3 else "")
        go_on = f"go on with it by --resume_from_checkpoint {LAST}, " if checkpoints_in(folder) else ""
        raise ValueError(
            f"{folder} holds an older run ({names}): {go_on}name another --output_dir, or give --overwrite_output_dir "
            "to delete it."
        )
    for source in filter(None, sources):
        path = Path(source).resolve()
        if path.exists() and folder.resolve() in (path, *path.parents):
            raise ValueError(
                f"overwrite_output_dir would delete {source}, which this run starts from: name another output_dir."
            )


def clear(folder: Path) -> None:
    """Delete an older run's files from the folder, and no others."""
    (folder / CLEARING).touch()
    for path in _in_folder(folder, (*RUN_FILES, *RESULT_FILES)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / CLEARING).unlink()


def find_checkpoint(args: DetrisTrainingArguments) -> tuple[Path, list[Path]]:
    """The checkpoint that `resume_from_checkpoint` means, which is known to lead to the same numbers.

    Returns:
        The checkpoint, and newer ones of the same run that are broken.

    Raises:
        ValueError: there is none, a file of it is missing or broken, or it does not fit this run.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint == LAST:
        checkpoint, broken = newest_whole_checkpoint(output_dir, args.save_adapter_only)
    else:
        checkpoint, broken = Path(args.resume_from_checkpoint), []
        check_whole(checkpoint, args.save_adapter_only)
    fp16 = args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16"  # as Trainer decides
    check_fits_run(checkpoint, args.world_size, fp16, args.load_best_model_at_end)
    if not lies_in(checkpoint, output_dir):
        return checkpoint, []
    step = read_state(checkpoint).global_step
    for newer in checkpoints_in(output_dir):
        if step_of(newer) <= step or newer in broken:
            continue
        try:
            check_whole(newer, args.save_adapter_only)
        except ValueError:
            broken.append(newer)
            continue
        raise ValueError(  # the run's next checkpoints would get mixed with it
            f"{output_dir} holds {newer.name}, which is newer than {checkpoint.name}: resume from `{LAST}`, delete "
            "it, or name another --output_dir."
        )
    return checkpoint, broken


def set_aside(checkpoints: list[Path]) -> None:
    """Rename broken checkpoints, so that they no longer count as any, and nothing is written into them."""
    for checkpoint in checkpoints:
        target = checkpoint.with_name(BROKEN + checkpoint.name)
        shutil.rmtree(target, ignore_errors=True)
        checkpoint.rename(target)
        logger.warning(f"{checkpoint} is not whole and is called {target.name} now.")


class PrepareFolderOnTrainBegin(TrainerCallback):
    """Deletes an older run's files and sets broken checkpoints aside.

    Runs in `on_train_begin`: by then Trainer has accepted the checkpoint, so nothing can refuse the run.

    Args:
        clears: whether to delete an older run's files.
        broken: broken checkpoints that are newer than the one to resume from.
    """

    def __init__(self, clears: bool, broken: list[Path]):
        self.clears = clears
        self.broken = broken
        self.begun = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.should_save and not self.begun:  # with auto_find_batch_size it may begin again
            if self.clears:
                clear(Path(args.output_dir))
            set_aside(self.broken)
        self.begun = True


def _in_folder(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def put_in_place(written: Path, target: Path) -> None:
    """Rename a checkpoint that is whole now; delete what was in its place and the folder it was written in."""
    if target.exists():
        target.rename(written.with_name("replaced"))
    written.rename(target)
    shutil.rmtree(written.parent)


def lies_in(path: str | Path, folder: Path) -> bool:
    """Return whether the path, with links followed, is directly inside the folder."""
    return Path(path).resolve().parent == folder.resolve()
