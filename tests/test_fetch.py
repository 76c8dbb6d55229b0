"""Data sets fetched from a server that cuts, stalls and lies: right bytes arrive, or nothing has the final name."""

import hashlib
import io
import multiprocessing
import os
import re
import resource
import shutil
import stat
import struct
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import filelock
import huggingface_hub.constants
import pytest
from helpers import hostile_server as hostile
from helpers.hostile_server import HostileServer
from helpers.refer_folder import ReferFolder, not_waiting

from data import check, fetch
from data.check import Counts
from data.fetch import Archive
from data.refer import load_refer

NAME = "refcoco/unc"
WHOLE = {"train": Counts(4, 8, 2), "val": Counts(1, 2, 1), "testA": Counts(1, 2, 1), "testB": Counts(1, 2, 1)}
MEMBER = r"refcoco/(instances\.json|refs\([a-z]+\)\.p)"
PHOTOGRAPH = r"train2014/(first\.jpg|second\.png)"
GOOD = {"refcoco/instances.json": b"{}", "refcoco/refs(unc).p": b"refs"}

# What a server does when nothing was there before, and what comes of it: a part of the reason, or None for success.
ATTACKS = {
    hostile.whole: None,
    hostile.without_length: None,
    hostile.cut_half_way: None,
    hostile.reset_half_way: None,
    hostile.closed_at_once: "2 times",
    hostile.stalled: None,  # each time half of the rest arrives
    hostile.stalled_before_the_answer: "timed out.*2 times",
    hostile.dripping: "fewer than",
    hostile.without_parts: None,
    hostile.without_parts_and_cut: "2 times",
    hostile.another_part: "another part",
    hostile.another_part_in_secret: None,
    hostile.part_of_a_larger_file: "another part",
    hostile.part_of_nonsense: "another part",
    hostile.wrong_bytes: "another SHA-256",
    hostile.wrong_bytes_then_cut: "another SHA-256",
    hostile.announced_too_short: "announces",
    hostile.announced_too_long: "announces",
    hostile.announced_as_nonsense: "2 times",
    hostile.endless: None,
    hostile.endless_zeros: "another SHA-256",
    hostile.endless_head: "2 times",
    hostile.no_http: "2 times",
    hostile.html: "announces|page",
    hostile.html_of_unknown_length: "page",
    hostile.compressed: "page",
    hostile.compressed_if_it_may: None,
    hostile.busy_twice: "503.*2 times",
    hostile.status(404): "status 404",
    hostile.status(204): "status 204",
    hostile.status(416): "status 416",
    hostile.status(403): "status 403",
    hostile.status(429, **{"Retry-After": 10**9}): "429.*2 times",
    hostile.status(503, **{"Retry-After": 10**9}): "503.*2 times",
    hostile.redirected("file:///etc/hostname"): "2 times",
    hostile.redirected("ftp://127.0.0.1/refcoco.zip"): "2 times",
    hostile.redirected("http://[::1"): "2 times",
    hostile.redirected("{endpoint}{path}"): "2 times",  # for ever
    hostile.redirected("{endpoint}/elsewhere"): None,
}
SILENT = {hostile.stalled, hostile.stalled_before_the_answer, hostile.dripping}
NAMES_OF_ATTACKS = [way.__name__ for way in ATTACKS]


