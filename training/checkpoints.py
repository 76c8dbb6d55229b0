"""Checkpoints of a run: which files a whole one has, which is the newest, and what is wrong with one that is not."""

import logging
import re
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from checkpoint_files import check_shapes, first_not_finite, saved_shapes, shapes_of
from configuration_detris import one_line
from data.untrusted import load_json

LAST = "last"  # what --resume_from_checkpoint may say in the place of a folder
RNG_STATE = "rng_state"
CONTENT = {  # what each of the files that torch.save writes must hold
    OPTIMIZER_NAME: {"state", "param_groups"},
    SCHEDULER_NAME: {"last_epoch"},
    SCALER_NAME: {"scale"},
    RNG_STATE: {"python", "numpy", "cpu"},
}
REMEDY = "resume from another checkpoint, or start anew in another output_dir"

logger = logging.getLogger(__name__)


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name, None if the name is no checkpoint's."""
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def checkpoints_in(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, the newest last."""
    found = [path for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=step_of)


def newest_whole_checkpoint(run: Path, adapter_only: bool) -> tuple[Path, list[Path]]:
    """The newest checkpoint in a run's folder of which no file is missing or broken, and the newer ones.

    Raises:
        ValueError: there is no whole checkpoint.
    """
    broken = []
    for checkpoint in reversed(checkpoints_in(run)):
        try:
            check_whole(checkpoint, adapter_only)
            return checkpoint, broken
        except ValueError as error:
            logger.warning(f"{checkpoint} is passed over: {error}")
            broken.append(checkpoint)
    raise ValueError(
        f"There is no whole checkpoint to resume from in {run}: name the folder of one, or start without "
        "resume_from_checkpoint."
    )


def read_state(checkpoint: Path) -> TrainerState:
    """What Trainer noted in a checkpoint; raises ValueError if that cannot be read."""
    path = _regular_file(checkpoint / TRAINER_STATE_NAME)
    try:
        state = TrainerState.load_from_json(str(path))
        if not isinstance(state.global_step, int) or state.global_step < 1:
            raise ValueError(f"global_step is {state.global_step!r}")
    except (ValueError, TypeError, RecursionError) as error:  # broken JSON is a ValueError
        raise ValueError(f"{path} is broken ({one_line(error)}): {REMEDY}.") from error
    return state


def check_whole(checkpoint: Path, adapter_only: bool) -> None:
    """Refuse a checkpoint if a file that training goes on from is missing, cut, empty or broken.

    Args:
        adapter_only: if there are no weights at all, the message says that the adapters' file is missing, not the
            whole model's.

    Raises:
        ValueError: names the file.
    """
    if not checkpoint.is_dir():
        raise ValueError(
            f"{checkpoint} is no folder: resume from a folder {PREFIX_CHECKPOINT_DIR}-<step>, or `{LAST}`."
        )
    read_state(checkpoint)
    check_model_files(checkpoint, adapter_only)
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
        _check_saved_by_torch(checkpoint / name, CONTENT[name])
    if (checkpoint / SCALER_NAME).exists():
        _check_saved_by_torch(checkpoint / SCALER_NAME, CONTENT[SCALER_NAME])
    for name in _rng_states_in(checkpoint) or [f"{RNG_STATE}.pth"]:
        _check_saved_by_torch(checkpoint / name, CONTENT[RNG_STATE])


def check_fits_run(checkpoint: Path, processes: int, fp16: bool, with_best: bool) -> None:
    """Refuse a whole checkpoint if resuming from it would not reproduce the run that saved it.

    Args:
        processes: the number of this run's processes.
        fp16: whether this run scales its loss.
        with_best: whether the best model so far is loaded at the end, so that its checkpoint must be whole, too.

    Raises:
        ValueError: names what does not fit.
    """
    found, wanted = _rng_states_in(checkpoint), _rng_states_of(processes)
    if found != wanted:
        raise ValueError(
            f"{checkpoint} has the random states of {len(found)} processes ({', '.join(sorted(found))}), but this run "
            f"has {processes}, which would draw other numbers: start as many as the run began with, or restore the "
            f"{RNG_STATE} files that are missing."
        )
    if fp16 != (checkpoint / SCALER_NAME).exists():
        has, switch = ("no ", "without") if fp16 else ("a ", "with")
        raise ValueError(f"{checkpoint} has {has}{SCALER_NAME}: go on {switch} --fp16, as the run began.")
    best = best_model_of(checkpoint, read_state(checkpoint)) if with_best else None
    if best is not None:
        check_model_files(best, adapter_only=False)


def best_model_of(checkpoint: Path, state: TrainerState) -> Path | None:
    """The best checkpoint so far, beside this one if it is there, because the run's folder may have moved."""
    if state.best_model_checkpoint is None:
        return None
    recorded = Path(state.best_model_checkpoint)
    beside = checkpoint.parent / recorded.name
    return beside if beside.is_dir() else recorded


def check_model_files(folder: Path, adapter_only: bool) -> None:
    """Raise a ValueError if one of the whole model's safetensors files in `folder`, or of the adapters', is broken."""
    whole = [name for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME) if (folder / name).exists()]
    if any((folder / name).exists() for name in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)):
        names, configs = [ADAPTER_SAFE_WEIGHTS_NAME], [CONFIG_NAME, ADAPTER_CONFIG_NAME]
    elif adapter_only and not whole:
        names, configs = [ADAPTER_SAFE_WEIGHTS_NAME], [CONFIG_NAME]
    elif whole == [SAFE_WEIGHTS_INDEX_NAME]:
        names = _shards(folder / SAFE_WEIGHTS_INDEX_NAME)
        configs = [CONFIG_NAME]
    else:
        names, configs = [SAFE_WEIGHTS_NAME], [CONFIG_NAME]
    for name in configs:
        _read_json(folder / name)
    for name in names:
        path = _regular_file(folder / name)
        try:
            with safe_open(path, "pt"):  # compares the header with the file's length
                pass
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # safetensors' own has no other base
            raise ValueError(f"{path} is broken ({one_line(error)}): {REMEDY}.") from error


