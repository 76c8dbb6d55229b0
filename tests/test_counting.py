"""What is counted, against computations whose operations, reads and bytes can be counted by hand."""

import mmap
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counting import POLL_SECONDS, Operations, PeakMemory, count_saved_bytes
from benchmarks.data import MEBIBYTE


@pytest.fixture
def x():
    return torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "compute, launches",
    [
        pytest.param(lambda x: x + 1, 1, id="sum"),
        pytest.param(lambda x: (x.T @ x).relu(), 2, id="product and ReLU, transposed by a view"),
        pytest.param(lambda x: x.view(3, 2)[0].expand(4, 2).unbind(), 0, id="views"),
        pytest.param(lambda x: torch.empty_like(x), 0, id="nothing computed"),
        pytest.param(lambda x: x.add_(1).mul_(2), 2, id="in place"),
        pytest.param(lambda x: torch.cat([x, x]).chunk(2), 1, id="two results of one, both views"),
        pytest.param(lambda x: F.linear(x, x, x[:, 0]), 1, id="linear"),
        pytest.param(lambda x: torch.zeros(2, 3) + 1, 0, id="on the host"),
        pytest.param(lambda x: torch.zeros(2, 3) + x, 1, id="host and device"),
    ],
)
def test_launches(x, compute, launches):
    expected = compute(x.clone())
    with Operations([x]) as operations:
        found = compute(x)
    assert operations.launches == launches and operations.reads == []
    if isinstance(found, torch.Tensor) and launches:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_launches_of_a_training_step():
    linear, inputs = nn.Linear(3, 2, bias=False), torch.ones(4, 3)
    optimizer = torch.optim.Adam(linear.parameters(), fused=True)

    def step():
        linear(inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with Operations([inputs, *linear.parameters()]) as first:
        step()
    # The product; the sum; a one, the gradient of the sum; the product for the gradient; Adam's two statistics filled
    # with zeros, and Adam.
    assert first.launches == 7
    with Operations([inputs, *linear.parameters()]) as second:
        step()
    assert second.launches == 5 and second.reads == first.reads == []


@pytest.mark.parametrize(
    "compute, reads",
    [
        pytest.param(lambda x: x.sum().item(), ["aten::_local_scalar_dense"], id="item"),
        pytest.param(lambda x: bool((x > 1).any()), ["aten::_local_scalar_dense"], id="bool"),
        pytest.param(lambda x: int(x.max()) + float(x.min()), 2 * ["aten::_local_scalar_dense"], id="int and float"),
        pytest.param(lambda x: x.tolist(), ["torch.Tensor.tolist"], id="tolist"),
        pytest.param(lambda x: x.numpy().sum(), ["torch.Tensor.numpy"], id="numpy"),
        pytest.param(lambda x: x.cpu().tolist(), ["torch.Tensor.cpu"], id="once on the host, read for nothing"),
        pytest.param(lambda x: x.to("cpu").tolist(), ["torch.Tensor.to"], id="to the host"),
        pytest.param(lambda x: x.to(torch.float64).sum(), [], id="to another type"),
        pytest.param(lambda x: torch.equal(x, x), ["aten::equal"], id="equal"),
        pytest.param(lambda x: x.nonzero(), ["aten::nonzero"], id="nonzero"),
        pytest.param(lambda x: x[x > 1], ["aten::index"], id="by a mask"),
        pytest.param(lambda x: x[torch.tensor([1, 0])], [], id="by numbers"),
        pytest.param(lambda x: x.index_put_([x > 1], torch.arange(4.0)), ["aten::index_put_"], id="set by a mask"),
        pytest.param(lambda x: x.index_put_([x > 1], torch.tensor(0.0)), [], id="filled by a mask"),
        pytest.param(lambda x: torch.where(x > 1, x, 0), [], id="where"),
        pytest.param(lambda x: x.unique(), ["aten::_unique2"], id="unique"),
        pytest.param(lambda x: x[0].long().bincount(), ["aten::bincount"], id="bincount"),
        pytest.param(lambda x: x.repeat_interleave(x[:, 0].long(), 0), ["aten::repeat_interleave"], id="repeated"),
        pytest.param(lambda x: x.repeat_interleave(x[:, 0].long(), 0, output_size=3), [], id="repeated, size known"),
        pytest.param(lambda x: torch.ones(2).sum().item(), [], id="on the host"),
    ],
)
def test_reads(x, compute, reads):
    expected = compute(x.clone())
    with Operations([x]) as operations:
        found = compute(x)
    assert operations.reads == reads
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=0)


