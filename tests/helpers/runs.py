"""What tests of runs share: a model of a few thousand parameters, and how many synthetic images it sees.

`conftest.py` has the fixtures that put them together.
"""

import gc
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

SIZES = {"train": 14, "val": 4, "testA": 3, "testB": 0, "unseen": 0}
MODEL_CONFIG = {
    "vision_adapter_layers": [1],
    "vision_adapter_dim": 16,
    "text_adapter_layers": [0],
    "text_adapter_dim": 16,
    "aligner_attention_dim": 16,
    "aligner_attention_heads": 2,
    "feature_layers": [0, 1],
    "decoder_dim": 16,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "decoder_ffn_dim": 16,
    "mask_threshold": 0.1,  # after a few steps the model then segments parts of the images
}


def losses(trainer) -> list[float]:
    """What a Trainer has logged at each of its steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_child(action: Callable[[], None]) -> int:
    """Do `action` in a process that is this one's copy; return its exit status, negative if a signal has ended it."""
    return ended(start_child(action))


def start_child(action: Callable[[], None]) -> int:
    """Begin `action` in a process that is this one's copy, and return its id."""
    child = os.fork()
    if not child:
        status = 1
        gc.freeze()  # to look through what was there before would take longer than a short run
        try:
            action()
            status = 0
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """Wait until a process has ended; return its exit status, negative if a signal has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_processes(count: int, folder: Path, action: Callable[[int], None]) -> None:
    """Do `action`, which is given its rank, in so many copies of this process, which form a group over gloo.

    Args:
        folder: where the processes find each other.
    """

    def act(rank: int) -> None:
        store, patience = torch.distributed.FileStore(str(folder / "store"), count), timedelta(seconds=60)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=patience)
        action(rank)
        if torch.distributed.is_initialized():  # a Trainer leaves the group when it ends
            torch.distributed.destroy_process_group()

    children = [start_child(partial(act, rank)) for rank in range(count)]
    assert [ended(child) for child in children] == [0] * count
