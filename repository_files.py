"""What folders and repositories on the Hub hold, and what goes wrong there in one sentence each.

Official checkpoints lie in folders and repositories as `.pth` files without a `config.json`. No loader reads them, so
whoever names such a place as a model is told which command converts them.
"""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

try:
    from .configuration_detris import MAX_REASON, one_line
except ImportError:
    if __package__:
        raise
    from configuration_detris import MAX_REASON, one_line

OFFICIAL_SUFFIX = ".pth"
MAX_LISTED = 20  # names of files in a message


@contextmanager
def hub_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Turn what `huggingface_hub` raises inside into one OSError whose sentence names the repository and a remedy.

    `RemoteEntryNotFoundError` passes, because only the caller knows what a missing file means.
    """
    try:
        yield
    except RemoteEntryNotFoundError:
        raise
    except GatedRepoError as error:
        raise OSError(
            f"{repository} is a gated repository on the Hub: ask for access on its page there, log in by `hf auth "
            "login`, and try again."
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{repository} is neither a folder here nor a repository on the Hub that you may read: check the name, "
            "and log in by `hf auth login` if the repository is private."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(
            f"{repository} has no revision {revision}: give a branch, a tag or a whole commit id of it."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        if is_offline_mode():
            raise OSError(
                f"{repository} is neither a folder here nor in the cache of the Hub, which is not asked because "
                "HF_HUB_OFFLINE is set: unset it, or give a folder."
            ) from error
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        problem = "answered with an error" if isinstance(cause, HfHubHTTPError) else "cannot be reached"
        raise OSError(
            f"{repository} is no folder here, and the Hub {problem} ({one_line(cause, MAX_REASON)}): check the "
            "network, or give a folder."
        ) from error


def require_repository_id(source: str) -> None:
    """Raise FileNotFoundError if `source`, which does not exist here, cannot be the id of a repository either."""
    try:
        huggingface_hub.utils.validate_repo_id(source)
        possible = not source.endswith(OFFICIAL_SUFFIX)
    except HFValidationError:
        possible = False
    if not possible:
        raise FileNotFoundError(f"{source} does not exist: give a folder, or a Hub id such as someone/detris-refcoco.")


def find_file(source: str, name: str, revision: str | None = None) -> str | None:
    """
    Find a file in a folder, or fetch it from a repository on the Hub into the cache.

    Returns:
        where it lies on this machine; `None` if the folder or repository has no such file.

    Raises:
        OSError: if there is no such repository, or it cannot be read.
    """
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.isfile(path) else None
    require_repository_id(source)
    try:
        with hub_errors(source, revision):
            return huggingface_hub.hf_hub_download(source, name, revision=revision)
    except RemoteEntryNotFoundError:
        return None


def official_checkpoints(source: str, revision: str | None = None) -> dict[str, int | None]:
    """
    List the `.pth` files in a folder or a repository on the Hub.

    Returns:
        `dict` from each file's path inside it to its size in bytes, or to `None` if the Hub does not tell.

    Raises:
        OSError: if there is no such repository, or it cannot be read.
    """
    if os.path.isdir(source):
        files = sorted(Path(source).glob(f"*{OFFICIAL_SUFFIX}"))
        return {file.name: file.stat().st_size for file in files if file.is_file()}
    require_repository_id(source)
    with hub_errors(source, revision):
        siblings = huggingface_hub.model_info(source, revision=revision, files_metadata=True).siblings or []
    return {file.rfilename: file.size for file in siblings if file.rfilename.endswith(OFFICIAL_SUFFIX)}


def listed(names: list[str] | dict[str, int | None]) -> str:
    """Names of files for a message: strangers chose them, and there may be many."""
    shown = ", ".join(one_line(name, MAX_REASON) for name in list(names)[:MAX_LISTED])
    return f"{shown} and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else shown


def conversion_command(source: str, name: str | None = None, revision: str | None = None) -> str:
    """The command that converts an official checkpoint: a file, or the one called `name` in a folder or repository."""
    if os.path.exists(source):
        words = [os.path.join(source, name) if name else source]
    else:
        words = [source, "--file", name or f"NAME{OFFICIAL_SUFFIX}"]
        words += ["--revision", revision] if revision else []
    return f"python convert_detris_checkpoint.py {shlex.join(words)} out/ --dataset refcoco/unc"


def refuse_official_checkpoints(source: str, revision: str | None = None) -> None:
    """Raise OSError with the command to run if a folder or repository without `config.json` holds `.pth` files."""
    names = list(official_checkpoints(source, revision))
    if names:
        command = one_line(conversion_command(source, names[0], revision))
        raise OSError(
            f"{source} holds official checkpoints and no config.json ({listed(names)}): convert one of them by "
            f"`{command}` and load what it writes."
        )
