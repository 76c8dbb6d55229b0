"""PyTorch's files from strangers: the tensors of `torch.save` and of TorchScript, without running anything in them.

`torch.jit.load` runs code of the file. `torch.load(weights_only=True)` does not, but believes the sizes that a file
claims, and 200 bytes can keep it busy for ever. Here a pickle may name tensors and plain containers only, what they
claim is compared with the file, and the file is mapped, so that tensors take memory when they are used.
"""

import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import dropwhile
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

try:
    from .configuration_detris import as_value_error, one_line, short_repr
    from .untrusted_pickles import (
        MAX_NAME,
        MAX_PICKLE,
        ForbiddenGlobal,
        Placeholder,
        ScriptObject,
        TensorRecord,
        load_tensor_pickle,
    )
except ImportError:
    if __package__:
        raise
    from configuration_detris import as_value_error, one_line, short_repr
    from untrusted_pickles import (
        MAX_NAME,
        MAX_PICKLE,
        ForbiddenGlobal,
        Placeholder,
        ScriptObject,
        TensorRecord,
        load_tensor_pickle,
    )

MAX_READ = 2**23  # bytes at once, such as an archive's table of contents: 9,000 entries have 600,000
MAX_CODE = 2**24  # bytes of TorchScript's source code, unpacked
MAX_DEPTH = 64  # of a TorchScript's modules in one another
MAX_ATTRIBUTES = 100_000  # of all modules of a TorchScript; 36 layers of a transformer have 2,000
ALIGNMENT = 16  # bytes that torch's largest number has; torch.save aligns to 64, the older format does not
# How many times its size a file's tensors may take, since some may share memory.
SHARING = 2
ZIP, LOCAL_HEADER, LEGACY_MAGIC = b"PK\x03\x04", 30, 0x1950A86A20F9469CFC6C
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which training checkpoints keep the weights

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name

# --- files --------------------------------------------------------------------------------------------------------


class _BoundedFile(io.BufferedReader):
    """A file that refuses to read much at once: `zipfile` believes what an archive claims of its contents."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(MAX_READ + 1 if size is None or size < 0 or size > MAX_READ else size)
        if len(data) > MAX_READ:
            raise zipfile.BadZipFile("a part is too large")
        return data


class _Archive:
    """What `torch.save` writes today, and TorchScript: a zip of a pickle and storages."""

    def __init__(self, file: _BoundedFile) -> None:
        self._file, self._zip = file, zipfile.ZipFile(file)
        entries = [info for info in self._zip.infolist() if re.fullmatch(r"[^/]*/data\.pkl", info.filename)]
        if len(entries) != 1:
            raise ValueError("it is an archive of something else")
        self._root = entries[0].filename.removesuffix("data.pkl")
        if self._entry("byteorder", default=b"little") != b"little":
            raise ValueError("its numbers have the byte order of another machine")
        self.content, _ = load_tensor_pickle(io.BytesIO(self._entry("data.pkl")))

    def _entry(self, name: str, limit: int = MAX_PICKLE, default: bytes | None = None) -> bytes:
        try:
            info = self._zip.getinfo(self._root + name)
        except KeyError:
            if default is None:
                raise zipfile.BadZipFile(f"{name} is missing") from None
            return default
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.file_size > limit:
            raise ValueError(
                f"{short_repr(name)} in it is larger than {limit:,} bytes or packed by a method that torch does not "
                "use"
            )
        with self._zip.open(info) as entry:
            data = entry.read(limit + 1)  # `zipfile` gives no more than what it says
        return data

    def places(self, keys: set[str], size: int) -> dict[str, tuple[int, int]]:
        """Begin and end of storages in the file, whose checksums are compared."""
        places = {}
        for key in keys:
            try:
                info = self._zip.getinfo(f"{self._root}data/{key}")
            except KeyError:
                raise zipfile.BadZipFile(f"storage {key} is missing") from None
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError("its storages are packed, which torch.save does not do")
            self._file.seek(info.header_offset)
            name_size, extra_size = struct.unpack("<26xHH", self._file.read(LOCAL_HEADER))
            begin = info.header_offset + LOCAL_HEADER + name_size + extra_size
            places[key] = begin, begin + info.file_size
        if sum(end - begin for begin, end in places.values()) > size:
            raise zipfile.BadZipFile("storages overlap")
        for key in places:
            with self._zip.open(f"{self._root}data/{key}") as entry:
                while entry.read(2**20):
                    pass
        return places

    def source_of(self, module: str) -> str:
        """TorchScript's source code of a module."""
        return self._entry(f"code/{module.replace('.', '/')}.py", MAX_CODE).decode()


