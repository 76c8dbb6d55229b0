"""What folders and repositories on the Hub hold, and what goes wrong there in one sentence each.

Official checkpoints lie in folders and repositories as `.pth` files without a `config.json`. No loader reads them, so
whoever names such a place as a model is told which command converts them.
"""

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import ResolvedRevision
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
    RevisionResolutionError,
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
            f"{repository} is neither on this machine nor a repository on the Hub that you may read: check the name, "
            "and log in by `hf auth login` if the repository is private."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(
            f"{repository} has no revision {revision}: give a branch, a tag or a whole commit id of it."
        ) from error
    # RuntimeError is what the Hub's storage of large files raises when a download breaks off.
    except (LocalEntryNotFoundError, RevisionResolutionError, OfflineModeIsEnabled, HTTPError, RuntimeError) as error:
        if is_offline_mode():
            raise OSError(
                f"{repository} is neither on this machine nor in the cache of the Hub, which is not asked because "
                "HF_HUB_OFFLINE is set: unset it, or name what is here."
            ) from error
        cause = error
        while isinstance(cause, (LocalEntryNotFoundError, RevisionResolutionError)) and cause.__cause__ is not None:
            cause = cause.__cause__
        problem = "answered with an error" if isinstance(cause, HfHubHTTPError) else "cannot be reached"
        raise OSError(
            f"{repository} is not on this machine, and the Hub {problem} ({one_line(cause, MAX_REASON)}): check the "
            "network and try again, or name what is here."
        ) from error


def may_be_repository(source: str) -> bool:
    """Whether `source` has the form of a Hub id. Names of checkpoint files have it too, and count as files."""
    try:
        huggingface_hub.utils.validate_repo_id(source)
    except HFValidationError:
        return False
    return not source.endswith(OFFICIAL_SUFFIX)


def require_repository_id(source: str) -> None:
    """Raise FileNotFoundError if `source`, which is not on this machine, cannot be the id of a repository either."""
    if not may_be_repository(source):
        raise FileNotFoundError(f"{source} does not exist: give a folder, or a Hub id such as someone/detris-refcoco.")


def find_commit(repository: str, revision: str | None = None) -> ResolvedRevision:
    """
    Find the commit that a branch or tag of a repository on the Hub is at; without a network, that in the cache.

    Whoever passes it on gets all files from one state of the repository, even if it changes meanwhile.

    Args:
        revision: branch, tag or commit; by default the main branch.

    Returns:
        `ResolvedRevision`, which the loaders of transformers and `huggingface_hub` take as a revision; the commit is
        its attribute `resolved`.

    Raises:
        OSError: if there is no such repository or revision, or the Hub cannot be reached.
    """
    require_repository_id(repository)
    with hub_errors(repository, revision):
        return huggingface_hub.resolve_revision(repository, revision=revision)


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


def official_checkpoints(
    source: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
) -> dict[str, int | None]:
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
    commit = getattr(revision, "resolved", revision)
    with hub_errors(source, revision):
        info = huggingface_hub.model_info(source, revision=commit, files_metadata=True, token=token)
    return {file.rfilename: file.size for file in info.siblings or [] if file.rfilename.endswith(OFFICIAL_SUFFIX)}


def list_names(names: Iterable[str]) -> str:
    """Names of files for a message: strangers chose them, and there may be many."""
    names = list(names)
    shown = ", ".join(one_line(name, MAX_REASON) for name in names[:MAX_LISTED])
    return f"{shown} and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else shown


def conversion_command(source: str, name: str | None = None, revision: str | None = None) -> str:
    """The command that converts an official checkpoint: a file, or the one called `name` in a folder or repository."""
    if os.path.exists(source):
        words = [os.path.join(source, name) if name else source]
    else:
        words = [source, "--file", name or f"NAME{OFFICIAL_SUFFIX}"]
        words += ["--revision", revision] if revision else []
    return f"python convert_detris_checkpoint.py {shlex.join(words)} out/ --dataset refcoco/unc"


def refuse_official_checkpoints(
    source: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
) -> None:
    """Raise OSError with the command to run if a folder or repository without `config.json` holds `.pth` files."""
    try:
        names = list(official_checkpoints(source, revision, token))
    except OSError:  # such as no network: then the caller says what is missing
        return
    if names:
        asked = getattr(revision, "initial", revision)  # not the commit that it was at
        command = one_line(conversion_command(os.fspath(source), names[0], asked))
        raise OSError(
            f"{source} holds official checkpoints and no config.json ({list_names(names)}): convert one of them by "
            f"`{command}` and load what it writes."
        )
