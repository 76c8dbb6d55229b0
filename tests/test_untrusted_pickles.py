"""Pickles of strangers: plain data is read, whatever else is refused by name, and nothing in them is run."""

import copyreg
import io
import os
import pickle
import sys

import datasets
import numpy as np
import pytest
import torch
from helpers.hostile_checkpoints import assert_refused, integer, state_dict, tensor, text, write_archive
from helpers.refer_folder import not_waiting

from checkpoint_files import read_tensors
from untrusted_pickles import load_plain_pickle


def test_python_2_pickles(tmp_path):
    path = tmp_path / "refs.p"
    for content in (
        b"(lp0\nS'caf\\xe9'\np1\naL12L\naF1.5\nag1\na.",
        b"\x80\x02](U\x04caf\xe9q\x01\x8a\x01\x0cF1.5\nh\x01e.",
    ):
        path.write_bytes(content)
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


# --- pickles of tensors ----------------------------------------------------------------------------------------------

STORAGE = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
INTEGERS = b"".join(integer(index) + b"N" for index in range(65_000))
PAIRS = b"".join(integer(index) + b"N\x86" for index in range(65_000))
HOSTILE = {  # what is written, and what is said
    "negative size": (state_dict(tensor(shape=(-1,))), "a tensor has the shape"),
    "negative stride": (state_dict(tensor(offset=3, stride=(-1,))), r"a tensor has the shape \(4,\), strides \(-1,\)"),
    "negative offset": (state_dict(tensor(offset=-1)), "offset -1"),
    "size of thousands of digits": (state_dict(tensor(shape=(10**6000,))), "a tensor has the shape"),
    "more strides than sides": (state_dict(tensor(stride=(1, 1))), "a tensor has the shape"),
    "too many sides": (state_dict(tensor(shape=[1] * 100_000, stride=[1] * 100_000)), "a tensor has the shape"),
    "text as size": (state_dict(tensor().replace(b"(K\x04t", b"(U\x01at")), "a tensor has the shape"),
    "negative storage": (state_dict(tensor(numel=-1)), "storage '0' has -1 numbers"),
    "deep": (b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".", "holds no state dict"),
    "marks without end": (b"\x80\x02" + b"(" * (2**21 - 4), r"no PyTorch checkpoint|cut short"),
    "dictionaries without end": (b"\x80\x02" + b"}" * (2**21 - 4), "no PyTorch checkpoint|cut short"),
    "tuples to be hashed": (b"\x80\x02}K\1" + b"\x85q\0h\0\x86" * 100 + b"K\1s.", "a tuple .* as a dictionary's key"),
    "keys that hash alike": (
        b"\x80\x02}(" + b"".join(integer(index * (2**61 - 1)) + b"N" for index in range(1, 120_000)) + b"u.",
        "as a dictionary's key",
    ),
    "memo numbers that hash alike": (
        b"\x80\x02N" + b"".join(b"p%d\n" % (index * (2**61 - 1)) for index in range(1, 80_000)) + b".",
        "no PyTorch checkpoint",
    ),
    "memo of a large number": (b"\x80\x02Nr\xff\xff\xff\x7f.", "holds no state dict"),
    "text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fa.", "cut short|no PyTorch checkpoint"),
    "long text": (b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"a.", "cut short|no PyTorch checkpoint"),
    "long number": (
        b"\x80\x02\x8b" + (2**21 - 20).to_bytes(4, "little") + b"\1" * (2**21 - 20) + b".",
        "no state dict",
    ),
    "number of many digits": (b"I" + b"9" * 10**6 + b"\n.", "no PyTorch checkpoint"),
    "bytearray": (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (2**34).to_bytes(5, "little") + b"\x85R.", "bytearray"),
    "attributes of a function": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(" + text("call") + b"Nub.",
        "sets attributes of a SafeFunction",
    ),
    "attributes of a type": (b"\x80\x02ctorch\nFloatStorage\n}b.", "sets attributes of a dtype"),
    "items of a list": (b"\x80\x02](K\0K\0u.", "sets items of a list"),
    "calls a dictionary": (b"\x80\x02})R.", "calls a dict"),
    "calls its own": (b"\x80\x02c__torch__\nA\n)\x81)R.", "calls a ScriptObject"),
    "the same dictionary copied by each call": (
        b"\x80\x02ccollections\nOrderedDict\nq\0}q\1(" + INTEGERS + b"u" + b"h\0h\1\x85R0" * 20_000 + b".",
        "0 names weights: names are text",
    ),
    "the same list of pairs copied by each call": (
        b"\x80\x02ccollections\nOrderedDict\nq\0]q\1(" + PAIRS + b"e" + b"h\0h\1\x85R0" * 20_000 + b".",
        "its calls are given over 2,097,152 items",
    ),
    "the same arguments of each call": (
        b"\x80\x02ctorch\nSize\nq\0(" + b"N" * 500_000 + b"tq\1" + b"h\0h\1R0" * 200_000 + b".",
        "a call in it has over 8 arguments",
    ),
    "the same external object of many parts": (
        b"\x80\x02(" + STORAGE + b"K\4" + b"N" * 500_000 + b"tq\0" + b"h\0Q0" * 200_000 + b".",
        "asks for the external object",
    ),
    "the same long name of each class": (
        b"\x80\x04" + text("__torch__." + "a" * 10**6) + b"q\0" + b"h\0h\0\x930" * 160_000 + b".",
        "asks for __torch__.aaa",
    ),
    "a type that is none": (
        state_dict(tensor().replace(b"_v2", b"_v3").replace(b"\x89}t", b"\x89}K\x01t")),
        "a tensor has no storage",
    ),
    "a storage that is none": (
        b"\x80\x02}(" + text("a") + b"ctorch._utils\n_rebuild_tensor_v3\n(NK\0))\x89}ctorch\nfloat32\ntRu.",
        "a tensor has no storage",
    ),
    "a name of torch": (b"\x80\x02ctorch\nload\n.", "asks for torch.load, which .* nothing in it was run"),
    "a name of many letters": (b"\x80\x02c" + b"a" * 10**6 + b"\nb\n.", "asks for aaaa"),
    "a name of two lines": (b"\x80\x04" + text("a\nb") + text("c") + b"\x93.", "asks for a b.c"),
    "an instance": (b"\x80\x02(ios\nsystem\n.", "asks for os.system"),
    "a registered object": (b"\x80\x02\x82\x01.", "asks for the registered object 1"),
    "an external object": (b"\x80\x02K\1Q.", "no PyTorch checkpoint"),
    "an unknown code": (b"\x80\x02\xff.", "no PyTorch checkpoint"),
    "empty stack": (b"\x80\x02.", "no PyTorch checkpoint"),
    "a quantised storage": (state_dict(tensor(dtype="QInt8")), "'t0' is a quantised tensor"),
}


@pytest.mark.slow
def test_hostile_pickles_get_one_sentence_soon_and_with_little_memory(tmp_path):
    paths = [tmp_path / f"{index}.pth" for index in range(len(HOSTILE))]
    for path, (content, _) in zip(paths, HOSTILE.values()):
        write_archive(path, content)
    assert_refused(paths, {name: said for name, (_, said) in HOSTILE.items()}, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pth"] * len(HOSTILE)


def test_codes_of_the_oldest_pickles_are_read(tmp_path):
    write_archive(tmp_path / "a.pth", b"(" + text("a") + tensor() + b"p3\n" + text("b") + b"g3\nd.", bytes(range(16)))
    expected = torch.frombuffer(bytearray(range(16)), dtype=torch.float32)
    read = read_tensors(tmp_path / "a.pth")
    assert read.keys() == {"a", "b"} and all(torch.equal(tensor, expected) for tensor in read.values())


def test_memory_that_runs_out_is_told_as_that(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("untrusted_pickles.TensorUnpickler.find_class", fail)
    with pytest.raises(MemoryError):
        read_tensors(tmp_path / "a.pth")
