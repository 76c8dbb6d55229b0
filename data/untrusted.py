"""What strangers wrote: paths that stay in their folder, JSON, YAML and text, and errors that name the record."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from configuration_detris import one_line, raise_if_out_of_memory, read_regular, require_regular, short_repr

MAX_FILE_NAME = 4_096  # characters of a file name or category
MAX_YAML = 100_000  # bytes; the recipes in configs/ have 2,000


# --- paths --------------------------------------------------------------------------------------------------------


def file_inside(folder: Path, name: str, *homes: Path) -> str:
    """The path of the file that a record calls `name`, whether the file exists or not.

    Args:
        folder: what the name is relative to.
        name: the file's name, as a stranger wrote it.
        homes: further folders that a link on the way may lead into.

    Raises:
        ValueError: the name is no relative path below the folder, or a link on the way leads out of folder and homes.
    """
    parts = Path(checked_text(name, "the file name", MAX_FILE_NAME)).parts
    if not parts or os.path.isabs(name) or ".." in parts:
        raise ValueError(f"{short_repr(name)} is not inside {folder}.")
    if "::" in name or "://" in name:  # `datasets` would open only what stands before or behind
        raise ValueError(f"{short_repr(name)} would be taken for an address; rename it without '::' and '://'.")
    path = os.fspath(folder)
    for part in parts:
        path = os.path.join(path, part)
        if os.path.islink(path):
            _refuse_link_outside(os.path.join(folder, *parts), folder, *homes)
    return path


def require_inside(path: str | os.PathLike, *folders: Path) -> None:
    """Refuse with a ValueError what is no regular file, and a path that links lead out of all the folders."""
    require_regular(path)
    _refuse_link_outside(path, *folders)


def _refuse_link_outside(path: str | os.PathLike, *folders: Path) -> None:
    # In the Hub's cache the files of a snapshot are links to `blobs`, two folders above.
    blobs = [folder.parent.parent / "blobs" for folder in folders if folder.parent.name == "snapshots"]
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(home)) for home in [*folders, *blobs]):
        raise ValueError(f"{path} is a link that leads out of {folders[0]}; put a copy there.")


def require_regular_files(folder: str | os.PathLike) -> None:
    """Refuse with a ValueError a folder in which, at any depth, there is a pipe, a device or a link to nothing."""
    for path in Path(folder).rglob("*"):
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is no regular file.")


# --- files and text -----------------------------------------------------------------------------------------------


def load_json(path: Path, **options: Any) -> Any:
    """Read a JSON file.

    Args:
        path: the file's path.
        options: arguments of `json.loads`.

    Raises:
        ValueError: it is no regular file, or not JSON.
        OSError: it cannot be read.
    """
    try:
        return json.loads(read_regular(path), **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}); get it again from where it was published.") from error


def load_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file, or a JSON file, which is YAML too. Nothing in it is run.

    Raises:
        ValueError: it is neither, has aliases, or is larger than `MAX_YAML`.
        OSError: it cannot be read.
    """
    require_regular(path)
    with open(path, "rb") as file:
        content = file.read(MAX_YAML + 1)
    if len(content) > MAX_YAML:
        raise ValueError(f"{path} has over {MAX_YAML:,} bytes, which no file of settings needs: give another.")
    try:
        return yaml.load(content.decode(), _LoaderWithoutAliases)
    except Exception as error:  # PyYAML raises many types where a value does not fit its tag
        raise_if_out_of_memory(error)
        raise ValueError(f"{path} is not YAML ({one_line(error)}): correct it there.") from error


class _LoaderWithoutAliases(yaml.SafeLoader):
    """Refuses aliases: 300 bytes can stand for more values than anybody can search, or for a list in itself."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Compose the next node, as PyYAML asks; refuse it if it is an alias."""
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            problem = f"an alias, *{alias.anchor}, stands where its values must be written out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=alias.start_mark)
        return super().compose_node(parent, index)


def checked_text(value: Any, name: str, limit: int) -> str:
    """The value itself, if it is text that Arrow can store.

    Args:
        value: what a stranger wrote.
        name: what to call it in an error.
        limit: characters that it may have at most.

    Raises:
        ValueError: it is no text, too long, or not Unicode.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} is {short_repr(value)}; give text.")
    if len(value) > limit:
        raise ValueError(f"{name} has {len(value):,} characters; at most {limit:,} are allowed.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} {short_repr(value)} holds half a character; write it as Unicode text.") from error
    return value


@contextmanager
def record_errors_begin_with(where: str, layout: str) -> Iterator[None]:
    """Turn whatever a broken record raises inside into a ValueError or OSError that begins with its place.

    Args:
        where: the file, and the record in it.
        layout: whose fields the record should have, such as "REFER".
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {one_line(error)}") from error
    except OSError as error:
        raise OSError(f"{where}: {one_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error)}") from error
    except KeyError as error:
        reason = f"a field is missing ({one_line(error)}); see docs/data.md for what {layout} has"
        raise ValueError(f"{where}: {reason}.") from error
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"a field is missing or not of {layout}'s type ({one_line(repr(error))})."
        raise ValueError(f"{where}: {reason}") from error
