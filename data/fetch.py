"""Fetch RefCOCO, RefCOCO+ and RefCOCOg, and with `--coco` the photographs, into the REFER layout.

    python -m data.fetch refcoco refcoco+ refcocog --coco path/to/refer
    python -m data.fetch refcoco path/to/refer --images path/to/train2014     # the photographs are there already

Each archive is asked for at its addresses in turn, goes on where an earlier run broke off, is compared with its
published SHA-256, and is unpacked. `data.check` then reads what has come of it, and its status is the command's.
"""

import argparse
import hashlib
import os
import re
import shutil
import stat
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import filelock
from datasets.utils import tqdm
from huggingface_hub import get_session, hf_hub_url

from configuration_detris import one_line, raise_if_out_of_memory, require_regular, short_repr

from . import check
from .refer import COCO_IMAGES

LOCK = ".lock"
UNFINISHED = ".partial"  # ends the name of what is not whole yet: an archive, or the folder that it is unpacked into
TIMEOUT = 60.0  # seconds that a server may be silent
SLOWEST = 1000  # bytes a second; a server that brings fewer for TIMEOUT seconds is given up
TRIES, WAIT = 5, 1.0  # how often in vain one address is asked, and the seconds before the second time; then twice that
LEAST = 2**16  # bytes: a connection that breaks before it has brought so many was in vain
BLOCK = 2**20  # bytes that are read from a file at once
WAYBACK = "https://web.archive.org/web/{taken}id_/https://bvisionweb1.cs.unc.edu/licheng/referit/data/{name}.zip"


class Archive(NamedTuple):
    """A published zip file, and what of it belongs where."""

    name: str
    size: int  # bytes
    sha256: str
    addresses: tuple[str, ...]  # the first that serves it is taken
    folder: str  # what is unpacked, relative to the root
    member: str  # a regular expression: the files to unpack, which lie in a folder of the archive
    unpacked: int  # bytes that these files may have in all; nobody has published how many they have


def _annotations(name: str, size: int, sha256: str, taken: str) -> Archive:
    member = rf"{re.escape(name)}/(instances\.json|refs\([a-z]+\)\.p)"
    return Archive(f"{name}.zip", size, sha256, (WAYBACK.format(taken=taken, name=name),), name, member, 10**9)


# docs/data.md says who has published these addresses, sizes and sums.
ARCHIVES = {
    "refcoco": _annotations(
        "refcoco",
        53_993_993,
        "7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0",
        "20220413011718",
    ),
    "refcoco+": _annotations(
        "refcoco+",
        45_613_210,
        "5f1238112d63199e68da54a28f201471909b21ded7ed79a57d51b4c1443c6b45",
        "20220413011656",
    ),
    "refcocog": _annotations(
        "refcocog",
        56_712_951,
        "3d1f7e5b2ff2205940bf59de55f861f5f2cc1403fb980669933a7f9af1aa8211",
        "20220413012904",
    ),
}
COCO = Archive(
    "train2014.zip",
    13_510_573_713,
    "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    (
        "http://images.cocodataset.org/zips/train2014.zip",
        hf_hub_url("BAAI/DataOptim", "images/coco/train2014.zip", repo_type="dataset"),
    ),
    COCO_IMAGES,
    r"train2014/COCO_train2014_[0-9]{12}\.jpg",
    15 * 10**9,
)


def fetch(names: list[str], root: str | os.PathLike, coco: bool = False) -> None:
    """Fetch and unpack data sets; what is unpacked already is left as it is.

    Args:
        names: keys of `ARCHIVES`.
        root: folder in the REFER layout, which is made if there is none.
        coco: whether to fetch COCO's train2014 too.

    Raises:
        OSError: no address serves an archive, the disk is too small, a file cannot be written, or another process
            fetches into the same folder.
        ValueError: an archive holds what it should not.
    """
    root = Path(root).absolute()
    archives = [ARCHIVES[name] for name in dict.fromkeys(names)] + [COCO] * coco
    with _locked(root):
        missing = []
        for archive in archives:
            if (root / archive.folder).exists():
                print(f"{root / archive.folder} is there and is left as it is; remove it to have it made anew.")
            else:
                missing.append(archive)
        _require_space(root, sum(archive.size * 2 - _bytes_there(root, archive) for archive in missing))
        for archive in missing:
            path = root / archive.name
            _download(archive, path)
            unpack(path, archive, root / archive.folder)
            print(f"{root / archive.folder} is unpacked; {path} is no longer needed.")


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the folder for this process; the operating system lets it go when the process ends, however it ends."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{root} cannot be written ({error.strerror}): name another folder.") from error
    try:
        with filelock.FileLock(root / LOCK, blocking=False):
            yield
    except filelock.Timeout:
        raise OSError(
            f"Another process fetches into {root}: wait until it has ended, or name another folder."
        ) from None


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free:,} bytes free, and {needed:,} are needed: make room, or name a folder elsewhere."
        )