def zipped(files, **options):
    """The bytes of a zip file of these contents by their names, or by `ZipInfo`s."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def archive_of(content, *addresses, name="refcoco.zip", folder="refcoco", member=MEMBER, unpacked=10**6):
    return Archive(name, len(content), hashlib.sha256(content).hexdigest(), addresses, folder, member, unpacked)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "refer").mkdir()
    return tmp_path / "refer"


@pytest.fixture
def server(monkeypatch):
    """The hostile server, which a hasty client asks."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name, value in {"TIMEOUT": 5, "SLOWEST": 10**4, "TRIES": 2, "WAIT": 0, "LEAST": 1}.items():
        monkeypatch.setattr(fetch, name, value)
    huggingface_hub.close_session()  # so that no connection to the last server is tried
    with HostileServer() as server, not_waiting():
        yield server


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small set as it is published, and `refcoco.zip` and `train2014.zip` of it."""
    monkeypatch.setattr(check, "PUBLISHED", {NAME: WHOLE})
    refer = ReferFolder(tmp_path / "published")
    refer.write()
    refer.annotations = zipped(
        {f"refcoco/{path.name}": path.read_bytes() for path in (refer.root / "refcoco").iterdir()}
    )
    refer.photographs = zipped({f"train2014/{path.name}": path.read_bytes() for path in refer.images.iterdir()})
    return refer


@pytest.fixture
def serve(server, published, monkeypatch):
    """Makes the command know addresses of `refcoco.zip`, each of which is served in one of the ways."""

    def serve(*ways, content=None):
        content = content or published.annotations
        server.add("/elsewhere", content)
        if SILENT & {*ways}:
            monkeypatch.setattr(fetch, "TIMEOUT", 0.4)
        addresses = [server.add(f"/{number}/refcoco.zip", content, way) for number, way in enumerate(ways)]
        monkeypatch.setitem(fetch.ARCHIVES, "refcoco", archive_of(content, *addresses))
        return server

    return serve


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_nothing_wrong(root, published, fetched):
    """Either all is there, or nothing has its final name."""
    assert (root / "refcoco").exists() == (root / "refcoco.zip").exists() == fetched
    if fetched:
        assert contents(root / "refcoco") == contents(published.root / "refcoco")
        assert (root / "refcoco.zip").read_bytes() == published.annotations
    rest = {path.name for path in root.iterdir()} - {".lock", "refcoco", "refcoco.zip"}
    assert rest <= (set() if fetched else {"refcoco.zip.partial"})


# --- download -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "reason"), ATTACKS.items(), ids=NAMES_OF_ATTACKS)
def test_the_right_bytes_arrive_or_none(way, reason, serve, published, root):
    serve(way)
    if reason is None:
        fetch.fetch(["refcoco"], root)
    else:
        with pytest.raises(OSError, match="(?s)No address serves refcoco.zip.*by hand.*" + reason):
            fetch.fetch(["refcoco"], root)
    assert_nothing_wrong(root, published, fetched=reason is None)
    left = root / "refcoco.zip.partial"
    assert not left.exists() or published.annotations.startswith(left.read_bytes())


def test_a_download_of_which_nothing_has_come_leaves_no_empty_file(serve, root):
    serve(hostile.status(404))
    with pytest.raises(OSError, match="No address"):
        fetch.fetch(["refcoco"], root)
    assert {path.name for path in root.iterdir()} == {".lock"}


def test_a_busy_server_is_asked_again_after_a_while(serve, published, root, monkeypatch):
    waited = []
    monkeypatch.setattr(fetch, "TRIES", 3)
    monkeypatch.setattr(fetch, "WAIT", 1.5)
    monkeypatch.setattr(fetch.time, "sleep", waited.append)
    serve(hostile.busy_twice)
    fetch.fetch(["refcoco"], root)
    assert_nothing_wrong(root, published, fetched=True)
    assert waited == [1.5, 3]


@pytest.mark.parametrize("begun", [0, 700])
@pytest.mark.parametrize("way", ATTACKS, ids=NAMES_OF_ATTACKS)
def test_the_next_address_serves_it_whatever_the_first_does(way, begun, serve, published, root, capsys):
    (root / "refcoco.zip.partial").write_bytes(published.annotations[:begun])
    server = serve(way, hostile.whole)
    fetch.fetch(["refcoco"], root)
    assert_nothing_wrong(root, published, fetched=True)
    if server.starts("/1/refcoco.zip"):
        address = re.escape(server.endpoint.removeprefix("http://"))
        assert re.search(f"refcoco.zip does not come from {address}: .", capsys.readouterr().out)


def test_what_is_there_is_not_asked_for_again(serve, published, root):
    half, quarter = len(published.annotations) // 2, len(published.annotations) // 4
    (root / "refcoco.zip.partial").write_bytes(published.annotations[:half])
    server = serve(hostile.cut_half_way)
    fetch.fetch(["refcoco"], root)
    starts = server.starts("/0/refcoco.zip")
    assert starts[0] == half and starts[1] in (half + quarter, half + quarter + 1) and starts == sorted(set(starts))


@pytest.mark.parametrize("way", [hostile.html, hostile.html_of_unknown_length, hostile.without_parts_and_cut])
def test_what_is_there_outlives_servers_without_parts(way, serve, published, root):
    """Who has 12 GB and meets the page of a hotel's network does not begin anew."""
    (root / "refcoco.zip.partial").write_bytes(published.annotations[:-10])
    serve(way)
    with pytest.raises(OSError, match="No address"):
        fetch.fetch(["refcoco"], root)
    assert (root / "refcoco.zip.partial").read_bytes() == published.annotations[:-10]