class _LegacyFile:
    """What `torch.save` wrote before torch 1.6: pickles, one after another, and the storages behind them."""

    def __init__(self, file: _BoundedFile) -> None:
        self._file = file
        pickles = io.BytesIO(file.read(3 * MAX_PICKLE // 2))
        try:
            known = load_tensor_pickle(pickles)[0] == LEGACY_MAGIC
        except (ValueError, EOFError):
            known = False
        if not known:
            raise ValueError("its first bytes are not those of torch.save")
        (_, _), (system, _) = load_tensor_pickle(pickles), load_tensor_pickle(pickles)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("its numbers have the byte order of another machine")
        self.content, self._storages = load_tensor_pickle(pickles)
        self._keys, _ = load_tensor_pickle(pickles)
        self._begin = pickles.tell()

    def places(self, keys: set[str], size: int) -> dict[str, tuple[int, int]]:
        """Begin and end of storages in the file."""
        if not isinstance(self._keys, list) or not all(type(key) is str for key in self._keys):
            raise ValueError("its list of storages is not a list of names")
        places, end = {}, self._begin
        for key in self._keys:
            self._file.seek(end)
            (numel,) = struct.unpack("<q", self._file.read(8))
            if key not in self._storages or key in places or numel < 0:
                raise ValueError(f"storage {short_repr(key)} belongs to no tensor")
            begin = end + 8
            end = begin + numel * self._storages[key].dtype.itemsize
            if end > size:
                raise EOFError
            places[key] = begin, end
        if not keys <= places.keys():
            raise EOFError
        return {key: places[key] for key in keys}


# --- weights ------------------------------------------------------------------------------------------------------


def _declared(source: str) -> dict[str, set[str] | None]:
    """Names of parameters and buffers of each module class in TorchScript's source; None if it has its own loading."""
    classes = {}
    for match in re.finditer(r"^class (\w+)\(Module\):\n((?: .*\n|\n)*)", source + "\n", re.MULTILINE):
        lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", match[2], re.MULTILINE)
        own_loading = re.search(r"^  def __setstate__\(", match[2], re.MULTILINE)
        classes[match[1]] = None if own_loading else {name for part in lists for name in re.findall(r'"(.*?)"', part)}
    return classes


def _script_tensors(root: ScriptObject, source_of: Callable[[str], str]) -> dict[str, Any]:
    """A TorchScript's parameters and buffers by name: what its `state_dict` would hold."""
    declared: dict[str, dict] = {}
    tensors, modules, count, code_size = {}, [("", root, 0)], 0, 0
    while modules:
        prefix, module, depth = modules.pop()
        place, name = module.script_class.module, module.script_class.name
        if place not in declared:
            source = source_of(place)
            code_size += len(source)
            declared[place] = _declared(source)
        if depth > MAX_DEPTH or code_size > MAX_CODE:
            raise ValueError("its modules are too deep in one another or have too much code")
        if name not in declared[place]:  # a class, but no module
            continue
        names = declared[place][name]
        if names is None or not isinstance(module.state, dict):
            raise ForbiddenGlobal(f"{place}.{name}.__setstate__")
        count += len(module.state)
        if count > MAX_ATTRIBUTES:
            raise ValueError("its modules have too many attributes")
        for key, value in module.state.items():
            if type(key) is not str or len(prefix) + len(key) > MAX_NAME:
                raise ValueError(f"an attribute of a module is named {short_repr(key)}, which is too long or no text")
            if isinstance(value, ScriptObject):
                modules.append((f"{prefix}{key}.", value, depth + 1))
            elif key in names and value is not None:
                tensors[f"{prefix}{key}"] = value
    return tensors


def bare_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """
    The weights of a checkpoint by their bare names.

    They may stand under one of `WRAPPERS`, and DataParallel's `module.` and `torch.compile`'s `_orig_mod.` in their
    names.

    Raises:
        ValueError: if two names become one, or one is no text.
    """
    for wrapper in WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    bare = {}
    for name, value in checkpoint.items():
        if not isinstance(name, str):
            raise ValueError(f"{short_repr(name)} names weights: names are text, so save the state_dict alone.")
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        bare_name = ".".join([*dropwhile("module".__eq__, parts[:-1]), *parts[-1:]])
        if bare_name in bare:
            raise ValueError(
                f"{short_repr(bare_name)} stands in it twice, once with a prefix: save the state_dict alone."
            )
        bare[bare_name] = value
    return bare


def require_file(path: str | os.PathLike, what: str) -> None:
    """Refuse with an OSError what is no regular file: reading a pipe would wait for ever, and a device has no end."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist: give the path of {what}.")
    if not os.path.isfile(path):
        raise OSError(f"{path} is no regular file: give the path of {what}.")


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Read the weights in a file of PyTorch: a state dict, a training checkpoint, or TorchScript; nothing in it is run.

    Returns:
        Tensors by their bare names. They stay in the file until they are used, and may share memory where they did.

    Raises:
        OSError: if the file is missing, no regular file, cut short or damaged.
        ValueError: if it is none of these, asks for what could run, holds other things than plain tensors among its
            weights, or tensors larger than the file.
    """
    require_file(path, "a checkpoint")
    with _BoundedFile(io.FileIO(path)) as file:
        size = os.fstat(file.fileno()).st_size
        with _naming_file(path):
            is_zip = file.read(len(ZIP)) == ZIP
            file.seek(0)
            stored_file = (_Archive if is_zip else _LegacyFile)(file)
            content = stored_file.content
            if isinstance(content, ScriptObject):
                content = _script_tensors(content, stored_file.source_of)
        if not isinstance(content, dict) or not content:
            raise ValueError(f"{path} holds no state dict: give a model's checkpoint.")
        try:
            stored = bare_state_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for name, tensor in stored.items():
            if not isinstance(tensor, TensorRecord):
                kind = tensor.kind if isinstance(tensor, Placeholder) else f"a {type(tensor).__name__}"
                raise ValueError(
                    f"{path} holds no state dict: {short_repr(name)} is {kind}, not a plain tensor. Save the model's "
                    "state_dict alone, dense and not quantised."
                )
        with _naming_file(path):
            places = stored_file.places({tensor.storage.key for tensor in stored.values()}, size)
    for name, tensor in stored.items():
        begin, end = places[tensor.storage.key]
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride))
        if 0 not in tensor.shape and (last + 1) * tensor.dtype.itemsize > end - begin:
            raise OSError(
                f"{path} is damaged: {short_repr(name)} reaches beyond its storage; copy or download it again."
            )
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in stored.values())
    if total > SHARING * size:
        raise ValueError(
            f"{path}: its tensors take {total:,} bytes, but the file has {size:,}: save them as copies (.clone()), "
            "not as views that repeat the same numbers."
        )
    whole = torch.UntypedStorage.from_file(os.fspath(path), False, size)
    storages = {}
    for key, (begin, end) in places.items():
        storages[key] = whole[begin:end] if begin % ALIGNMENT == 0 else whole[begin:end].clone()
    with _naming_file(path):  # torch refuses shapes of no numbers whose other sides are too long
        return {name: _tensor(kept, storages[kept.storage.key]) for name, kept in stored.items()}


