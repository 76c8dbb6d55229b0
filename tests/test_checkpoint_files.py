"""Tensors in files from strangers: equal to what torch reads from them, and nothing run, allocated or waited for."""

import os
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from helpers.hostile_checkpoints import SECONDS, assert_refused, state_dict, tensor, text, write_archive
from helpers.hostile_torchscript import Written
from torch import nn

from backbones_detris import read_clip_text
from checkpoint_files import (
    bare_state_dict,
    check_finite,
    check_names,
    check_shapes,
    first_not_finite,
    read_tensors,
    refuse_pipes,
    tensors_for_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # TorchScript


# --- what torch reads, too ----------------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """OpenAI's (`clip/model.py`): the mask is a tensor, but neither a parameter nor a buffer."""

    def __init__(self, width: int, heads: int, attn_mask: torch.Tensor | None = None):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        layers = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = torch.zeros(1) if attn_mask is None else attn_mask

    def forward(self, x: torch.Tensor):
        mask = self.attn_mask if self.attn_mask.ndim == 2 else None
        x = x + self.attn(self.ln_1(x), self.ln_1(x), self.ln_1(x), need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, attn_mask: torch.Tensor | None = None):
        super().__init__()
        self.width, self.layers = width, layers
        blocks = [ResidualAttentionBlock(width, width // 64, attn_mask) for _ in range(layers)]
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor):
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=4, stride=4, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.ln_pre, self.transformer = nn.LayerNorm(width), Transformer(width, 1)
        self.proj = nn.Parameter(torch.randn(width, 64))

    def forward(self, x: torch.Tensor):
        x = self.conv1(x).flatten(2).permute(2, 0, 1) + self.class_embedding
        return self.transformer(self.ln_pre(x))[0] @ self.proj


class CLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = VisionTransformer(64)
        self.transformer = Transformer(128, 2, torch.full((6, 6), -10000.0).triu_(1))
        self.token_embedding = nn.Embedding(40, 128)
        self.positional_embedding = nn.Parameter(torch.randn(6, 128))
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.randn(128, 64))
        self.logit_scale = nn.Parameter(torch.tensor(2.6))
        for name, number in (("input_resolution", 8), ("context_length", 6), ("vocab_size", 40)):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, image: torch.Tensor, text: torch.Tensor):
        x = (self.token_embedding(text) + self.positional_embedding).permute(1, 0, 2)
        x = self.ln_final(self.transformer(x)).permute(1, 0, 2)[:, -1] @ self.text_projection
        return self.visual(image), x * self.logit_scale.exp()


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


DTYPES = "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64".split()


class Odd(nn.Module):
    """Tensors of many types and of odd places in memory, amid attributes that are none."""

    def __init__(self):
        super().__init__()
        whole = torch.arange(24.0).view(4, 6)
        self.whole = nn.Parameter(whole)
        self.register_buffer("columns", whole.t()[1:, ::2])
        self.register_buffer("row", whole[2])
        self.register_buffer("repeated", torch.tensor([1.0, 2.0]).expand(3, 2))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)
        for name in DTYPES:
            self.register_buffer(f"of_{name}", torch.arange(3).to(getattr(torch, name)))
        self.twin = self.other_twin = nn.Linear(2, 2)
        self.listed = nn.ModuleList([nn.BatchNorm1d(2), nn.Identity()])
        self.named = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False)})
        self.parameters_too = nn.ParameterList([torch.ones(1), torch.zeros(2)])
        self.tensor, self.tensors = torch.ones(3), [torch.ones(1), torch.ones(2)]
        self.numbers, self.fractions, self.flags = [1, 2], [0.5], [True]
        self.words, self.pairs, self.pair = {"a": 1}, (1, "b", None), Pair(torch.ones(1), 2)
        self.text, self.imaginary, self.device_of, self.maybe = (
            "text",
            1j,
            torch.device("cpu"),
            torch.jit.annotate(int | None, None),
        )

    def forward(self, x: torch.Tensor):
        for module in self.listed:
            x = module(x)
        x = (
            self.twin(x)
            + self.other_twin(x)
            + self.tensor.sum()
            + self.tensors[0]
            + self.numbers[0]
            + self.whole.sum()
        )
        return x + self.words["a"] + self.pairs[0] + self.pair[1] + self.fractions[0] + len(self.text)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), name
        assert (ours[name].dtype, ours[name].shape) == (expected.dtype, expected.shape), name


