"""A `python` that has imported torch already.

Most programs that the tests start need six seconds of a core for their imports, and far less for what they do. So a
server imports what they all need, once for each worker of pytest, and makes a copy of itself for each program. The
copy has the caller's arguments, environment, folder and standard streams, and ends as any Python does.

Nothing that is imported ahead reads settings of Hugging Face or belongs to this repository: a program reads its own
settings, and cannot see modules that it would not see otherwise. What a test kills, or starts with other rights, it
should start by `sys.executable`, because the program is not the caller's own child.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

IMPORTED = "torch torch._dynamo torch.distributed.tensor torch.distributed.checkpoint matplotlib.pyplot httpx2"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WITH_THIS_FILE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import warm_python
"""


@functools.cache
def _server() -> tuple[tempfile.TemporaryDirectory, subprocess.Popen]:
    """The folder of `python`, and its server, which ends with this process: nobody else can write to its input."""
    folder = tempfile.TemporaryDirectory(prefix="warm-python-")
    address, program = f"{folder.name}/socket", Path(folder.name, "python")
    program.write_text(f"#!{sys.executable} -IS{WITH_THIS_FILE}warm_python.ask({address!r})\n")
    program.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        serve = f"{WITH_THIS_FILE}warm_python.become(warm_python.serve({listener.fileno()}))"
        command = [sys.executable, "-I", "-c", serve]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        return folder, subprocess.Popen(command, **streams, cwd="/", pass_fds=[listener.fileno()])


def warm_python() -> str:
    """The path of a program that takes of Python's arguments `-I`, `-u`, `-c`, `-m` or a script, and what follows."""
    return f"{_server()[0].name}/python"


def ask(address: str) -> None:
    """Let the server start a program with this process's arguments, hand signals on to it, and end as it ends."""
    request = {"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
    message = json.dumps(request).encode()
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    socket.send_fds(server, [len(message).to_bytes(4)], [0, 1, 2])
    server.sendall(message)
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
    status = int(server.recv(16) or 1)
    if status < 0:
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(listener: int) -> dict:
    """Make a copy of this process for each program that is asked for; return, in the copy, what was asked for."""
    for name in IMPORTED.split():
        with contextlib.suppress(ImportError):  # not all versions of the libraries need the same
            importlib.import_module(name)
    gc.freeze()  # what is here needs not be looked through in each copy
    asking = socket.socket(fileno=listener)
    while True:
        if 0 in select.select([0, asking], [], [])[0]:
            os._exit(0)
        client, _ = asking.accept()
        if not os.fork():
            asking.close()
            return _in_child(client)
        client.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # the copies that have ended since
                pass


def _in_child(client: socket.socket) -> dict:
    """Return in a child what the client asks for; hand signals on to the child, and tell the client how it ended."""
    length, streams, _, _ = socket.recv_fds(client, 4, 3)
    request = json.loads(client.recv(int.from_bytes(length), socket.MSG_WAITALL))
    child = os.fork()
    if not child:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return request
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    ended = os.pidfd_open(child)
    while ended not in select.select([ended, client], [], [])[0]:
        os.kill(child, (client.recv(1) or bytes([signal.SIGKILL]))[0])  # without a client, nobody wants the program
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        client.send(str(status).encode())
    os._exit(0)


def become(request: dict) -> None:
    """Do in this process what Python does with these arguments, in this folder and environment."""
    sys.modules["numpy"].random.seed()  # the module `random` does so by itself
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    sys.path.remove(str(Path(__file__).parent))
    del sys.modules[__name__]
    first, *arguments = request["arguments"]
    options = set()
    while first in ("-I", "-u"):
        options.add(first)
        first, *arguments = arguments
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", 1 if "-u" in options else -1, closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)
    if "-I" not in options:
        here = {"-c": "", "-m": os.getcwd()}.get(first, os.path.dirname(os.path.realpath(first)))
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [here, *(os.path.abspath(path) for path in paths if path)]
    if first == "-c":
        code, *sys.argv[1:] = arguments
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    elif first == "-m":
        name, *sys.argv[1:] = arguments
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        runpy.run_path(first, run_name="__main__")