def _tensor(stored: TensorRecord, storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=stored.dtype, device="cpu").set_(storage, stored.offset, stored.shape, stored.stride)


@contextmanager
def _naming_file(path: str | os.PathLike) -> Iterator[None]:
    """Name the file in the errors raised inside, and say what to do."""
    try:
        yield
    except ForbiddenGlobal as error:
        raise ValueError(
            f"{path} asks for {one_line(error)}, which is neither a tensor nor a plain container; nothing in it was "
            "run: get the file from those who published it, or save its state_dict alone."
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, OSError) as error:
        reason = f" ({one_line(error)})" if str(error) else ""
        raise OSError(f"{path} is cut short or damaged{reason}: copy or download it again.") from None
    except (ValueError, OverflowError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no PyTorch checkpoint ({one_line(error)}): give a .pth file that torch.save wrote."
        ) from None


# --- saved tensors against what is expected ------------------------------------------------------------------------


def check_shapes(given: Shapes, expected: Shapes) -> None:
    """Refuse saved tensors whose names and shapes are not those that a configuration asks for with a `ValueError`."""
    wrong = [name for name in given.keys() | expected.keys() if given.get(name) != expected.get(name)]
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"what is saved does not fit the configuration: {len(wrong)} tensors are missing, too many or of another "
            f"shape than it says, such as {name} (saved: {given.get(name, 'nothing')}, expected: "
            f"{expected.get(name, 'nothing')}). Save or download it again."
        )


