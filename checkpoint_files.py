"""Tensors in files from strangers: read without running anything in them, and compared with what a model expects.

[`read_tensors`] reads files that `torch.save` or TorchScript wrote. PyTorch's own readers are not safe enough:
`torch.jit.load` runs code that a file contains, and `torch.load(weights_only=True)` believes the sizes that a file
claims, so that 200 bytes can keep it busy for ever. Here a pickle may name tensors and plain containers only, its
claims are compared with the file, and the file is mapped into memory, so that a tensor takes memory when it is used.

[`check_shapes`], [`check_finite`] and [`tensors_for_model`] check names, shapes and numbers of saved tensors for the
whole project, whatever kind of file the tensors come from.
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
from pathlib import Path
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
    from .configuration_detris import as_value_error, errors_begin_with, one_line, short_repr
    from .untrusted_pickles import (
        MAX_PICKLE,
        MAX_TENSOR_NAME,
        ForbiddenGlobal,
        Placeholder,
        ScriptObject,
        TensorRecord,
        load_tensor_pickle,
    )
except ImportError:
    if __package__:
        raise
    from configuration_detris import as_value_error, errors_begin_with, one_line, short_repr
    from untrusted_pickles import (
        MAX_PICKLE,
        MAX_TENSOR_NAME,
        ForbiddenGlobal,
        Placeholder,
        ScriptObject,
        TensorRecord,
        load_tensor_pickle,
    )

MAX_READ = 2**23  # bytes that are read at once, such as an archive's table of contents: 9,000 entries have 600,000
MAX_CODE = 2**24  # bytes of a TorchScript's source code, unpacked
MAX_DEPTH = 64  # levels of modules inside modules in a TorchScript
MAX_ATTRIBUTES = 100_000  # of all modules of a TorchScript together; 36 layers of a transformer have 2,000
ALIGNMENT = 16  # bytes of torch's largest number; torch.save aligns storages to 64 bytes, its older format does not
MAX_SHARING = 2  # how many times the file's size its tensors may take in all, since some may share memory
MAX_SHOWN_NAME = 150  # characters of a tensor's name in an error's message
ZIP_MAGIC, ZIP_LOCAL_HEADER_SIZE, LEGACY_MAGIC = b"PK\x03\x04", 30, 0x1950A86A20F9469CFC6C
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training checkpoints keep the weights
# In which types the tensors of a model may be stored. Types narrower than float16 need scales, which none of the
# checkpoints that are read here has.
STORED_AS = {
    torch.float32: (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    torch.int64: (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}
SAVE_AGAIN = "Save or download it again."
MISFIT = "what is saved does not fit the configuration"

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Read the weights in a file of PyTorch: a state dict, a training checkpoint, or TorchScript; nothing in it is run.

    Returns:
        `dict` from the tensors' bare names to the tensors. They stay in the file until they are used, and share memory
        where they did when they were saved.

    Raises:
        OSError: if the file is missing, no regular file, cut short or damaged.
        ValueError: if it is none of these, asks for code, holds anything but plain tensors among its weights, or
            claims tensors larger than itself.
    """
    require_file(path, "give the path of a checkpoint")
    with _BoundedFile(io.FileIO(path)) as file:
        size = os.fstat(file.fileno()).st_size
        with _file_errors(path):
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
            file.seek(0)
            checkpoint = (_ZipCheckpoint if is_zip else _LegacyCheckpoint)(file)
            content = checkpoint.content
            if isinstance(content, ScriptObject):
                content = _script_state_dict(content, checkpoint.source_of)
        records = _records_of_weights(path, content)
        with _file_errors(path):
            places = checkpoint.find_storages({record.storage.key for record in records.values()}, size)
    _check_claims(path, records, places, size)
    whole = torch.UntypedStorage.from_file(os.fspath(path), False, size)
    storages = {}
    for key, (begin, end) in places.items():
        storages[key] = whole[begin:end] if begin % ALIGNMENT == 0 else whole[begin:end].clone()
    with _file_errors(path):  # torch refuses tensors without numbers whose other sides are too long
        return {name: _make_tensor(record, storages[record.storage.key]) for name, record in records.items()}