@pytest.mark.parametrize("wrong", [b"x" * 100, b"x" * 10**5], ids=["shorter", "longer"])
def test_what_an_earlier_run_left_may_be_wrong(wrong, serve, published, root):
    (root / "refcoco.zip.partial").write_bytes(wrong)
    serve(hostile.whole)
    fetch.fetch(["refcoco"], root)
    assert_nothing_wrong(root, published, fetched=True)


def test_a_stream_without_end_is_left(serve, published, root):
    server = serve(hostile.endless_zeros)
    with pytest.raises(OSError, match="another SHA-256"):
        fetch.fetch(["refcoco"], root)
    assert server.hung_up.wait(5) and not (root / "refcoco.zip.partial").exists()


@pytest.mark.parametrize("name", ["refcoco.zip.partial", "refcoco.zip"])  # the second was downloaded by hand
def test_a_complete_download_is_not_asked_for(serve, published, root, name):
    (root / name).write_bytes(published.annotations)
    server = serve(hostile.whole)
    fetch.fetch(["refcoco"], root)
    assert_nothing_wrong(root, published, fetched=True)
    assert not server.requests


def test_another_file_by_hand_is_refused_and_stays(serve, published, root):
    (root / "refcoco.zip").write_bytes(published.photographs)
    serve(hostile.whole)
    with pytest.raises(OSError, match=r"refcoco\.zip is not the refcoco\.zip that was published"):
        fetch.fetch(["refcoco"], root)
    assert (root / "refcoco.zip").read_bytes() == published.photographs and not (root / "refcoco").exists()


def test_a_pipe_is_not_waited_for(serve, root):
    os.mkfifo(root / "refcoco.zip.partial")
    serve(hostile.whole)
    with pytest.raises(ValueError, match="no regular file"):
        fetch.fetch(["refcoco"], root)


def test_a_folder_that_is_there_is_left_as_it_is(serve, root, capsys):
    (root / "refcoco").mkdir()
    server = serve(hostile.whole)
    fetch.fetch(["refcoco"], root)
    assert not server.requests and not any((root / "refcoco").iterdir())
    assert "is left as it is" in capsys.readouterr().out


def killed_when(condition, *arguments):
    """Fetch in another process, and kill that when the condition holds."""
    process = multiprocessing.get_context("fork").Process(target=fetch.fetch, args=arguments)
    process.start()
    try:
        while not condition():
            assert process.is_alive()
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()


def test_killed_it_does_not_begin_anew(serve, root, monkeypatch):
    partial, content = root / "refcoco.zip.partial", zipped(GOOD | {"refcoco/noise": os.urandom(2**20)})
    server = serve(hostile.stalled, content=content)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "TIMEOUT", 20)
        killed_when(lambda: partial.exists() and partial.stat().st_size > 2**18, ["refcoco"], root)
    there = partial.stat().st_size
    serve(hostile.whole, content=content)
    fetch.fetch(["refcoco"], root)
    assert (root / "refcoco.zip").read_bytes() == content
    assert server.starts("/0/refcoco.zip") == [0, there] and there < len(content)


def test_errors_of_our_own_disk_are_not_the_servers(serve, root):
    server = serve(hostile.whole, hostile.whole, content=os.urandom(2**20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, before[1]))  # stands for a full disk
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            fetch.fetch(["refcoco"], root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "No address" not in str(raised.value) and not server.starts("/1/refcoco.zip")


def test_two_at_once_do_not_mix(serve, root):
    serve(hostile.whole)
    with filelock.FileLock(root / fetch.LOCK), pytest.raises(OSError, match="Another process fetches into"):
        fetch.fetch(["refcoco"], root)
    fetch.fetch(["refcoco"], root)


def test_a_full_disk_is_noticed_before(serve, root, monkeypatch):
    content = zipped({"refcoco/instances.json": bytes(10**5)}, compression=zipfile.ZIP_DEFLATED)
    size, free = len(content), 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free))
    server = serve(hostile.whole, content=content)
    (root / "refcoco.zip.partial").write_bytes(content[:100])
    free = size * 2 - 101
    with pytest.raises(OSError, match=f"has {free:,} bytes free, and {size * 2 - 100:,} are needed"):
        fetch.fetch(["refcoco"], root)
    assert not server.requests
    free += 1
    with pytest.raises(OSError, match="100,000 are needed"):  # unpacked, they take more than in the archive
        fetch.fetch(["refcoco"], root)
    assert server.requests and not (root / "refcoco").exists()


