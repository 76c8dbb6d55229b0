"""Pickles from strangers, read without running anything in them: annotations, and PyTorch's checkpoints.

A pickle is a program that builds objects by calling whatever it names. `load_plain_pickle` builds plain containers,
text and numbers alone. `load_tensor_pickle` also builds records of tensors, whose numbers stay in their file
(`checkpoint_files.py`).
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

MAX_PICKLE = 2**21  # bytes; a large DETRIS with an optimizer for every tensor has 820,000
MAX_NAME = 1_000  # characters of a tensor's or a class's full name
MAX_ARGUMENTS = 8  # of a call in a pickle; torch's own tensors have the most
MAX_DIMENSIONS = 64  # torch has no more
KEYS = (str, int, float, bool, type(None))  # of a dictionary
MAX_KEY = 2**60  # Python's hashes of integers below differ
PLAIN_OPCODES = set(
    "PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE "
    "NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS "
    # These ask for what is refused by its name.
    "GLOBAL STACK_GLOBAL INST EXT1 EXT2 EXT4 PERSID BINPERSID".split()
)


class PlainUnpickler(pickle._Unpickler):
    """Builds containers, strings and numbers; refuses by name everything a pickle would have to import.

    It is Python's own and not C's, which makes room for as many objects as the largest number that a pickle gives one:
    20 bytes could take gigabytes. RefCOCO's refs take 3 seconds. Tuples, of which refs have none, are refused as well,
    and so are large integers as keys: hashing tuples in one another overflows the stack, and many integers of the same
    hash take for ever.
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
        if type(target) is not dict:
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in items:
            if type(key) not in KEYS or type(key) is int and not -MAX_KEY < key < MAX_KEY:
                raise ValueError(f"it has a {type(key).__name__} {short_repr(key)} as a dictionary's key")
            target[key] = value
        return target

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.PUT[0]: load_put,
    }

    def find_class(self, module: str, name: str):
        raise ValueError(f"it asks for {module}.{name}")

    def persistent_load(self, key: Any):
        raise ValueError(f"it asks for the external object {short_repr(key)}")