def first_not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds NaN, infinity, or a negative variance, whose root is NaN."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        if tensor.dtype == torch.float64:  # what float32 cannot hold becomes infinite
            tensor = tensor.float()
        if not tensor.isfinite().all() or (name.endswith("running_var") and (tensor < 0).any()):
            return name
    return None


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that `first_not_finite` finds with a `ValueError` that names the first of them."""
    name = first_not_finite(tensors)
    if name is not None:
        raise ValueError(
            f"the tensor {name} holds NaN or infinity, or a negative variance: take weights of a run that did not "
            "diverge."
        )


def shapes_of(tensors: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def saved_shapes(source: str | os.PathLike, names: Iterable[str], **hub_kwargs: Any) -> Shapes:
    """
    Read the names and shapes of saved tensors off the headers of their files, which takes no memory.

    Args:
        source: folder or Hub id.
        names: files to look for; the first that is there counts. An index leads to its shards.
        hub_kwargs: `revision`, `token` and so on for the Hub.

    Returns:
        `dict` from each tensor's name to its shape; empty where there is none of the files.

    Raises:
        OSError: if a file is damaged or no regular file.
        ValueError: if an index names no files beside it.
    """
    for name in names:
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if file is None:
            continue
        files = [file]
        if name.endswith(".index.json"):
            with as_value_error(f"{file} is no index of weights"), open(file, encoding="utf-8") as index:
                shards = sorted(set(json.load(index)["weight_map"].values()))
                if not shards or any(os.path.basename(shard) != shard for shard in shards):
                    raise ValueError(f"{file} names no files beside it: save or download it again.")
            files = [cached_file(source, shard, **hub_kwargs) for shard in shards]
        return {tensor: shape for file in files for tensor, shape in _file_shapes(file).items()}
    return {}


def _file_shapes(file: str) -> Shapes:
    if not os.path.isfile(file):  # a pipe would be waited for
        raise OSError(f"{file} is no regular file: save or download it again.")
    try:
        with as_value_error("it is cut short or damaged"):
            if file.endswith(".safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
            # torch maps no files of the format that it wrote before version 1.6.
            mapped = zipfile.is_zipfile(file)
            shapes = shapes_of(torch.load(file, map_location="meta", weights_only=True, mmap=mapped))
            if sum(map(math.prod, shapes.values())) > os.path.getsize(file):  # a number takes a byte at least
                raise ValueError("its tensors claim more numbers than it has bytes")
            return shapes
    except ValueError as error:
        raise OSError(f"{file} cannot be read ({error}): save or download it again.") from error


def skeleton(model_class: type[nn.Module], config: PreTrainedConfig) -> nn.Module:
    """A model whose tensors have names and shapes, and take no memory; ValueError if the configuration cannot be."""
    with as_value_error("No model can be built from its configuration"), torch.device("meta"):
        return model_class(config)