def test_what_was_read_is_computed_on_by_the_host(x):
    with Operations([x]) as operations:
        on_host = (2 * x).cpu()
        before = operations.launches
        on_host += 1
        assert on_host.sum().item() == 36
    assert operations.launches == before and operations.reads == ["torch.Tensor.cpu"]


def test_inputs_that_come_later(x):
    with Operations() as operations:
        x.sum().item()
        operations.put_on_device({"pixel_values": [x]})
        x.sum().item()
    assert operations.launches == 1 and len(operations.reads) == 1


def test_tensors_on_a_gpu_need_not_be_named():
    with FakeTensorMode(), Operations() as operations:
        x = torch.zeros(2, 3, device="cuda")  # one
        y = (x + torch.ones(3, device="cuda")).T  # two
        on_host = y.cpu()  # one, a copy
        assert on_host.device.type == "cpu"
        on_host + 1
        y.to("cpu")  # one
    assert operations.launches == 5
    assert operations.reads == ["aten::_to_copy", "aten::_to_copy"]


# --- bytes --------------------------------------------------------------------------------------------------------


def test_saved_bytes():
    x, weight = torch.ones(1000), torch.ones(1000, requires_grad=True)
    assert count_saved_bytes(lambda: (x * weight).sum()) == 4000  # only x: it has no gradient of its own
    assert count_saved_bytes(lambda: (x * weight).sum(), apart_from=[x]) == 0
    assert count_saved_bytes(lambda: weight.exp()) == 4000  # the result
    assert count_saved_bytes(lambda: weight.exp().sin().sum()) == 4000  # the sine saves what the exponential saved
    assert count_saved_bytes(lambda: weight.half().exp()) == 2000
    assert count_saved_bytes(lambda: (x.view(10, 100)[:1] * weight[:100]).sum()) == 4000  # a view keeps all of it
    with torch.no_grad():
        assert count_saved_bytes(lambda: weight.exp()) == 0


def test_saved_bytes_on_the_meta_device():
    with torch.device("meta"):
        weight = torch.ones(10**9, requires_grad=True)
        assert count_saved_bytes(lambda: weight.exp()) == 4 * 10**9


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_is_checkpointed_saves_its_inputs_alone(use_reentrant):
    x = torch.ones(1000, requires_grad=True)

    def layer(y):
        return y.exp().sin().exp().cos()

    def both(y):
        for _ in range(2):
            y = checkpoint(layer, y, use_reentrant=use_reentrant)
        return y

    assert count_saved_bytes(lambda: layer(layer(x))) == 4 * 4000  # what each of the exponentials gives
    assert count_saved_bytes(lambda: both(x), apart_from=[x]) == 4000  # what the first gives to the second


def test_peak_memory():
    with PeakMemory("cpu") as memory:
        block = mmap.mmap(-1, 64 * MEBIBYTE)  # new pages; a tensor might lie in memory that was freed before
        np.frombuffer(block, np.uint8)[:] = 1
        time.sleep(10 * POLL_SECONDS)
        del block
    assert 63 * MEBIBYTE < memory.bytes < 80 * MEBIBYTE


# --- FLOP ---------------------------------------------------------------------------------------------------------


def test_attention_on_a_cpu_is_counted():
    heads, length, width = 2, 64, 16
    query = torch.ones(1, heads, length, width, requires_grad=True)
    with FlopCounterMode(display=False) as flops:
        output = F.scaled_dot_product_attention(query, query, query)
    forward = flops.get_total_flops()
    assert forward == 4 * heads * length**2 * width  # two products, two for each multiply-add
    with FlopCounterMode(display=False) as flops:
        output.sum().backward()
    assert flops.get_total_flops() == 2.5 * forward  # the scores again, and two products for each of the two