def _records_of_weights(path: str | os.PathLike, content: Any) -> dict[str, TensorRecord]:
    """Find the weights in what a checkpoint's pickle holds; raises ValueError if there is anything else among them."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state dict: give a model's checkpoint.")
    try:
        records = bare_state_dict(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, record in records.items():
        if not isinstance(record, TensorRecord):
            kind = record.kind if isinstance(record, Placeholder) else f"a {type(record).__name__}"
            raise ValueError(
                f"{path} holds no state dict: {short_repr(name)} is {kind}, not a plain tensor. Save the model's "
                "state_dict alone, dense and not quantised."
            )
    return records


def _check_claims(
    path: str | os.PathLike, records: dict[str, TensorRecord], places: dict[str, tuple[int, int]], size: int
) -> None:
    """Refuse tensors that reach beyond their storages, or that take far more memory than their file."""
    for name, record in records.items():
        begin, end = places[record.storage.key]
        last = record.offset + sum((n - 1) * step for n, step in zip(record.shape, record.stride))
        if 0 not in record.shape and (last + 1) * record.dtype.itemsize > end - begin:
            raise OSError(
                f"{path} is damaged: {short_repr(name)} reaches beyond its storage; copy or download it again."
            )
    total = sum(math.prod(record.shape) * record.dtype.itemsize for record in records.values())
    if total > MAX_SHARING * size:
        raise ValueError(
            f"{path}: its tensors take {total:,} bytes, but the file has {size:,}: save them as copies (.clone()), "
            "not as views that repeat the same numbers."
        )


def _make_tensor(record: TensorRecord, storage: torch.UntypedStorage) -> torch.Tensor:
    empty = torch.empty(0, dtype=record.dtype, device="cpu")
    return empty.set_(storage, record.offset, record.shape, record.stride)


@contextmanager
def _file_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn the errors that a broken or hostile file causes into one sentence that names the file and a remedy."""
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


def bare_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """
    Find the weights in a checkpoint, and strip their names of what wrappers of the model put in front.

    Args:
        checkpoint: a state dict, or a mapping that has one under a key of `WRAPPERS`. `DataParallel` puts `module.` in
            front of a name, and `torch.compile` puts `_orig_mod.` in front of it or into it.

    Raises:
        ValueError: if two names become the same, or one is no text.
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


def require_file(path: str | os.PathLike, remedy: str) -> None:
    """Refuse what is no regular file with an OSError: reading a pipe would wait for ever, and a device has no end.

    Args:
        remedy: what the error tells users to do, such as "give the path of a checkpoint".
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist: {remedy}.")
    if not os.path.isfile(path):
        raise OSError(f"{path} is no regular file: {remedy}.")


def refuse_pipes(source: str | os.PathLike, broken_links: bool = False) -> None:
    """Refuse a pipe or device, or a folder that holds one, with an OSError; whoever reads it would wait for ever.

    With `broken_links`, links to nothing are refused too. What does not exist passes: it may be a Hub id.
    """
    exists = os.path.lexists if broken_links else os.path.exists
    if os.path.isdir(source):
        paths, remedy = Path(source).iterdir(), f"save or download {source} again"
    else:
        paths, remedy = [Path(source)], "give the path of a file or folder"
    for path in paths:
        if exists(path) and not (path.is_file() or path.is_dir()):
            raise OSError(f"{path} is neither a file nor a folder: {remedy}.")


# --- file formats --------------------------------------------------------------------------------------------------


class _BoundedFile(io.BufferedReader):
    """A file that refuses to read much at once, because `zipfile` believes the sizes that an archive claims."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(MAX_READ + 1 if size is None or size < 0 or size > MAX_READ else size)
        if len(data) > MAX_READ:
            raise zipfile.BadZipFile("a part is too large")
        return data


class _ZipCheckpoint:
    """The format of TorchScript and of today's `torch.save`: a zip archive of a pickle and the storages."""

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
            data = entry.read(limit + 1)  # `zipfile` gives no more than the size that was compared above
        return data

    def find_storages(self, keys: set[str], size: int) -> dict[str, tuple[int, int]]:
        """Find where storages begin and end in the file of `size` bytes, and compare their checksums."""
        places = {}
        for key in keys:
            try:
                info = self._zip.getinfo(f"{self._root}data/{key}")
            except KeyError:
                raise zipfile.BadZipFile(f"storage {key} is missing") from None
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError("its storages are packed, which torch.save does not do")
            self._file.seek(info.header_offset)
            name_size, extra_size = struct.unpack("<26xHH", self._file.read(ZIP_LOCAL_HEADER_SIZE))
            begin = info.header_offset + ZIP_LOCAL_HEADER_SIZE + name_size + extra_size
            places[key] = begin, begin + info.file_size
        if sum(end - begin for begin, end in places.values()) > size:
            raise zipfile.BadZipFile("storages overlap")
        for key in places:
            with self._zip.open(f"{self._root}data/{key}") as entry:
                while entry.read(2**20):
                    pass
        return places

    def source_of(self, module: str) -> str:
        """Read the source code of a Python module in TorchScript, such as `__torch__.clip.model`."""
        return self._entry(f"code/{module.replace('.', '/')}.py", MAX_CODE).decode()


