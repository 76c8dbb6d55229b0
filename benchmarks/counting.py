"""What a computation asks of a device, counted where there is none: launches, reads by the host, saved bytes.

The counts are of the operations that PyTorch dispatches. On a GPU each of them but a view launches a kernel or more,
and each read of a result makes the CPU wait until the GPU has done all that it was given before. Where there is no
GPU, tensors on the CPU stand for those on a device. Two things then go unseen: tensors that are made anew, by
`torch.zeros` or `torch.arange`, and `.to(device)`, which does nothing if both devices are the CPU.
"""

import gc
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import psutil
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# Operations whose result, or its size, the host has to know before it goes on.
READING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::unique_dim_consecutive",
    "aten::_unique",
    "aten::_unique2",
}
# Methods that bring a tensor to the host without an operation of their own, if it is on the CPU anyway.
READING_METHODS = {"torch.Tensor.tolist", "torch.Tensor.numpy", "torch.Tensor.__array__", "torch.Tensor.cpu"}
# Operations that compute nothing, besides views.
FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
FREE |= {"aten::_unsafe_view", "aten::lift_fresh", "aten::_reshape_alias", "aten::set_", "prim::device"}

POLL_SECONDS = 0.02
# PyTorch's counter of FLOP does not know the attention that runs on CPUs.
flop_counter.flop_registry |= {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop,
}


@dataclass
class Operations:
    """Counts operations while it is entered as a context.

    Args:
        on_device: the tensors that stand for those on a device: usually the inputs, parameters and buffers. What is
            computed from them counts as on the device too, until a read brings it to the host. Tensors on a GPU need
            not be given.

    Attributes:
        launches: operations on the device, views not counted.
        reads: the names of the operations that made the host read from the device, in their order.
    """

    on_device: Iterable[torch.Tensor] = ()
    launches: int = 0
    reads: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._on_device = WeakIdKeyDictionary()
        self.put_on_device(list(self.on_device))
        self._stack = ExitStack()
        self._stack.enter_context(_Dispatched(self))
        self._stack.enter_context(_Called(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def put_on_device(self, values: Any) -> None:
        """Let tensors, in lists and dictionaries too, count as on the device from now on."""
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                self._on_device[value] = True

    def take_to_host(self, tensor: torch.Tensor) -> None:
        """Let a tensor no longer count as on the device."""
        self._on_device.pop(tensor, None)

    def holds(self, values: Any) -> bool:
        """Whether any of the tensors is on the device."""
        return any(
            isinstance(value, torch.Tensor) and (value in self._on_device or _is_on_gpu(value))
            for value in tree_leaves(values)
        )


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "meta")


def _reads(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether the host has to know a result of this operation before it goes on."""
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        fills = len(args) > 2 and args[2].numel() == 1  # with one value: no need to know how many places there are
        return by_mask and not fills
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    return name in READING


class _Dispatched(TorchDispatchMode):
    def __init__(self, operations: Operations):
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        operations, name, kwargs = self.operations, function._schema.name, kwargs or {}
        output = function(*args, **kwargs)
        on_gpu = any(_is_on_gpu(value) for value in tree_leaves((args, kwargs)))
        from_gpu = on_gpu and isinstance(output, torch.Tensor) and not _is_on_gpu(output)
        if operations.holds((args, kwargs, output)):
            if from_gpu or _reads(name, args, kwargs):
                operations.reads.append(name)
            if not (function.is_view or name in FREE or name == "aten::_local_scalar_dense"):
                operations.launches += 1
            if not from_gpu:
                operations.put_on_device(output)
        return output


class _Called(TorchFunctionMode):
    def __init__(self, operations: Operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = resolve_name(function), kwargs or {}
        copies = (
            name == "torch.Tensor.cpu" or name == "torch.Tensor.to" and "cpu" in (*args[1:2], kwargs.get("device"))
        )
        if not (copies or name in READING_METHODS) or _is_on_gpu(args[0]) or not self.operations.holds(args[0]):
            return function(*args, **kwargs)
        self.operations.reads.append(name)
        with torch.no_grad():
            on_host = torch.empty_like(args[0]).copy_(args[0])  # a tensor of its own, which is not on the device
        self.operations.take_to_host(on_host)
        output = function(on_host, *args[1:], **kwargs)
        if isinstance(output, torch.Tensor):
            self.operations.take_to_host(output)
        return output


def count_saved_bytes(compute: Callable[[], Any], apart_from: Iterable[torch.Tensor] = ()) -> int:
    """Count the bytes that autograd keeps for the backward pass of what is computed.

    Args:
        compute: runs the forward pass.
        apart_from: tensors that lie in memory anyway, such as parameters and inputs.
    """
    kept, known = {}, {tensor.untyped_storage()._cdata for tensor in apart_from}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compute()
        total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


class PeakMemory:
    """Tells how many `bytes` the computation inside takes at most, besides what lay in memory before.

    On a GPU PyTorch counts them. On a CPU they are this process's resident ones, looked up many times a second.
    """

    def __init__(self, device: str):
        self.device = device

    def __enter__(self) -> Self:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._process = psutil.Process()
            self._before = self._most = self._process.memory_info().rss
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._poll, daemon=True)
            self._thread.start()
        return self

    def _poll(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *error: Any) -> None:
        if self.device == "cuda":
            self._most = torch.cuda.max_memory_allocated()
        else:
            self._ended.set()
            self._thread.join()
            self._most = max(self._most, self._process.memory_info().rss)
        self.bytes = self._most - self._before
