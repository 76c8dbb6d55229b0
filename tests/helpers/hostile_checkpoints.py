"""Checkpoints that claim anything, written byte by byte, and a process of little memory and time that reads them."""

import ast
import os
import pickle
import re
import subprocess
import zipfile
from pathlib import Path

from helpers.warm_python import warm_python

ROOT = Path(__file__).parents[2]
SECONDS, BYTES = 5, 2**30  # that a hostile file may take


def integer(number: int) -> bytes:
    """The opcode that puts an integer on a pickle's stack."""
    return pickle.dumps(number, protocol=2)[2:-1]


def text(value: str) -> bytes:
    """The opcode that puts text on a pickle's stack."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tensor(shape=(4,), stride=(1,), offset=0, numel=4, key="0", dtype="Float") -> bytes:
    """The opcodes of a tensor, with any claims about it."""
    shape, stride = (b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (shape, stride))
    storage = text("storage") + f"ctorch\n{dtype}Storage\n".encode() + text(key) + text("cpu") + integer(numel)
    arguments = b"(" + storage + b"tQ" + integer(offset) + shape + stride + b"\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state_dict(*values: bytes) -> bytes:
    """The pickle of a state dict with the names t0, t1, …"""
    return b"\x80\x02}(" + b"".join(text(f"t{index}") + value for index, value in enumerate(values)) + b"u."


def write_archive(path, content: bytes, storage=bytes(16), compression=zipfile.ZIP_STORED, **others: bytes) -> None:
    """Write what `torch.save` writes: an archive of a pickle, one storage, and further entries by name."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/data/0", storage)
        for name, data in others.items():
            archive.writestr(name, data)


READ_ALL = f"""
import resource, sys, time
from checkpoint_files import read_tensors
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + {BYTES},) * 2)
for path in sys.argv[1:]:
    start = time.monotonic()
    try:
        read_tensors(path)
        print("was read")
    except Exception as error:
        print(type(error).__name__, time.monotonic() - start, repr(str(error)))
"""


def assert_refused(paths: list[Path], said: dict[str, str], cwd: Path) -> None:
    """Each file is refused soon, by one sentence, in a process that has little memory.

    Args:
        said: what the sentence must match, by the name of each file's case.
    """
    run = subprocess.run(
        [warm_python(), "-c", READ_ALL, *map(str, paths)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=SECONDS * len(paths),
    )
    wrong = []
    for (name, expected), line in zip(said.items(), run.stdout.splitlines(), strict=True):
        kind, seconds, sentence = line.split(" ", 2)
        sentence = ast.literal_eval(sentence)
        one_sentence = re.search(expected, sentence) and "\n" not in sentence and len(sentence) < 1500
        if kind not in ("ValueError", "OSError", "FileNotFoundError") or float(seconds) > SECONDS or not one_sentence:
            wrong.append((name, line[:400]))
    assert wrong == []
