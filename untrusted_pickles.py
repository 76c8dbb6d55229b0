"""Pickles from strangers, read without running anything in them: annotations, and those inside PyTorch's checkpoints.

A pickle is a program: it builds objects by calling whatever functions it names. [`load_plain_pickle`] lets it build
lists, dictionaries, text and numbers, and calls nothing. [`load_tensor_pickle`] also lets it describe tensors, whose
numbers stay in the file (`checkpoint_files.py` reads them).
"""

import copyreg
import io
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

try:
    from .configuration_detris import one_line, raise_if_out_of_memory, read_regular, short_repr
except ImportError:
    if __package__:
        raise
    from configuration_detris import one_line, raise_if_out_of_memory, read_regular, short_repr

MAX_PICKLE = 2**21  # bytes; the pickle of a large DETRIS with an optimizer for every tensor has 820,000
MAX_TENSOR_NAME = 1_000  # characters in the full name of a tensor or a class
MAX_ARGUMENTS = 8  # of a call in a pickle; the call that rebuilds a tensor of torch has the most
MAX_DIMENSIONS = 64  # torch allows no more
KEY_TYPES = (str, int, float, bool, type(None))  # that a dictionary may have
MAX_INTEGER_KEY = 2**60  # smaller integers all have different hashes
PLAIN_OPCODES = set(
    "PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE "
    "NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS "
    # These ask for a class, a function or an external object: they are read so that the error can name it.
    "GLOBAL STACK_GLOBAL INST EXT1 EXT2 EXT4 PERSID BINPERSID".split()
)


def load_plain_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle from strangers, also one that Python 2 wrote, without running anything in it.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no regular file, broken, or holds anything but lists, dictionaries, strings and numbers.
    """
    copyreg.clear_extension_cache()  # objects in that cache would be handed out without asking `find_class`
    file = io.BytesIO(read_regular(path))  # which reserves no memory for a length that a pickle merely claims
    try:
        return PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle raises whatever its broken part means
        raise_if_out_of_memory(error)
        # A KeyError is an opcode that has no method in `dispatch`.
        reason = "it holds something else" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(
            f"{path} is not a pickle of lists, dictionaries, strings and numbers ({reason}); nothing in it was "
            "run, get the file again from where the data set was published."
        ) from error


class PlainUnpickler(pickle._Unpickler):
    """Builds lists, dictionaries, text and numbers; refuses by name whatever a pickle would have to import.

    It extends the unpickler that is written in Python, because the one written in C reserves memory for the largest
    object number that a pickle mentions: 20 bytes could take gigabytes. RefCOCO's refs take 3 seconds here. As there,
    a `load_…` method carries out one opcode.

    Tuples are refused, because hashing deeply nested ones overflows the stack, and RefCOCO's refs have none. Large
    integers are refused as keys, because a dictionary of many integers with the same hash takes for ever.
    """

    dispatch = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for name, code in vars(pickle).items() if name in PLAIN_OPCODES
    }

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.set_items(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(self.set_items({}, zip(items[::2], items[1::2], strict=True)))

    def load_put(self) -> None:
        self.set_items(self.memo, [(int(self.readline()[:-1]), self.stack[-1])])

    @staticmethod
    def set_items(target: Any, items: Iterable[tuple[Any, Any]]) -> dict:
        """Enter key-value pairs into a dictionary and return it; raises ValueError for what no such pickle needs."""
        if type(target) is not dict:
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in items:
            if type(key) not in KEY_TYPES or type(key) is int and not -MAX_INTEGER_KEY < key < MAX_INTEGER_KEY:
                raise ValueError(f"it has a {type(key).__name__} {short_repr(key)} as a dictionary's key")
            target[key] = value
        return target

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.PUT[0]: load_put,
    }

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"it asks for {module}.{name}")

    def persistent_load(self, key: Any) -> NoReturn:
        raise ValueError(f"it asks for the external object {short_repr(key)}")


# --- pickles of tensors -------------------------------------------------------------------------------------------

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
QUANTIZED_DTYPES = [dtype for name, dtype in STORAGE_DTYPES.items() if name.startswith("Q")]


@dataclass(frozen=True, slots=True, eq=False)
class SafeFunction:
    """A function that a pickle may call. All of them do nothing but put their arguments together."""

    call: Any


@dataclass(frozen=True, slots=True, eq=False)
class Placeholder:
    """Stands for an object that is no plain tensor and is not read; an error only if it is among the weights."""

    kind: str  # for error messages, such as "a sparse tensor"


@dataclass(frozen=True, slots=True, eq=False)
class StorageRecord:
    """What a pickle says of a storage, the block of numbers that one or several tensors view."""

    key: str  # its name in the file
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorRecord:
    """What a pickle says of a tensor. Offset and strides count numbers, not bytes."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ScriptClass:
    """A class that is defined in the source code inside a TorchScript file."""

    module: str  # such as `__torch__.clip.model`
    name: str