# --- unpack -------------------------------------------------------------------------------------------------------


def entry(name, mode=0, method=zipfile.ZIP_STORED):
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = mode << 16, method
    return info


def patched(content, found, put, count=-1):
    assert found in content
    return content.replace(found, put, count)


TWICE = zipped(GOOD | {"refcoco/refs(unx).p": b"others"})
ENCRYPTED = bytearray(zipped(GOOD))
ENCRYPTED[ENCRYPTED.rindex(b"PK\1\2") + 8] |= 1  # the flags of the last member
DEFLATED = zipped({"refcoco/instances.json": b"0123456789" * 999}, compression=zipfile.ZIP_DEFLATED)
BROKEN_ZIPS = {
    "no zip": (b"<html>", "not a zip file"),
    "cut": (zipped(GOOD)[:-30], "not a zip file"),
    "empty": (zipped({}), "no file of refcoco"),
    "another set": (zipped({"refcoco+/instances.json": b"{}"}), "no file of refcoco"),
    "absolute": (zipped(GOOD | {"/tmp/x": b""}), "leads out"),
    "above": (zipped(GOOD | {"refcoco/../../x": b""}), "leads out"),
    "above itself": (zipped(GOOD | {"..": b""}), "leads out"),
    "backslashes": (zipped(GOOD | {"refcoco\\..\\x": b""}), "leads out"),
    "drive": (zipped(GOOD | {"C:/x": b""}), "leads out"),
    "link": (zipped(GOOD | {entry("refcoco/refs(x).p", stat.S_IFLNK | 0o777): b"/etc/passwd"}), "link or a device"),
    "device": (zipped(GOOD | {entry("refcoco/refs(x).p", stat.S_IFCHR): b""}), "link or a device"),
    "pipe": (zipped(GOOD | {entry("x", stat.S_IFIFO): b""}), "link or a device"),
    "encrypted": (bytes(ENCRYPTED), "encrypted or packed"),
    "lzma": (zipped(GOOD | {entry("refcoco/refs(x).p", 0, zipfile.ZIP_LZMA): b"x"}), "unusual way"),
    "twice": (patched(TWICE, b"refs(unx).p", b"refs(unc).p"), "twice"),
    "too large": (zipped({"refcoco/instances.json": bytes(2000)}, compression=zipfile.ZIP_DEFLATED), "2,000 bytes"),
    "more than announced": (patched(DEFLATED, struct.pack("<L", 9990), struct.pack("<L", 999)), "Bad CRC|overlap"),
    "less than announced": (patched(zipped(GOOD), struct.pack("<LL", 4, 4), struct.pack("<LL", 40, 40)), "."),
    "other bytes": (patched(zipped(GOOD), b"refs(unc).prefs", b"refs(unc).psefs"), "Bad CRC"),
    "another name inside": (patched(zipped(GOOD), b"refcoco/refs(unc).p", b"refcoco/refs(umd).p", 1), "differ"),
    "broken stream": (DEFLATED[:60] + b"\xff\xff\xff" + DEFLATED[63:], "."),
}


@pytest.mark.parametrize("case", BROKEN_ZIPS)
def test_hostile_archives_are_refused(case, root, tmp_path):
    content, reason = BROKEN_ZIPS[case]
    limit = 10_000 if content in (DEFLATED, BROKEN_ZIPS["more than announced"][0]) else 1000
    path, target = root / "refcoco.zip", root / "refcoco"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"refcoco\.zip cannot be unpacked: .*({reason})"):
        fetch.unpack(path, archive_of(content, unpacked=20_000 if case == "broken stream" else limit), target)
    assert not target.exists() and [entry.name for entry in tmp_path.iterdir()] == ["refer"]
    assert not any(entry.is_symlink() for entry in root.rglob("*"))


def test_files_of_no_data_set_are_left_out(root, capsys):
    content = zipped({"refcoco/": b""} | GOOD | {"__MACOSX/refcoco/._refs(unc).p": b"x", "refcoco/run.py": b"x"})
    path = root / "refcoco.zip"
    path.write_bytes(content)
    fetch.unpack(path, archive_of(content), root / "refcoco")
    assert contents(root / "refcoco") == {"instances.json": b"{}", "refs(unc).p": b"refs"}
    assert "2 files that are no part of refcoco are left out, as '__MACOSX/" in capsys.readouterr().out


