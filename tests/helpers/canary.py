"""A folder in which nobody may open a file, code that nobody may run, and how hostile records are drawn."""

import os
import sys
from contextlib import contextmanager

import PIL.Image
from hypothesis import HealthCheck, Phase, settings

from .refer_folder import HEIGHT, WIDTH, A, pixels

_guarded: tuple[str, int] | None = None  # folder, and file to write to when something in it is opened
_hooks = []


def _guard(event, arguments):
    if _guarded and event == "open" and isinstance(arguments[0], str):
        if os.path.realpath(arguments[0].replace("\0", "")).startswith(_guarded[0]):
            os.write(_guarded[1], arguments[0].encode() + b"\n")


@contextmanager
def guarded(folder, opened):
    """Make a folder with a photograph and a mask, and note in the file `opened` whoever opens them.

    There is one such folder at a time. It is guarded in processes that are forked meanwhile, too.
    """
    global _guarded
    if not _hooks:
        sys.addaudithook(_guard)  # there is no way to remove it
        _hooks.append(_guard)
    folder.mkdir()
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "canary.jpg")
    PIL.Image.fromarray(pixels(A)).save(folder / "canary.png")
    descriptor = os.open(opened, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _guarded = (str(folder), descriptor)
    try:
        yield opened
    finally:
        _guarded = None
        os.close(descriptor)


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def fuzz_settings(calls):
    """Settings that call a test so often, each time with many records, in the same way in each run."""
    return settings(
        max_examples=calls,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # a call tells which record it was; making it smaller would take minutes
        suppress_health_check=list(HealthCheck),
    )
