"""Clients of the stand-in for the Hub.

They are processes of their own, because `huggingface_hub` reads its settings when it is imported, and those of the
tests' own process say that there is no network.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from helpers.hub_server import HubServer
from helpers.warm_python import warm_python

ROOT = Path(__file__).parents[2]
CLIENT_TIMEOUT = 300  # seconds
SETTINGS_OF_THE_CALLER = re.compile("(HF_|HUGGINGFACE_|TRANSFORMERS_).*|.*_PROXY", re.IGNORECASE)


def client_environment(server: HubServer, cache: str | Path, **settings: str) -> dict[str, str]:
    """The environment of a user of `server` with a token, and with further `settings`."""
    environment = {name: value for name, value in os.environ.items() if not SETTINGS_OF_THE_CALLER.fullmatch(name)} | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(cache),
        "HF_TOKEN": "token-of-someone",
        "HF_HUB_DISABLE_XET": "1",  # so that large files are uploaded by LFS
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else `datasets` reports to another server what it loads
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),  # with `-I`, Python ignores it and the working folder
    }
    return environment | settings


def run_client(
    code: str, server: HubServer, folder: Path, isolated: bool = True, cache: Path | None = None, **settings: str
) -> str:
    """Run Python code in `folder` as a user of `server` with a token; return what it prints.

    `isolated` code cannot import the repository's modules. The cache is empty, unless one of an earlier run is given.
    An AssertionError is raised if the code fails.
    """
    command = [warm_python(), *(["-I"] if isolated else []), "-c", code]
    with tempfile.TemporaryDirectory() as empty:
        environment = client_environment(server, cache or empty, **settings)
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=CLIENT_TIMEOUT)
    assert run.returncode == 0, run.stderr.decode()
    return run.stdout.decode()