def load_plain_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle from strangers, Python 2's included, without running anything in it.

    Raises:
        ValueError: the file is broken, or holds anything but lists, dictionaries, strings and numbers.
    """
    copyreg.clear_extension_cache()  # objects cached there would be handed out without asking `find_class`
    file = io.BytesIO(read_regular(path))  # which makes room for no more bytes than there are
    try:
        return PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle raises whatever its broken part means
        raise_if_out_of_memory(error)
        reason = "it holds something else" if isinstance(error, KeyError) else one_line(error)  # of opcodes
        raise ValueError(
            f"{path} is not a pickle of lists, dictionaries, strings and numbers ({reason}); nothing in it was "
            "run, get the file again from where the data set was published."
        ) from error


# --- tensors ------------------------------------------------------------------------------------------------------

STORAGES = {
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
QUANTIZED = [dtype for name, dtype in STORAGES.items() if name.startswith("Q")]


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """What a pickle may call; nothing of the kind does more than to put its arguments together."""

    call: Any


@dataclass(frozen=True, slots=True, eq=False)
class NotRead:
    """Something other than a plain tensor; an error only if it stands among the weights."""

    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ScriptClass:
    module: str
    name: str


@dataclass(slots=True, eq=False)
class ScriptObject:
    script_class: ScriptClass
    state: dict[str, Any] = field(default_factory=dict)


def _dictionary(pairs: Iterable = ()) -> dict:
    return pairs if isinstance(pairs, dict) else PlainUnpickler.set_items({}, pairs)


def _tensor_v2(storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None):
    return _tensor_v3(storage, offset, shape, stride, requires_grad, hooks, storage.dtype, metadata)


def _tensor_v3(storage, offset, shape, stride, requires_grad, hooks, dtype, metadata=None):
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no storage")
    if metadata:
        return NotRead("a conjugated or negated tensor")
    if dtype in QUANTIZED:
        return NotRead("a quantised tensor")
    numbers = (offset, *shape, *stride)
    if not len(shape) == len(stride) <= MAX_DIMENSIONS or not all(
        type(number) is int and 0 <= number < 2**63 for number in numbers
    ):
        raise ValueError(
            f"a tensor has the shape {short_repr(shape)}, strides {short_repr(stride)} and offset {short_repr(offset)}"
        )
    return StoredTensor(storage, dtype, offset, tuple(shape), tuple(stride))


def _unread(kind: str) -> Function:
    return Function(lambda *_: NotRead(kind))


_FIRST = Function(lambda first, *_: first)
_DICTIONARY = Function(_dictionary)
FUNCTIONS = {
    "collections.OrderedDict": _DICTIONARY,
    "collections.Counter": _DICTIONARY,
    "torch._utils._rebuild_tensor": Function(_tensor_v2),
    "torch._utils._rebuild_tensor_v2": Function(_tensor_v2),
    "torch._utils._rebuild_tensor_v3": Function(_tensor_v3),
    "torch._utils._rebuild_parameter": _FIRST,
    "torch._utils._rebuild_parameter_with_state": _FIRST,
    "torch._utils._rebuild_sparse_tensor": _unread("a sparse tensor"),
    "torch._utils._rebuild_qtensor": _unread("a quantised tensor"),
    "torch._utils._rebuild_nested_tensor": _unread("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unread("a tensor without numbers"),
    "torch.serialization._get_layout": _unread("a layout"),
    "torch.Size": _FIRST,
    "torch.device": _unread("a device"),
    "torch.jit._pickle.restore_type_tag": _FIRST,
    **{f"torch.jit._pickle.build_{kind}list": _FIRST for kind in ("int", "double", "bool", "tensor")},
    "builtins.complex": _unread("a complex number"),
    # NumPy's numbers, which training checkpoints hold as their best score.
    "_codecs.encode": _unread("bytes"),
    "numpy.dtype": _unread("a NumPy type"),
    "numpy.core.multiarray.scalar": _unread("a NumPy number"),
    "numpy._core.multiarray.scalar": _unread("a NumPy number"),
}


class AsksForCode(ValueError):
    """A pickle names what it may not."""


class TensorUnpickler(PlainUnpickler):
    """Builds containers, numbers, strings, and records of tensors that stay in the file."""

    dispatch = PlainUnpickler.dispatch | {
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    }

    def __init__(self, file: io.BytesIO, **options: Any) -> None:
        super().__init__(file, **options)
        self.storages: dict[str, Storage] = {}
        self.items_given = 0  # to all calls

    def find_class(self, module: str, name: str) -> Any:
        if len(module) + len(name) > MAX_NAME:
            raise AsksForCode(f"{module[:MAX_NAME]}…")
        if module.partition(".")[0] == "__torch__":
            return ScriptClass(module, name)
        full_name = f"{module}.{name}"
        if full_name in FUNCTIONS:
            return FUNCTIONS[full_name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(vars(torch).get(name), (torch.dtype, torch.qscheme)):
            return vars(torch)[name]
        raise AsksForCode(full_name)

    def get_extension(self, code: int) -> NoReturn:
        raise AsksForCode(f"the registered object {code}")

    def persistent_load(self, key: Any) -> Storage:
        if type(key) is not tuple or len(key) not in (5, 6):
            raise ValueError(f"it asks for the external object {short_repr(key)}")
        kind, dtype, name, _, numel, *view = key
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(name) is not str or any(view):
            raise ValueError(f"it asks for the external object {short_repr(key)}")
        if type(numel) is not int or numel < 0:
            raise ValueError(f"storage {short_repr(name)} has {short_repr(numel)} numbers")
        storage = Storage(name, dtype, numel)
        self.storages.setdefault(name, storage)
        return storage

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if isinstance(function, ScriptClass):  # a named tuple
            self.stack[-1] = NotRead("a tuple")
        elif isinstance(function, Function):
            self._count_items(arguments)
            self.stack[-1] = function.call(*arguments)
        else:
            raise ValueError(f"it calls a {type(function).__name__}")

    def _count_items(self, arguments: Any) -> None:
        """Refuse calls that are given, by a few bytes each, the same many items again and again."""
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
        elif not isinstance(target, (dict, NotRead)):  # attributes of those are no matter
            raise ValueError(f"it sets attributes of a {type(target).__name__}")

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
    }


def load_tensor_pickle(file: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """What a pickle holds, and the storages that it asks for, by key."""
    unpickler = TensorUnpickler(file, encoding="utf-8")
    try:
        return unpickler.load(), unpickler.storages
    except (MemoryError, AsksForCode, EOFError):
        raise
    except Exception as error:  # a broken pickle raises whatever its broken part means
        raise ValueError(one_line(error) if isinstance(error, ValueError) else type(error).__name__) from None