@dataclass(slots=True, eq=False)
class ScriptObject:
    """An instance of such a class: the whole model, or one of its modules."""

    script_class: ScriptClass
    state: dict[str, Any] = field(default_factory=dict)


def load_tensor_pickle(file: io.BytesIO) -> tuple[Any, dict[str, StorageRecord]]:
    """
    Read a pickle out of a PyTorch file, without running anything in it and without the tensors' numbers.

    Args:
        file: at the pickle's beginning; its end is where reading stops.

    Returns:
        What the pickle holds: containers, text, numbers, [`TensorRecord`], [`Placeholder`], and in TorchScript
        [`ScriptObject`]. And the storages that it refers to, by key.

    Raises:
        ForbiddenGlobal: if the pickle asks for a class or function that is not among `SAFE_FUNCTIONS`.
        EOFError: if it is cut short.
        ValueError: if it is broken.
    """
    unpickler = TensorUnpickler(file, encoding="utf-8")
    try:
        return unpickler.load(), unpickler.storages
    except (MemoryError, ForbiddenGlobal, EOFError):
        raise
    except Exception as error:  # a broken pickle raises whatever its broken part means
        raise ValueError(one_line(error) if isinstance(error, ValueError) else type(error).__name__) from None


class ForbiddenGlobal(ValueError):
    """A pickle asks for a class or function other than those that are allowed, which could run code."""


def _build_dictionary(pairs: Iterable = ()) -> dict:
    return pairs if isinstance(pairs, dict) else PlainUnpickler.set_items({}, pairs)


def _rebuild_tensor_v2(storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None):
    return _rebuild_tensor_v3(storage, offset, shape, stride, requires_grad, hooks, storage.dtype, metadata)


def _rebuild_tensor_v3(storage, offset, shape, stride, requires_grad, hooks, dtype, metadata=None):
    if not isinstance(storage, StorageRecord) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no storage")
    if metadata:
        return Placeholder("a conjugated or negated tensor")
    if dtype in QUANTIZED_DTYPES:
        return Placeholder("a quantised tensor")
    numbers = (offset, *shape, *stride)
    if not len(shape) == len(stride) <= MAX_DIMENSIONS or not all(
        type(number) is int and 0 <= number < 2**63 for number in numbers
    ):
        raise ValueError(
            f"a tensor has the shape {short_repr(shape)}, strides {short_repr(stride)} and offset {short_repr(offset)}"
        )
    return TensorRecord(storage, dtype, offset, tuple(shape), tuple(stride))


def _placeholder(kind: str) -> SafeFunction:
    return SafeFunction(lambda *_: Placeholder(kind))