@pytest.fixture(params=["scripted", "traced"])
def to_torchscript(request):
    def compile_module(module, *inputs):
        module.eval()
        return torch.jit.script(module) if request.param == "scripted" else torch.jit.trace(module, inputs)

    return compile_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torchscript_of_clip_gives_the_tensors_that_torch_loads(to_torchscript, tmp_path, dtype):
    torch.manual_seed(0)
    module = CLIP()
    inputs = torch.ones(1, 3, 8, 8), torch.ones(1, 6, dtype=torch.long)
    to_torchscript(module, *inputs).to(dtype).save(tmp_path / "clip.pt")
    ours = read_tensors(tmp_path / "clip.pt")
    assert_equal(ours, torch.jit.load(tmp_path / "clip.pt").state_dict())
    assert_equal(ours, module.state_dict())  # without any `attn_mask`
    assert ours["transformer.resblocks.1.mlp.c_fc.weight"].dtype == dtype
    text_tower, block = read_clip_text(tmp_path / "clip.pt").state_dict(), module.transformer.resblocks[1]
    for name, expected in (
        ("text_projection.weight", module.text_projection.T),
        ("text_model.embeddings.token_embedding.weight", module.token_embedding.weight),
        ("text_model.encoder.layers.1.self_attn.k_proj.bias", block.attn.in_proj_bias[128:256]),
        ("text_model.encoder.layers.1.mlp.fc1.weight", block.mlp.c_fc.weight),
    ):
        assert text_tower[name].dtype == torch.float32 and torch.equal(text_tower[name], expected.float()), name


def test_torchscript_gives_tensors_of_all_types_and_places_in_memory(to_torchscript, tmp_path):
    to_torchscript(Odd(), torch.ones(3, 2)).save(tmp_path / "odd.pt")
    ours = read_tensors(tmp_path / "odd.pt")
    theirs = torch.jit.load(tmp_path / "odd.pt").state_dict()
    assert_equal(ours, theirs)
    assert {name: tensor.stride() for name, tensor in ours.items()} == {n: t.stride() for n, t in theirs.items()}
    assert {"columns", "repeated", "empty", "of_bool", "of_complex64", "listed.0.running_var"} <= ours.keys()
    assert not ours.keys() & {"tensor", "nothing", "tensors", "pair"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("archive", [True, False])
def test_what_torch_saves_is_read_as_torch_does(tmp_path, archive, protocol):
    module = Odd()
    weights = module.state_dict()
    saved = {
        "epoch": 3,
        "best": 0.5,
        "state_dict": weights,
        "parameter": module.whole,
        "optimizer": {"state": {0: {}}},
    }
    saved["scheduler"] = torch.optim.lr_scheduler.MultiStepLR(
        torch.optim.Adam(module.twin.parameters()), milestones=[1, 2]
    ).state_dict()
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=archive, pickle_protocol=protocol)
    theirs = torch.load(tmp_path / "a.pth", weights_only=protocol == 2)["state_dict"]
    assert_equal(read_tensors(tmp_path / "a.pth"), theirs)