def test_killed_while_unpacking_it_goes_on(serve, published, root, monkeypatch):
    server, copy = serve(hostile.whole), shutil.copyfileobj
    scratch = root / "refcoco.partial"

    def copy_half_of_the_second(source, target, length):
        if len(contents(scratch)) == 2:
            target.write(source.read(20))
            target.flush()
            time.sleep(20)
        copy(source, target, length)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", copy_half_of_the_second)
        killed_when(
            lambda: scratch.exists() and [20] == [len(data) for data in contents(scratch).values()][1:],
            ["refcoco"],
            root,
        )
    assert not (root / "refcoco").exists()
    before = {path.name: path.stat().st_mtime_ns for path in scratch.iterdir()}
    fetch.fetch(["refcoco"], root)
    assert_nothing_wrong(root, published, fetched=True)
    after = {path.name: path.stat().st_mtime_ns for path in (root / "refcoco").iterdir()}
    assert sum(before[name] == after[name] for name in before) == 1
    assert server.starts("/0/refcoco.zip") == [0]


def test_what_is_unpacked_by_halves_is_unpacked_anew(published, root):
    """Of the right length, as a file whose bytes did not reach the disk before the power failed."""
    path, scratch = root / "refcoco.zip", root / "refcoco.partial"
    path.write_bytes(published.annotations)
    scratch.mkdir()
    for file in (published.root / "refcoco").iterdir():
        (scratch / file.name).write_bytes(bytes(file.stat().st_size))
    fetch.unpack(path, archive_of(published.annotations), root / "refcoco")
    assert contents(root / "refcoco") == contents(published.root / "refcoco")


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_leaves_a_whole_set(serve, published, root, monkeypatch, capsys):
    server = serve(hostile.whole)
    address = server.add("/train2014.zip", published.photographs, hostile.cut_half_way)
    names = {"name": "train2014.zip", "folder": "images/train2014", "member": PHOTOGRAPH}
    monkeypatch.setattr(fetch, "COCO", archive_of(published.photographs, address, **names))
    assert fetch.main(["refcoco", "--coco", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"{NAME}: ok" in out and "no longer needed" in out and "photographs" not in out
    ours, theirs = (load_refer(folder, "refcoco", "unc") for folder in (root, published.root))
    assert {split: rows["ref_id"] for split, rows in ours.items()} == {
        split: rows["ref_id"] for split, rows in theirs.items()
    }


def test_photographs_elsewhere_are_named(serve, published, root, capsys):
    serve(hostile.whole)
    assert fetch.main(["refcoco", str(root)]) == 1
    assert "There are no photographs: add --coco" in capsys.readouterr().out
    assert fetch.main(["refcoco", str(root), "--images", str(published.images)]) == 0
    assert "There are no photographs" not in capsys.readouterr().out


def test_errors_are_one_sentence(serve, root, monkeypatch):
    serve(hostile.status(404))
    with pytest.raises(SystemExit, match=r"^python -m data\.fetch: No address serves refcoco\.zip\. .*status 404$"):
        fetch.main(["refcoco", str(root)])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="HF_HUB_OFFLINE"):
        fetch.main(["refcoco", str(root)])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["refclef", "x"], "invalid choice: 'refclef'"),
        (["refcoco"], "required: root"),
        (["refcoco", "x", "--coco", "--images", "y"], "not allowed with"),
    ],
)
def test_arguments_are_checked(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        fetch.main(arguments)
    assert complaint in capsys.readouterr().err


def test_the_table_is_that_of_the_documentation():
    """The addresses there are for `wget`, the sums for `sha256sum`, and sizes are rounded."""
    text = (Path(__file__).parents[1] / "docs/data.md").read_text()
    text = text.replace("$archive", re.search("archive=(.*)", text)[1]).replace('"', "")
    for archive in (*fetch.ARCHIVES.values(), fetch.COCO):
        assert f"{archive.sha256}  {archive.name}\n" in text
        size, unit = re.search(rf"wget {re.escape(archive.addresses[0])} +#  ([0-9.]+) ([GM])B", text).groups()
        digits = 1 if unit == "G" else 0
        assert float(size) == round(archive.size / {"G": 10**9, "M": 10**6}[unit], digits)
    assert fetch.COCO.addresses[1].endswith("/datasets/BAAI/DataOptim/resolve/main/images/coco/train2014.zip")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"file.* cannot be written \(.*\): name another folder"):
            fetch.fetch(["refcoco"], root)