def _shards(path: Path) -> list[str]:
    """The files beside an index that hold the tensors it lists."""
    shards = _read_json(path).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{path} is broken (it names no files beside it): {REMEDY}.")
    return sorted(set(names))


def check_tensors(checkpoint: Path, model: nn.Module) -> None:
    """Refuse a checkpoint's whole model if a tensor of `model` is missing there, unknown or of another shape."""
    check_model_files(checkpoint, adapter_only=False)
    try:
        saved = saved_shapes(checkpoint, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        check_shapes(saved, shapes_of(model.state_dict()), "Resume with the arguments that the run began with.")
    except ValueError as error:
        raise ValueError(f"{checkpoint} is of another model: {error}") from error


def stop_if_not_finite(model: nn.Module, where: str) -> None:
    """Raise a FloatingPointError that names the first of the model's tensors with a value that is not finite."""
    name = first_not_finite(model.state_dict())
    if name is not None:
        raise FloatingPointError(
            f"{name} is not finite {where}. Lower the learning rate, or try bf16 or fp32 for fp16, and go on from "
            "the last checkpoint."
        )


def _rng_states_in(checkpoint: Path) -> set[str]:
    return {path.name for path in checkpoint.glob(f"{RNG_STATE}*.pth")}


def _rng_states_of(processes: int) -> set[str]:
    return {f"{RNG_STATE}_{index}.pth" for index in range(processes)} if processes > 1 else {f"{RNG_STATE}.pth"}


def _regular_file(path: Path) -> Path:
    if not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{path} is {'no regular file' if path.exists() else 'missing'}: {REMEDY}.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: {REMEDY}.")
    return path


def _read_json(path: Path) -> dict:
    _regular_file(path)
    try:
        content = load_json(path)
    except ValueError as error:  # its own remedy is meant for data
        raise ValueError(f"{path} is broken ({one_line(error.__cause__)}): {REMEDY}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is broken (it is not a JSON object): {REMEDY}.")
    return content


def _check_saved_by_torch(path: Path, keys: set[str]) -> None:
    _regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its parts are compressed, as torch.save does not")
            if (part := archive.testzip()) is not None:
                raise ValueError(f"{part} in it has changed")
        with safe_globals():
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(content, dict) or keys - content.keys():
            raise ValueError(f"it does not hold {', '.join(sorted(keys))}")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the errors that torch raises for damage have no common base
        reason = one_line(str(error).partition("\n")[0])  # its other lines give advice to programmers
        raise ValueError(f"{path} is broken ({reason}): {REMEDY}.") from error