class _LegacyCheckpoint:
    """The format of `torch.save` before torch 1.6: several pickles, one after another, then the storages."""

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

    def find_storages(self, keys: set[str], size: int) -> dict[str, tuple[int, int]]:
        """Find where storages begin and end in the file of `size` bytes."""
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


# --- TorchScript ---------------------------------------------------------------------------------------------------


def _parse_module_classes(source: str) -> dict[str, set[str] | None]:
    """Find the module classes in TorchScript's source, and the names of each one's parameters and buffers.

    Classes that have code of their own for loading are mapped to None.
    """
    classes = {}
    for match in re.finditer(r"^class (\w+)\(Module\):\n((?: .*\n|\n)*)", source + "\n", re.MULTILINE):
        lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", match[2], re.MULTILINE)
        own_loading = re.search(r"^  def __setstate__\(", match[2], re.MULTILINE)
        classes[match[1]] = None if own_loading else {name for part in lists for name in re.findall(r'"(.*?)"', part)}
    return classes


def _script_state_dict(root: ScriptObject, source_of: Callable[[str], str]) -> dict[str, Any]:
    """Collect the parameters and buffers of a TorchScript's modules by name, as its `state_dict` would."""
    declared: dict[str, dict] = {}
    tensors, modules, count, code_size = {}, [("", root, 0)], 0, 0
    while modules:
        prefix, module, depth = modules.pop()
        place, name = module.script_class.module, module.script_class.name
        if place not in declared:
            source = source_of(place)
            code_size += len(source)
            declared[place] = _parse_module_classes(source)
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
            if type(key) is not str or len(prefix) + len(key) > MAX_TENSOR_NAME:
                raise ValueError(f"an attribute of a module is named {short_repr(key)}, which is too long or no text")
            if isinstance(value, ScriptObject):
                modules.append((f"{prefix}{key}.", value, depth + 1))
            elif key in names and value is not None:
                tensors[f"{prefix}{key}"] = value
    return tensors


# --- saved tensors against what is expected ------------------------------------------------------------------------


def check_shapes(given: Shapes, expected: Shapes, remedy: str = SAVE_AGAIN, what: str = MISFIT) -> None:
    """
    Refuse saved tensors whose names and shapes are not exactly those that a configuration asks for.

    Args:
        given: the shapes of what is saved.
        expected: the shapes that the configuration asks for.
        remedy: the last sentence of the error.
        what: how the error begins.

    Raises:
        ValueError: if a tensor is missing, unexpected or of another shape; counts them, and names one of each kind.
    """
    misshapen = {name for name in given.keys() & expected.keys() if given[name] != expected[name]}
    kinds = (
        (expected.keys() - given.keys(), "is missing", "are missing"),
        (given.keys() - expected.keys(), "is unexpected", "are unexpected"),
        (misshapen, "has another shape", "have another shape"),
    )
    counts, examples = [], []
    for names, singular, plural in kinds:
        if names:
            noun = "" if counts else "tensor " if len(names) == 1 else "tensors "
            counts.append(f"{len(names)} {noun}{singular if len(names) == 1 else plural}")
            name = min(names)
            saved, wanted = given.get(name, "nothing"), expected.get(name, "nothing")
            examples.append(f"{one_line(name, MAX_SHOWN_NAME)} (saved: {saved}, expected: {wanted})")
    if counts:
        told = " and ".join([", ".join(counts[:-1]), counts[-1]] if counts[1:] else counts)
        raise ValueError(f"{what}: {told}, such as {', '.join(examples)}. {remedy}")


def check_names(given: Iterable[str], expected: Iterable[str], remedy: str = SAVE_AGAIN, what: str = MISFIT) -> None:
    """Refuse saved tensors as [`check_shapes`] does, but by their names alone, before shapes to expect are known."""
    check_shapes(dict.fromkeys(given, "a tensor"), dict.fromkeys(expected, "a tensor"), remedy, what)


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Find the first tensor that holds NaN, infinity, or a negative variance, whose root would be NaN; by its name."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
            continue
        if tensor.dtype.itemsize == 1:  # torch compares no numbers of 8 bits
            tensor = tensor.float()
        # Unlike `isfinite`, this takes no memory. What float32 cannot hold becomes infinite when a model loads it.
        lowest, highest = (number.float() for number in tensor.aminmax())
        if not (lowest.isfinite() and highest.isfinite()) or (name.endswith("running_var") and lowest < 0):
            return name
    return None


