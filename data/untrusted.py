"""What strangers' files are read with: paths that stay in a folder, JSON, YAML, text, and errors that say where."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from configuration_detris import one_line, raise_if_out_of_memory, read_regular, require_regular, short_repr

MAX_NAME = 4_096  # characters of a file name or category
MAX_YAML = 100_000  # bytes; the recipes in configs/ have 2,000


def file_inside(folder: Path, name: str, *homes: Path) -> str:
    """The path of the file that a record calls `name`, whether it is there or not.

    Raises:
        ValueError: the name is no relative path below the folder, or a link on the way leads out of folder and homes.
    """
    parts = Path(checked_text(name, "the file name", MAX_NAME)).parts
    if not parts or os.path.isabs(name) or ".." in parts:
        raise ValueError(f"{short_repr(name)} is not inside {folder}.")
    if "::" in name or "://" in name:  # `datasets` opens only what stands before or behind
        raise ValueError(f"{short_repr(name)} would be taken for an address; rename it without '::' and '://'.")
    path = os.fspath(folder)
    for part in parts:
        path = os.path.join(path, part)
        if os.path.islink(path):
            _refuse_link_out(os.path.join(folder, *parts), folder, *homes)
    return path


def require_inside(path: str | os.PathLike, *folders: Path) -> None:
    """Refuse with a ValueError what is no regular file, or what links put outside of all the folders."""
    require_regular(path)
    _refuse_link_out(path, *folders)


def _refuse_link_out(path: str | os.PathLike, *folders: Path) -> None:
    homes = [*folders, *(folder.parent.parent / "blobs" for folder in folders if folder.parent.name == "snapshots")]
    real = Path(os.path.realpath(path))  # the Hub's cache links its snapshots' files to its blobs
    if not any(real.is_relative_to(os.path.realpath(home)) for home in homes):
        raise ValueError(f"{path} is a link that leads out of {folders[0]}; put a copy there.")


def require_regular_files(folder: str | os.PathLike) -> None:
    """Refuse a folder that holds, at any depth, what `require_regular` refuses or links to nothing."""
    for path in Path(folder).rglob("*"):
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is no regular file.")


def load_json(path: Path, **options: Any) -> Any:
    """Read a JSON file; raises ValueError if it is none."""
    try:
        content = read_regular(path)
        return json.loads(content, **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}); get it again from where it was published.") from error


def load_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file, or a JSON file, which is YAML too; nothing in it is run.

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
    """Refuses aliases: with them, 300 bytes stand for more values than anybody can search, or for a list in itself."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            problem = f"an alias, *{alias.anchor}, stands where its values must be written out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=alias.start_mark)
        return super().compose_node(parent, index)


def checked_text(value: str, name: str, limit: int) -> str:
    """The value, if it is text that Arrow can store; ValueError if not."""
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
def naming(where: str, format_name: str = "REFER") -> Iterator[None]:
    """Begin what a broken record raises inside with `where`, as ValueError or OSError."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {one_line(error)}") from error
    except OSError as error:
        raise OSError(f"{where}: {one_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error)}") from error
    except KeyError as error:
        reason = f"a field is missing ({one_line(error)}); see data/README.md for what {format_name} has"
        raise ValueError(f"{where}: {reason}.") from error
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"a field is missing or not of {format_name}'s type ({one_line(repr(error))})."
        raise ValueError(f"{where}: {reason}") from error