_FIRST_ARGUMENT = SafeFunction(lambda first, *_: first)
_DICTIONARY = SafeFunction(_build_dictionary)
SAFE_FUNCTIONS = {
    "collections.OrderedDict": _DICTIONARY,
    "collections.Counter": _DICTIONARY,
    "torch._utils._rebuild_tensor": SafeFunction(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v2": SafeFunction(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": SafeFunction(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _FIRST_ARGUMENT,
    "torch._utils._rebuild_parameter_with_state": _FIRST_ARGUMENT,
    "torch._utils._rebuild_sparse_tensor": _placeholder("a sparse tensor"),
    "torch._utils._rebuild_qtensor": _placeholder("a quantised tensor"),
    "torch._utils._rebuild_nested_tensor": _placeholder("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _placeholder("a tensor without numbers"),
    "torch.serialization._get_layout": _placeholder("a layout"),
    "torch.Size": _FIRST_ARGUMENT,
    "torch.device": _placeholder("a device"),
    "torch.jit._pickle.restore_type_tag": _FIRST_ARGUMENT,
    **{f"torch.jit._pickle.build_{kind}list": _FIRST_ARGUMENT for kind in ("int", "double", "bool", "tensor")},
    "builtins.complex": _placeholder("a complex number"),
    # Training checkpoints may hold their best score as a number of NumPy.
    "_codecs.encode": _placeholder("bytes"),
    "numpy.dtype": _placeholder("a NumPy type"),
    "numpy.core.multiarray.scalar": _placeholder("a NumPy number"),
    "numpy._core.multiarray.scalar": _placeholder("a NumPy number"),
}


class TensorUnpickler(PlainUnpickler):
    """Builds lists, tuples, dictionaries, text and numbers, and records of tensors whose numbers stay in the file."""

    dispatch = PlainUnpickler.dispatch | {
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    }

    def __init__(self, file: io.BytesIO, **options: Any) -> None:
        super().__init__(file, **options)
        self.storages: dict[str, StorageRecord] = {}
        self.items_given = 0  # items of lists and tuples among the arguments of all calls so far

    def find_class(self, module: str, name: str) -> Any:
        if len(module) + len(name) > MAX_TENSOR_NAME:
            raise ForbiddenGlobal(f"{module[:MAX_TENSOR_NAME]}…")
        if module.partition(".")[0] == "__torch__":
            return ScriptClass(module, name)
        full_name = f"{module}.{name}"
        if full_name in SAFE_FUNCTIONS:
            return SAFE_FUNCTIONS[full_name]
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "torch" and isinstance(vars(torch).get(name), (torch.dtype, torch.qscheme)):
            return vars(torch)[name]
        raise ForbiddenGlobal(full_name)

    def get_extension(self, code: int) -> NoReturn:
        raise ForbiddenGlobal(f"the registered object {code}")

    def persistent_load(self, key: Any) -> StorageRecord:
        if type(key) is not tuple or len(key) not in (5, 6):
            raise ValueError(f"it asks for the external object {short_repr(key)}")
        kind, dtype, name, _, numel, *view = key
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(name) is not str or any(view):
            raise ValueError(f"it asks for the external object {short_repr(key)}")
        if type(numel) is not int or numel < 0:
            raise ValueError(f"storage {short_repr(name)} has {short_repr(numel)} numbers")
        storage = StorageRecord(name, dtype, numel)
        self.storages.setdefault(name, storage)
        return storage

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if isinstance(function, ScriptClass):  # TorchScript calls a class only to make a named tuple
            self.stack[-1] = Placeholder("a tuple")
        elif isinstance(function, SafeFunction):
            self._refuse_many_items(arguments)
            self.stack[-1] = function.call(*arguments)
        else:
            raise ValueError(f"it calls a {type(function).__name__}")

    def _refuse_many_items(self, arguments: Any) -> None:
        """Refuse calls that take many items in all: with a few bytes each they could take the same long list again."""
        if type(arguments) is not tuple or len(arguments) > MAX_ARGUMENTS:
            raise ValueError(f"a call in it has over {MAX_ARGUMENTS} arguments")
        self.items_given += sum(len(argument) for argument in arguments if isinstance(argument, (list, tuple)))
        if self.items_given > MAX_PICKLE:
            raise ValueError(f"its calls are given over {MAX_PICKLE:,} items")

    def load_newobj(self) -> None:
        arguments, script_class = self.stack.pop(), self.stack.pop()
        if not isinstance(script_class, ScriptClass) or arguments != ():
            raise ValueError(f"it makes an object of a {type(script_class).__name__}")
        self.append(ScriptObject(script_class))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, ScriptObject):
            target.state = state
        elif not isinstance(target, (dict, Placeholder)):  # whose attributes hold no weights, so they are left out
            raise ValueError(f"it sets attributes of a {type(target).__name__}")

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
    }
