"""Pickles of checkpoints from strangers: nothing in them is run, allocated or waited for.

Annotations from strangers are tested where they are read, in `test_refer.py`.
"""

import pytest
import torch
from helpers.hostile_checkpoints import assert_refused, integer, state_dict, tensor, text, write_archive

from checkpoint_files import read_tensors

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