# --- download -----------------------------------------------------------------------------------------------------


def _bytes_there(root: Path, archive: Archive) -> int:
    """How much of an archive is there."""
    path = root / archive.name
    return _size(path) or _size(_unfinished(path))


def _size(path: Path) -> int:
    require_regular(path)
    return path.stat().st_size if path.exists() else 0


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


def _download(archive: Archive, path: Path) -> None:
    """Make `path` the archive, unless it is there already. Until it is whole and right, it has another name."""
    if path.exists():
        if not _is_right(path, archive):
            raise OSError(f"{path} is not the {archive.name} that was published (its SHA-256 differs): remove it.")
        return
    reasons = []
    for address in archive.addresses:
        try:
            _download_from(address, archive, _unfinished(path))
            os.replace(_unfinished(path), path)
            return
        except Exception as error:
            raise_if_out_of_memory(error)
            if isinstance(error, OSError) and error.errno:  # of this machine's files: no other address would help
                raise
            reasons.append(f"{urlsplit(address).netloc}: {one_line(str(error) or repr(error))}")
            print(f"{archive.name} does not come from {reasons[-1]}")
    if not _size(_unfinished(path)):
        _unfinished(path).unlink(missing_ok=True)
    raise OSError(
        f"No address serves {archive.name}. Try again later, and this command goes on from here; or download it by "
        f"hand from {' or '.join(archive.addresses)} to {path}, and this command unpacks it. The reasons: "
        f"{'; '.join(reasons)}"
    )


def _is_right(path: Path, archive: Archive) -> bool:
    if _size(path) != archive.size:
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as file, _bar(archive.size, 0, f"{archive.name}: checksum") as progress:
        while block := file.read(BLOCK):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest() == archive.sha256


def _bar(total: int, initial: int, description: str) -> tqdm:
    return tqdm(total=total, initial=initial, desc=description, unit="B", unit_scale=True)


def _download_from(address: str, archive: Archive, path: Path) -> None:
    """Complete `path` from one address. A file that turns out to be wrong is deleted.

    Raises:
        OSError: the address serves something else.
        Exception: of `huggingface_hub`'s HTTP client, if it cannot be reached or breaks off again and again.
    """
    begun = _size(path) > 0
    _complete(address, archive, path)
    if _is_right(path, archive):
        return
    path.unlink()
    if not begun:
        raise OSError("what it serves has another SHA-256 than was published")
    _download_from(address, archive, path)  # what an earlier run left may have been wrong


def _complete(address: str, archive: Archive, path: Path) -> None:
    """Append to a file until it is as long as the archive; begin again whenever the connection breaks."""
    in_vain = 0
    with open(path, "ab") as file, _bar(archive.size, file.tell(), archive.name) as progress:
        while (before := file.tell()) < archive.size:
            failure = "it breaks off"
            try:
                _append(address, archive.size, file, progress)
            except OSError:  # it would do the same again
                raise
            except Exception as error:  # of the HTTP client: no connection, a time-out, a busy server
                raise_if_out_of_memory(error)
                failure = error
            in_vain = 0 if file.tell() - before >= LEAST else in_vain + 1
            if in_vain == TRIES and file.tell() < archive.size:
                raise OSError(f"{one_line(str(failure) or repr(failure))} ({TRIES} times)")
            if in_vain:
                time.sleep(WAIT * 2 ** (in_vain - 1))


