"""Pickles of strangers: plain data is read, whatever else is refused by name, and nothing in them is run."""

import copyreg
import io
import os
import pickle
import sys

import datasets
import numpy as np
import pytest
from helpers.refer_folder import not_waiting

from untrusted_pickles import load_plain_pickle


def test_python_2_pickles(tmp_path):
    path = tmp_path / "refs.p"
    for text in (
        b"(lp0\nS'caf\\xe9'\np1\naL12L\naF1.5\nag1\na.",
        b"\x80\x02](U\x04caf\xe9q\x01\x8a\x01\x0cF1.5\nh\x01e.",
    ):
        path.write_bytes(text)
        assert load_plain_pickle(path) == ["café", 12, 1.5, "café"]


class Hostile:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_with_code_are_refused_by_name(refer, tmp_path, protocol):
    refer.refs[1]["sentences"][0]["sent"] = Hostile(os.mkdir, str(tmp_path / "was_here"))
    with pytest.raises(ValueError, match=rf"refs\(unc\)\.p is not .*\(it asks for {os.mkdir.__module__}\.mkdir"):
        refer.load(protocol=protocol)
    assert not (tmp_path / "was_here").exists()
    path = tmp_path / "other.p"
    for value, name in (
        (np.arange(3), "numpy"),
        (bytearray(b"a"), "bytearray"),
        (datasets.Value, "datasets.features"),
    ):
        path.write_bytes(pickle.dumps([value], min(protocol, 3)))
        with pytest.raises(ValueError, match=rf"other.p is not .*\(it asks for .*{name}"):
            load_plain_pickle(path)


def test_pickles_with_external_objects_are_refused(tmp_path):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return "key" if isinstance(value, float) else None

    file = io.BytesIO()
    Pickler(file, 2).dump([1.5])
    (tmp_path / "refs.p").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="external object 'key'"):
        load_plain_pickle(tmp_path / "refs.p")


def test_pickles_with_extension_codes_are_refused(tmp_path):
    path, code = tmp_path / "refs.p", 240
    copyreg.add_extension(os.mkdir.__module__, "mkdir", code)
    try:
        path.write_bytes(pickle.dumps([os.mkdir], 2))
        assert pickle.loads(path.read_bytes()) == [os.mkdir]  # the function is now cached
        with pytest.raises(ValueError, match=r"it asks for \w+\.mkdir"):
            load_plain_pickle(path)
    finally:
        copyreg.remove_extension(os.mkdir.__module__, "mkdir", code)
    with pytest.raises(ValueError, match="refs.p is not a pickle"):
        load_plain_pickle(path)


def test_broken_pickles_are_named(refer, tmp_path):
    path = tmp_path / "refs.p"
    whole = pickle.dumps(refer.refs[:1], 2)
    for broken in (
        *(whole[:end] for end in range(0, len(whole), 7)),
        b"<html>404</html>",
        b"\x80\x63.",
        b"cos\n",
        b"0.",
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="refs.p is not a pickle of lists"):
            load_plain_pickle(path)


SAME_HASHES = [n * sys.hash_info.modulus for n in range(2, 50_000)]


def test_numbers_given_to_objects_take_no_memory(tmp_path):
    """C's unpickler would make room for 4 billion objects, twice."""
    (tmp_path / "refs.p").write_bytes(b"\x80\x02]r\xff\xff\xff\xff.")
    assert load_plain_pickle(tmp_path / "refs.p") == []


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05]})" + b"\x85" * 2_000_000 + b"K\x01sa.",  # a key that is a tuple in a tuple in a tuple …
        b"\x80\x05})" + b"2\x86" * 64 + b"K\x01s.",  # one whose hash takes 2 ** 64 steps
        b"\x80\x05(t" + b"2\x86" * 28 + b"Q.",  # an external object that would be printed so often
        b"\x80\x05\x96" + (3 << 30).to_bytes(8, "little") + b".",  # bytes that are not there
        b"c" + b"A" * 5_000_000 + b"\nfoo\n.",
        # Keys and numbers of objects whose hashes are equal: each is compared with all before it.
        b"\x80\x02}(" + b"".join(b"\x8a\x0b" + n.to_bytes(11, "little") + b"N" for n in SAME_HASHES) + b"u.",
        b"]" + b"".join(b"p%d\n" % n for n in SAME_HASHES) + b".",
    ],
)
def test_small_pickles_of_great_things_are_refused(tmp_path, content):
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(ValueError, match="refs.p is not a pickle of lists") as error:
        load_plain_pickle(tmp_path / "refs.p")
    assert len(str(error.value)) < 2000


def test_a_pickle_takes_no_room_for_what_is_not_there(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a")
    with pytest.raises(ValueError, match="refs.p is not a pickle of lists"):
        load_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/stdin"])
def test_pipes_and_devices_are_not_read(tmp_path, kind):
    path = tmp_path / "refs.p"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(kind)
    with not_waiting(), pytest.raises(ValueError, match="is no regular file"):
        load_plain_pickle(path)