def test_an_archive_that_was_packed_again_is_read(tmp_path):
    torch.save({"a": torch.arange(5.0), "b": torch.arange(4)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for name in old.namelist():
            new.writestr("x" + name, old.read(name))
    assert_equal(read_tensors(tmp_path / "b.pth"), {"a": torch.arange(5.0), "b": torch.arange(4)})


WEIGHTS = {"a.weight": torch.ones(2), "b": torch.zeros(1)}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_are_found_under_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    saved = {f"{prefix}{name}": tensor for name, tensor in WEIGHTS.items()}
    torch.save(saved if wrapper is None else {"epoch": 1, wrapper: saved}, tmp_path / "a.pth")
    assert_equal(read_tensors(tmp_path / "a.pth"), WEIGHTS)


def test_a_compiled_part_is_found_and_a_name_that_stands_twice_is_refused():
    assert bare_state_dict({"a._orig_mod.weight": 1, "submodule.b": 2}) == {"a.weight": 1, "submodule.b": 2}
    with pytest.raises(ValueError, match="'b' stands in it twice"):
        bare_state_dict({"module.b": 1, "b": 2})


# --- hostile ones -------------------------------------------------------------------------------------------------


def test_torchscript_that_would_write_a_file_is_refused_and_writes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Written()).save("a.pt")
    with pytest.raises(
        ValueError, match=r"a.pt asks for __torch__.*Written.__setstate__.* nothing in it was run: get"
    ):
        read_tensors("a.pt")
    assert not Path("written").exists()
    torch.jit.load("a.pt")
    assert Path("written").exists()  # so it would have been


def test_prefixes_without_end_take_no_time():
    start = time.monotonic()
    assert bare_state_dict({"module." * 300_000 + "a": 1, "module": 2, "module.module.b.module.c": 3}) == {
        "a": 1,
        "module": 2,
        "b.module.c": 3,
    }
    assert time.monotonic() - start < SECONDS


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


CLAIMS = {  # what is written, and what is said
    "claims more than its storage": (state_dict(tensor(shape=(5,), numel=5)), "'t0' reaches beyond its storage"),
    "offset outside": (state_dict(tensor(offset=1)), "'t0' reaches beyond its storage"),
    "stride outside": (state_dict(tensor(stride=(2,))), "'t0' reaches beyond its storage"),
    "gigantic": (state_dict(tensor(shape=(2**62, 2**62), stride=(1, 1))), "'t0' reaches beyond its storage"),
    "expanded": (state_dict(tensor(shape=(2**40,), stride=(0,))), r"take 4,398,046,511,104 bytes, but the file has"),
    "expanded beyond any number": (state_dict(tensor(shape=(2**62, 2**62), stride=(0, 0))), "bytes, but the file has"),
    "no such storage": (state_dict(tensor(key="1")), "storage 1 is missing"),
    "no tensor": (state_dict(b"K\x01"), "'t0' is a int, not a plain tensor"),
    "no text as name": (b"\x80\x02}(K\x01" + tensor() + b"u.", "1 names weights: names are text"),
    "nested": (state_dict(b"}(" + text("a") + tensor() + b"u"), "'t0' is a dict, not a plain tensor"),
    "itself": (b"\x80\x02}q\0(" + text("state_dict") + b"h\0u.", "'state_dict' is a dict, not a plain tensor"),
    "a list": (b"\x80\x02].", "holds no state dict"),
    "nothing": (b"\x80\x02}.", "holds no state dict"),
    "no numbers, but sides beyond any number": (
        state_dict(tensor(shape=(2**62, 2**62, 0), stride=(1, 1, 1))),
        "no PyTorch checkpoint .*overflow",
    ),
}


def script(**attributes):
    """The pickle of a TorchScript's module."""
    return b"c__torch__\nM\n)\x81}(" + b"".join(text(name) + value for name, value in attributes.items()) + b"ub"


def many_of(value, count):
    """Attributes that are one and the same object."""
    return {"m": value + b"q\1"} | {f"m{index}": b"h\1" for index in range(1, count)}


PARAMETERS = [f"q{index}" for index in range(1_000)]
TORCHSCRIPT = {  # the same, with a class that has one parameter and one submodule
    "modules in one another without end": (b"\x80\x02c__torch__\nM\n)\x81q\0}(" + text("m") + b"h\0ub.", "too deep"),
    "modules twice as many at each step": (
        b"\x80\x02"
        + b"N"
        + b"".join(
            b"c__torch__\nM\n)\x81}(" + text("a") + b"h\0" + text("b") + b"h\0ubq\0"
            if step
            else b"c__torch__\nM\n)\x81}" + b"bq\0"
            for step in range(60)
        )
        + b".",
        "too many",
    ),
    "a long name before many": (
        b"\x80\x02" + script(**{"c" * 10**6: script(**many_of(script(), 60_000))}) + b".",
        "is named 'ccc.*, which is too long",
    ),
    "an attribute without a name": (b"\x80\x02c__torch__\nM\n)\x81}NNsb.", "is named None, which is .* no text"),
    "the same parameters of many modules": (
        b"\x80\x02" + script(**many_of(script(**dict.fromkeys(PARAMETERS, tensor())), 40_000)) + b".",
        "too many attributes",
    ),
    "a module without source": (b"\x80\x02c__torch__.x\nM\n)\x81}b.", "code/__torch__/x.py is missing"),
    "a path as source": (b"\x80\x02c__torch__.../x\nM\n)\x81}b.", "is missing"),
    "no attributes": (b"\x80\x02c__torch__\nM\n)\x81K\1b.", "asks for __torch__.M.__setstate__"),
    "a number as parameter": (b"\x80\x02c__torch__\nM\n)\x81}(" + text("p") + b"K\1ub.", "'p' is a int"),
    "no modules": (b"\x80\x02c__torch__\nN\n)\x81}b.", "holds no state dict"),
    "other arguments": (b"\x80\x02c__torch__\nM\nK\1\x85\x81}b.", "makes an object"),
    "os.system inside": (
        b"\x80\x02c__torch__\nM\n)\x81}(" + text("p") + b"cposix\nsystem\n" + text("touch written") + b"\x85Rub.",
        "asks for posix.system",
    ),
}
NAMES = "".join(f'"{name}", ' for name in ["p", *PARAMETERS])
SOURCE = f"class M(Module):\n  __parameters__ = [{NAMES}]\n  __buffers__ = []\nclass N:\n  p : Tensor\n"


@pytest.mark.slow
def test_hostile_claims_get_one_sentence_soon_and_with_little_memory(tmp_path):
    cases = [(name, content, said, {}) for name, (content, said) in CLAIMS.items()]
    cases += [(name, content, said, {"a/code/__torch__.py": SOURCE}) for name, (content, said) in TORCHSCRIPT.items()]
    paths = [tmp_path / f"{index}.pth" for index in range(len(cases))]
    for path, (_, content, _, others) in zip(paths, cases):
        write_archive(path, content, **others)
    assert_refused(paths, {name: said for name, _, said, _ in cases}, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pth"] * len(cases)


def with_storage(path):
    write_archive(path, state_dict(tensor((2**18,)) + b"q\0", *[b"h\0"] * 3), bytes(2**20))


def packed(path):
    write_archive(path, state_dict(tensor((2**25,))), bytes(2**27), zipfile.ZIP_DEFLATED)


def packed_pickle(path):
    write_archive(path, b"\x80\x02" + b"}" * 2**26 + b".", compression=zipfile.ZIP_DEFLATED)


def claims_a_smaller_pickle(path):
    packed_pickle(path)
    data = path.read_bytes().replace((2**26 + 3).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    path.write_bytes(data)


def many_entries(path):
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(9_000):
            archive.writestr(f"{index:01000}", b"")


def overlapping(path):
    """Ten thousand storages that are one and the same megabyte of the file."""
    write_archive(path, state_dict(*[tensor((2**18,), key=str(index)) for index in range(3000)]), bytes(2**20))
    with zipfile.ZipFile(path, "a") as archive:
        storage = archive.getinfo("a/data/0")
        for index in range(1, 3000):
            copy = zipfile.ZipInfo(f"a/data/{index}")
            copy.CRC, copy.file_size, copy.compress_size = storage.CRC, storage.file_size, storage.compress_size
            copy.header_offset = storage.header_offset
            archive.filelist.append(copy)
        archive._didModify = True


def flipped(path):
    write_archive(path, state_dict(tensor()))
    data = path.read_bytes()
    path.write_bytes(data.replace(bytes(16), b"\1" + bytes(15), 1))


def cut_short(path):
    torch.save({"a": torch.ones(1000)}, path)
    os.truncate(path, 3000)


def old_cut_short(path):
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    os.truncate(path, 3000)


def old_claims_more(path):
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace((1000).to_bytes(8, "little"), (2**40).to_bytes(8, "little")))


def old_that_runs(path):
    torch.save({"a": Calls(os.system, "touch written")}, path, _use_new_zipfile_serialization=False)


def endless_zeros(path):
    path.touch()
    os.truncate(path, 2**40)


def endless_text(path):
    path.write_bytes(b"\x80\x02X\xff\xff\xff\xff")
    os.truncate(path, 2**40)


def big_endian(path):
    write_archive(path, state_dict(tensor()), **{"a/byteorder": b"big"})


def two_pickles(path):
    write_archive(path, state_dict(tensor()), **{"b/data.pkl": state_dict(tensor())})


def long_source(path):
    script = b"\x80\x02c__torch__\nM\n)\x81}(" + text("p") + tensor() + b"ub."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", script)
        archive.writestr("a/code/__torch__.py", "class M(Module):\n" + "\n" * 2**26, zipfile.ZIP_DEFLATED)


FILES = [
    (with_storage, "its tensors take 4,194,304 bytes, but the file has"),
    (packed, "packed|cut short"),
    (packed_pickle, "data.pkl' in it is larger than"),
    (claims_a_smaller_pickle, "cut short or damaged|no PyTorch checkpoint"),
    (many_entries, "a part is too large"),
    (overlapping, "storages overlap"),
    (flipped, "cut short or damaged"),
    (cut_short, "cut short or damaged"),
    (old_cut_short, "cut short or damaged"),
    (old_claims_more, "cut short or damaged"),
    (old_that_runs, "asks for posix.system"),
    (endless_zeros, "no PyTorch checkpoint"),
    (endless_text, "no PyTorch checkpoint"),
    (big_endian, "byte order of another machine"),
    (two_pickles, "archive of something else"),
    (long_source, "larger than 16,777,216 bytes or packed by a method"),
    (lambda path: path.write_bytes(b""), "no PyTorch checkpoint"),
    (lambda path: path.write_bytes(b"PK\3\4"), "cut short or damaged"),
    (
        lambda path: path.write_text("<html>not found</html>"),
        "no PyTorch checkpoint .its first bytes are not those of torch.save.: give",
    ),
    (lambda path: zipfile.ZipFile(path, "w").close(), "no PyTorch checkpoint"),
    (lambda path: torch.save([torch.ones(1)], path), "holds no state dict"),
    (lambda path: torch.save({"a": torch.ones(2, 2).to_sparse()}, path), "'a' is a sparse tensor"),
    (lambda path: torch.save({"a": torch.ones(2, 2).to_sparse_csr()}, path), "'a' is a sparse tensor"),
    (
        lambda path: torch.save({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, path),
        "'a' is a quantised tensor",
    ),
    (lambda path: torch.save({"a": torch.nested.nested_tensor([torch.ones(2)])}, path), "'a' is a nested tensor"),
    (lambda path: torch.save({"a": torch.ones(2, device="meta")}, path), "'a' is a tensor without numbers"),
    (lambda path: torch.save({"a": torch.ones(2, dtype=torch.complex64).conj()}, path), "'a' is a conjugated"),
    (lambda path: path.mkdir(), "is no regular file: give"),
    (os.mkfifo, "is no regular file: give"),
    (lambda path: path.symlink_to("/dev/zero"), "is no regular file: give"),
    (lambda path: None, "does not exist: give"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*nested tensors|.*Sparse CSR:UserWarning")
def test_files_that_are_no_whole_checkpoints_get_one_sentence_too(tmp_path):
    (tmp_path / "files").mkdir()
    paths = [tmp_path / "files" / f"{index}.pth" for index in range(len(FILES))]
    for path, (make, _) in zip(paths, FILES):
        make(path)
    assert_refused(paths, {f"{index}: {make.__name__}": said for index, (make, said) in enumerate(FILES)}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


@pytest.mark.parametrize("kind", ["archive", "old", "torchscript"])
def test_a_file_with_other_bytes_is_read_or_refused_and_nothing_else(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "torchscript":
        torch.jit.script(Odd()).save("whole")
    else:
        torch.save({"state_dict": Odd().state_dict()}, "whole", _use_new_zipfile_serialization=kind == "archive")
    entries = {"whole": Path("whole").read_bytes()}
    if kind != "old":
        with zipfile.ZipFile("whole") as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
    random = Random(0)
    refused = 0
    for _ in range(300):
        name = next(name for name in entries if name.endswith(("data.pkl", "whole")))
        changed = bytearray(entries[name])
        for _ in range(random.choice([1, 2, 5])):
            changed[random.randrange(min(len(changed), 4000))] = random.randrange(256)
        if kind == "old":
            Path("changed").write_bytes(changed)
        else:  # with checksums that are right again
            with zipfile.ZipFile("changed", "w") as archive:
                for other, data in entries.items():
                    archive.writestr(other, changed if other == name else data)
        try:
            read_tensors("changed")
        except (ValueError, OSError) as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1500
    assert refused > 200
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "changed"}


# --- saved tensors against what is expected -----------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_counted_and_one_of_each_kind_is_named():
    expected = {"a": (1,), "b": (2, 3), "c": (), "d": (4,)}
    check_shapes(dict(expected), expected)
    with pytest.raises(ValueError) as caught:
        check_shapes({"b": (2, 3), "c": (1,), "d": (4, 1), "x" * 1000: (5,)}, expected, "Get it again.")
    assert str(caught.value) == (
        "what is saved does not fit the configuration: 1 tensor is missing, 1 is unexpected and 2 have another shape, "
        "such as a (saved: nothing, expected: (1,)), "
        + "x" * 150
        + " … (saved: (5,), expected: nothing), c (saved: (1,), expected: ()). Get it again."
    )
    with pytest.raises(
        ValueError, match=r"^It is wrong: 2 tensors are missing, such as c \(.* a tensor\)\. Get it\.$"
    ):
        check_names(["a", "b"], expected, "Get it.", "It is wrong")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), -1.0])
def test_numbers_that_no_model_can_use_are_found_in_any_type(dtype, number):
    spoiled = torch.tensor([1.0, number, 2.0]).to(dtype)
    fine = {"empty": torch.empty(0), "whole": torch.ones(2, dtype=torch.long), "meta": torch.ones(2, device="meta")}
    finite = bool(spoiled.float().isfinite().all())  # as is all but NaN in float8_e4m3fn, which has no infinity
    assert first_not_finite(fine | {"weight": spoiled}) == (None if finite else "weight")
    assert first_not_finite(fine | {"running_var": spoiled}) == (None if finite and number > 0 else "running_var")
    assert first_not_finite(fine | {"weight": torch.ones(2).to(dtype)}) is None


def test_numbers_that_float32_cannot_hold_are_found():
    with pytest.raises(ValueError, match="tensor b holds NaN or infinity, or a negative variance. Take weights of"):
        check_finite({"a": torch.tensor(3e38, dtype=torch.float64), "b": torch.tensor(1e300, dtype=torch.float64)})


def test_tensors_for_a_model_have_its_types_and_memory_of_their_own():
    shared = torch.arange(6.0, dtype=torch.float64)
    saved = {"a": shared[:3], "b": torch.ones(2, 3).t(), "c": torch.tensor(3, dtype=torch.uint8)}
    saved |= {"d": saved["b"], "e": torch.ones(4)}
    with torch.device("meta"):
        expected = {"e": torch.empty(4), "d": torch.empty(3, 2), "b": torch.empty(3, 2), "a": torch.empty(3)}
        expected["c"] = torch.empty((), dtype=torch.long)
    converted = tensors_for_model(saved, expected)
    assert list(converted) == list(expected) and converted["e"] is saved["e"]
    assert len({value.untyped_storage().data_ptr() for value in converted.values()}) == len(converted)
    for name, value in converted.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, saved[name].to(value.dtype)), name
    for wrong in (torch.ones(4, dtype=torch.long), torch.ones(4, dtype=torch.complex64), torch.ones(4) > 0):
        with pytest.raises(ValueError, match=f"e has numbers of type {wrong.dtype} instead of torch.float32. Save or"):
            tensors_for_model(saved | {"e": wrong}, expected)


def test_folders_with_pipes_are_refused_and_hub_ids_are_not(tmp_path):
    refuse_pipes("someone/model")
    (tmp_path / "folder").mkdir()
    (tmp_path / "config.json").touch()
    refuse_pipes(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    refuse_pipes(tmp_path)
    with pytest.raises(OSError, match="tokenizer.json is neither a file nor a folder: save or download"):
        refuse_pipes(tmp_path, broken_links=True)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "weights")
    with pytest.raises(OSError, match=f"weights is neither a file nor a folder: save or download {tmp_path} again"):
        refuse_pipes(tmp_path)
    for path in (tmp_path / "weights", "/dev/zero"):
        with pytest.raises(OSError, match="is neither a file nor a folder: give the path"):
            refuse_pipes(path)
