"""The cap: an error in time, with its numbers, and a way to go on afterwards."""

import gc
import pickle

import pytest
import torch
from torch import nn

from flwr_smartsplit.errors import MemoryCapExceeded
from flwr_smartsplit.model.cap import memory_cap

FLOAT = 4


def test_the_cap_itself_is_allowed_and_a_byte_more_is_not():
    """Reaching the cap is fine; the operator that crosses it is named."""
    with memory_cap(100 * FLOAT):
        torch.zeros(100)
    with pytest.raises(MemoryCapExceeded), memory_cap(100 * FLOAT - 1):
        torch.zeros(100)


def test_the_error_carries_its_numbers_and_survives_pickling():
    """Live bytes, cap, operator and whose memory it was, also after a journey."""
    with pytest.raises(MemoryCapExceeded) as info:
        with memory_cap(2 * 2**20, name="client a"):
            kept = torch.zeros(2**18)  # 1 MiB
            kept.repeat(3)
    error = pickle.loads(pickle.dumps(info.value))
    for each in (info.value, error):
        assert (each.live_bytes, each.budget_bytes) == (4 * 2**20, 2 * 2**20)
        assert each.operator.startswith("aten.")
        assert str(each).startswith(f"client a: {each.operator} brings live tensors to")
        assert "4 MiB, 2 MiB over the cap of 2 MiB" in str(each)
    assert "kept" in locals()


def test_the_error_comes_at_the_operator_that_crossed():
    """Everything before it is done, nothing after it is."""
    done = []
    with pytest.raises(MemoryCapExceeded), memory_cap(30 * FLOAT):
        values = torch.zeros(10)
        done.append(1)
        values = torch.cat([values, values])
        done.append(2)
        values = torch.cat([values, values])
        done.append(3)
    assert done == [1, 2]


def test_the_cap_holds_in_backward_and_in_the_optimizer():
    """Gradients and optimizer state cross it as activations do."""
    layer = nn.Linear(100, 100, bias=False)
    weight = 100 * 100 * FLOAT
    data = torch.zeros(1, 100)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    with memory_cap(weight + weight // 2) as meter:
        meter.track(layer, data)
        loss = layer(data).sum()
        with pytest.raises(MemoryCapExceeded):
            loss.backward()
    layer.zero_grad()
    with memory_cap(2 * weight + weight // 2) as meter:
        meter.track(layer, data)
        layer(data).sum().backward()
        with pytest.raises(MemoryCapExceeded, match="clone"):
            optimizer.step()


def test_the_cap_is_not_used_up_by_the_first_crossing():
    """After a caught error, crossing again is an error again, however high it was."""
    with memory_cap(10 * FLOAT) as meter:
        for size in (100, 100, 11, 20):
            with pytest.raises(MemoryCapExceeded) as info:
                torch.zeros(size)
            assert info.value.live_bytes == size * FLOAT
            del info
            gc.collect()
            assert meter.live_bytes == 0
            torch.zeros(10)


def test_only_the_operator_that_crossed_is_named():
    """What runs while the error is on its way up does not raise another one."""
    with pytest.raises(MemoryCapExceeded, match=r"aten\.") as info:
        with memory_cap(10 * FLOAT), torch.profiler.record_function("inside"):
            torch.zeros(100)
    assert info.value.__context__ is None


def test_after_the_error_memory_is_back():
    """Once the error is dealt with, only what was there before is alive."""
    layer = nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 50))
    with memory_cap(40_000) as meter:
        meter.track(layer)
        before = meter.live_bytes

        def step() -> None:
            layer(torch.zeros(40, 50)).sum().backward()

        with pytest.raises(MemoryCapExceeded) as info:
            step()
        assert info.value.live_bytes > 40_000 >= before
        del info
        layer.zero_grad()
        gc.collect()
        assert meter.live_bytes == before
        layer(torch.zeros(1, 50))  # A smaller step fits.


def test_a_negative_budget_is_refused():
    """The error gives the number, and says that None means no cap."""
    with pytest.raises(ValueError, match=r"budget_bytes is -1.*or None"):
        with memory_cap(-1):
            pass