def check_finite(
    tensors: Mapping[str, torch.Tensor], remedy: str = "Take weights of a run that did not diverge."
) -> None:
    """Refuse tensors that [`first_not_finite`] finds with a ValueError that names the first and ends with `remedy`."""
    name = first_not_finite(tensors)
    if name is not None:
        raise ValueError(f"the tensor {name} holds NaN or infinity, or a negative variance. {remedy}")


def require_plain_tensors(tensors: Mapping[str, Any]) -> None:
    """Refuse what has no sizes to read, or no numbers, with a ValueError that names the first of them."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            kind = f"a {type(tensor).__name__}"
        elif tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
            kind = "a sparse, nested or quantised tensor"
        elif tensor.numel() == 0:
            kind = "an empty tensor"
        else:
            continue
        raise ValueError(f"{short_repr(name)} is {kind}: save the model's state_dict alone, dense and not quantised.")


def tensors_for_model(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    remedy: str = SAVE_AGAIN,
    what: str = MISFIT,
) -> dict[str, torch.Tensor]:
    """
    Check saved tensors against those of a model, and convert them to the model's types.

    Args:
        tensors: what is saved, by name.
        expected: the model's tensors by the same names; only their shapes and types are used.
        remedy: the last sentence of an error.
        what: how an error begins.

    Returns:
        `dict` from name to tensor, in the order of `expected`. No two tensors share memory; those that need no change
        are the given ones.

    Raises:
        ValueError: if names or shapes are others, a type cannot be converted without loss of meaning, or a number is
            NaN or infinite.
    """
    check_shapes(shapes_of(tensors), shapes_of(expected), remedy, what)
    converted, storages = {}, set()
    for name, model_tensor in expected.items():
        tensor, dtype = tensors[name], model_tensor.dtype
        if tensor.dtype not in STORED_AS[dtype]:
            raise ValueError(f"{what}: {name} has numbers of type {tensor.dtype} instead of {dtype}. {remedy}")
        tensor = tensor.to(dtype).contiguous()
        with errors_begin_with(what):
            check_finite({name: tensor}, remedy)
        if not tensor.is_meta:
            storage = tensor.untyped_storage().data_ptr()
            tensor = tensor.clone() if storage in storages else tensor
            storages.add(storage)
        converted[name] = tensor
    return converted


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Return the shapes of tensors by their names."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def hub_kwargs_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where on the Hub, and how, files are looked for."""
    return {name: kwargs[name] for name in (*HUB_KWARGS, "subfolder") if name in kwargs}


def weight_files(variant: str | None) -> list[str]:
    """Names of the files that may hold the weights of a saved model, of a variant if one is given."""
    names = [name for name in WEIGHT_FILES if name.endswith(".safetensors") or "safetensors.index" in name]
    return [f".{variant}.".join(name.rsplit(".", 1)) for name in names] if variant else names


def saved_shapes(source: str | os.PathLike, names: Iterable[str], **hub_kwargs: Any) -> Shapes:
    """
    Read the names and shapes of saved tensors off the headers of their files, which takes no memory.

    Args:
        source: folder or Hub id.
        names: of files to look for. The first that exists is read; if it is an index, all its shards are.
        hub_kwargs: `revision`, `token` and so on for the Hub.

    Returns:
        `dict` from each tensor's name to its shape; empty if none of the files exists.

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
        return {tensor: shape for file in files for tensor, shape in _shapes_in_file(file).items()}
    return {}


def _shapes_in_file(file: str) -> Shapes:
    require_file(file, "save or download it again")
    try:
        with as_value_error("it is cut short or damaged"):
            if file.endswith(".safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
            # torch cannot map files of the format that it wrote before version 1.6.
            mapped = zipfile.is_zipfile(file)
            shapes = shapes_of(torch.load(file, map_location="meta", weights_only=True, mmap=mapped))
            if sum(map(math.prod, shapes.values())) > os.path.getsize(file):  # a number takes a byte at least
                raise ValueError("its tensors claim more numbers than it has bytes")
            return shapes
    except ValueError as error:
        raise OSError(f"{file} cannot be read ({error}): save or download it again.") from error


def skeleton(model_class: type[nn.Module], config: PreTrainedConfig) -> nn.Module:
    """Build a model on the meta device: its tensors have names, shapes and types, but take no memory.

    Raises:
        ValueError: if no model can be built from the configuration.
    """
    with as_value_error("No model can be built from its configuration"), torch.device("meta"):
        return model_class(config)


def copy_out_of_file(model: nn.Module) -> nn.Module:
    """Copy a loaded model's tensors out of the mapped file, and return the model.

    In the file a tensor may begin at any byte. From an address that is not aligned, matrix products round differently,
    so that the loaded model would not compute exactly what the saved one did.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
