"""What the processes of a run do together, so that none waits for one that has ended."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils import gather_object

Result = TypeVar("Result")


def in_all_processes(action: Callable[[], Result]) -> Result:
    """Run `action` in every process; if it raises a ValueError or OSError in one, all raise it."""
    result, error = None, None
    try:
        result = action()
    except (ValueError, OSError) as raised:
        error = raised
    messages = gather_object([(isinstance(error, OSError), str(error)) if error else None])
    if error is not None:
        raise error
    for message in filter(None, messages):
        raise (OSError if message[0] else ValueError)(message[1])
    return result


def leave_process_group() -> None:
    """Leave the process group in good order: its threads would still run while the interpreter exits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