def _append(address: str, size: int, file: BinaryIO, progress: tqdm) -> None:
    """Append what a server sends, from where the file ends, and no more than up to `size`.

    `huggingface_hub` has the HTTP client: proxies, certificates, redirects, the offline switch. Its `http_get` does
    not fit: it keeps up to 10 MB in memory, which are lost whenever a connection breaks, waits as long as a server
    tells it to, and looks neither at which part of a file it is sent nor at how much.
    """
    start = file.tell()
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with get_session().stream("GET", address, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
        skipped = _check_answer(response, start, size)
        received, looked, then = 0, time.monotonic(), 0
        for chunk in response.iter_raw():  # never decompressed
            received += len(chunk)
            if time.monotonic() - looked > TIMEOUT:
                if received - then < TIMEOUT * SLOWEST:
                    raise OSError(f"it sends fewer than {SLOWEST:,} bytes a second")
                looked, then = time.monotonic(), received
            chunk, skipped = chunk[skipped:], max(skipped - len(chunk), 0)
            progress.update(file.write(chunk[: size - file.tell()]))
            if file.tell() == size:  # a stream need not have an end
                return


def _check_answer(response: Any, start: int, size: int) -> int:
    """How many bytes of an answer come before those that are wanted: `start` if a server has no parts of files.

    Raises:
        OSError: it is not the archive.
        Exception: the server is busy.
    """
    status, headers = response.status_code, response.headers
    if status in (408, 429) or status >= 500:
        response.raise_for_status()
    if status not in (200, 206):
        raise OSError(f"it answers with status {status}")
    first = start if status == 206 else 0
    if status == 206 and not re.fullmatch(rf"bytes {start}-\d+/({size}|\*)", headers.get("Content-Range", "")):
        raise OSError(f"it sends another part than bytes {start:,} to {size:,}")
    if headers.get("Content-Length", str(size - first)) != str(size - first):
        raise OSError(f"it announces {short_repr(headers['Content-Length'])} bytes where {size - first:,} are left")
    if (
        headers.get("Content-Type", "").startswith("text/html")
        or headers.get("Content-Encoding", "identity") != "identity"
    ):
        raise OSError("it sends a page instead of the archive")
    return start - first


# --- unpack -------------------------------------------------------------------------------------------------------


def unpack(path: Path, archive: Archive, target: Path) -> None:
    """Unpack an archive; the folder appears when it is whole.

    Until then its files are in `<target>.partial`. Those that an interrupted run has left there whole are kept.

    Args:
        path: the zip file.
        archive: which of its files are taken.
        target: the folder that these files are put in.

    Raises:
        ValueError: the file is no zip file, is broken, or holds what it should not.
        OSError: the disk is too small, or a file cannot be written.
    """
    scratch = _unfinished(target)
    try:
        with zipfile.ZipFile(path) as file:
            members = _members_to_unpack(file, archive)
            scratch.mkdir(parents=True, exist_ok=True)
            _require_space(scratch, sum(member.file_size for member in members.values()) - _bytes_in(scratch))
            for name, member in tqdm(members.items(), desc=f"unpacking {archive.name}", unit="file"):
                if not _is_unpacked(scratch / name, member):
                    with file.open(member) as source, open(scratch / name, "wb") as copy:
                        shutil.copyfileobj(source, copy, BLOCK)  # at the end `zipfile` compares the checksum
    except OSError:
        raise
    except Exception as error:  # `zipfile` raises many types for broken files
        raise_if_out_of_memory(error)
        raise ValueError(f"{path} cannot be unpacked: {one_line(str(error) or repr(error))}") from error
    scratch.rename(target)


def _bytes_in(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def _is_unpacked(path: Path, member: zipfile.ZipInfo) -> bool:
    return _size(path) == member.file_size and path.exists() and zlib.crc32(path.read_bytes()) == member.CRC


def _members_to_unpack(file: zipfile.ZipFile, archive: Archive) -> dict[str, zipfile.ZipInfo]:
    """The members that belong to the data set, by the names of their files.

    Raises:
        ValueError: one of all members has a path that leads elsewhere, is a link or device, or is encrypted; or those
            of the data set are missing, stand there twice or are too large.
    """
    members, others = {}, []
    for member in file.infolist():
        said, name = short_repr(member.filename), member.filename.rpartition("/")[2]
        if (
            member.filename.startswith("/")
            or ".." in member.filename.split("/")
            or re.search(r"[\\:]", member.filename)
        ):
            raise ValueError(f"{said} in it leads out of the folder.")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{said} in it is a link or a device.")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{said} in it is encrypted or packed in an unusual way.")
        if not re.fullmatch(archive.member, member.filename):
            others += [] if member.is_dir() else [said]
        elif name in members:
            raise ValueError(f"{said} stands in it twice.")
        else:
            members[name] = member
    if not members:
        raise ValueError(f"it holds no file of {archive.folder}.")
    if (total := sum(member.file_size for member in members.values())) > archive.unpacked:
        raise ValueError(f"its files have {total:,} bytes, more than the {archive.unpacked:,} that are allowed.")
    if others:
        print(f"{archive.name}: {len(others)} files that are no part of {archive.folder} are left out, as {others[0]}")
    return members


def main(arguments: list[str] | None = None) -> int:
    """Fetch what the command line names and check it; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=ARCHIVES, metavar="name", help=", ".join(ARCHIVES))
    parser.add_argument("root", help="folder to fetch into, in the REFER layout")
    photographs = parser.add_mutually_exclusive_group()
    photographs.add_argument("--coco", action="store_true", help="fetch COCO's train2014 too, 13.5 GB")
    photographs.add_argument("--images", help="the folder of train2014, if it is not images/train2014 in the root")
    options = parser.parse_intermixed_args(arguments)
    try:
        fetch(options.names, options.root, options.coco)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted; the same command goes on from here.")
    published = [name for name in check.PUBLISHED if name.partition("/")[0] in options.names]
    status = check.main([options.root, *published, *(["--images", options.images] if options.images else [])])
    if not options.images and not Path(options.root, COCO_IMAGES).exists():
        print("There are no photographs: add --coco to fetch them, or --images with the folder where they are.")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
