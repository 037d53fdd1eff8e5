"""The meter: live tensor storages, to the byte."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from flwr_smartsplit.errors import MemoryCapExceeded
from flwr_smartsplit.memory import meter as meter_module
from flwr_smartsplit.memory.cap import memory_cap
from flwr_smartsplit.memory.meter import ACTIVATIONS, MemoryMeter, unmetered
from flwr_smartsplit.split.fake_tensors import DryRun

FLOAT = 4


# --- what is counted ------------------------------------------------------------------


def test_what_is_made_counts_until_its_last_user_is_gone():
    """A tensor counts while it lives, and the peak remembers it."""
    with memory_cap(None) as meter:
        first = torch.zeros(100)
        second = torch.ones(50, dtype=torch.float64)
        assert meter.live_bytes == 100 * FLOAT + 50 * 8
        alias = first
        del first
        assert meter.live_bytes == 100 * FLOAT + 50 * 8
        del alias, second
        assert meter.live_bytes == 0
    assert meter.peak_bytes == 100 * FLOAT + 50 * 8


@pytest.mark.parametrize(
    "see",
    [
        lambda x: x.view(10, 10),
        lambda x: x[:50],
        lambda x: x.t(),
        lambda x: x.detach(),
        lambda x: x.expand(7, 100),
        lambda x: x.split(30),
        lambda x: x.view(torch.int32),
    ],
    ids=["view", "slice", "t", "detach", "expand", "split", "other type"],
)
def test_a_view_counts_once(see):
    """However a storage is looked at, it is there once."""
    with memory_cap(None) as meter:
        values = torch.zeros(100)
        views = see(values)
        assert meter.live_bytes == meter.peak_bytes == 100 * FLOAT
        del values
        assert meter.live_bytes == 100 * FLOAT
        del views
        assert meter.live_bytes == 0


def test_a_small_view_keeps_a_large_storage_alive():
    """One element of a thousand keeps a thousand."""
    with memory_cap(None) as meter:
        one = torch.zeros(1000)[0]
        assert meter.live_bytes == 1000 * FLOAT
        one = one.clone()
        assert meter.live_bytes == FLOAT
        del one


def test_in_place_operators_and_given_outputs_make_nothing():
    """Writing into what exists costs no byte, unless it has to grow."""
    with memory_cap(None) as meter:
        values = torch.zeros(100)
        values.add_(1).relu_()
        values[3:5].fill_(2)
        values[3:5] = values[0]
        torch.neg(values, out=values)
        assert meter.peak_bytes == 100 * FLOAT
        grown = torch.empty(0)
        torch.neg(values, out=grown)
        assert meter.live_bytes == 200 * FLOAT
        grown.resize_(300).resize_(7)
        assert meter.live_bytes == 400 * FLOAT
        grown.untyped_storage().resize_(0)  # No operator: seen at the next use.
        assert grown.resize_(0).numel() == 0
        assert meter.live_bytes == 100 * FLOAT


def write_a_number(values: Tensor) -> None:
    values[3:5] = 2


def write_a_constant(values: Tensor) -> None:
    values[3:5] = torch.tensor(2.0)


def peak_of(write: Callable[[Tensor], None], mode: AbstractContextManager[Any]) -> int:
    with mode, memory_cap(None) as meter:
        values = torch.zeros(100)
        write(values)
        assert meter.live_bytes == values.nbytes
    return meter.peak_bytes


def test_a_number_written_by_index_is_predicted_whatever_torch_makes_of_it():
    """Until 2.15, torch makes the number a tensor for as long as it is written."""
    measured = peak_of(write_a_number, nullcontext())
    assert measured in {100 * FLOAT, 101 * FLOAT}
    assert peak_of(write_a_number, DryRun()) == measured


def test_a_constant_is_one_tensor_in_a_dry_run_too(monkeypatch):
    assert peak_of(write_a_constant, nullcontext()) == 101 * FLOAT
    assert peak_of(write_a_constant, DryRun()) == 101 * FLOAT
    monkeypatch.setattr(meter_module, "_LIFT", None)
    assert peak_of(write_a_constant, DryRun()) == 102 * FLOAT


def test_what_an_operator_returns_many_of_is_all_counted():
    """Tuples and lists of tensors are seen in full."""
    with memory_cap(None) as meter:
        result = torch.zeros(10, 10).max(dim=0)
        assert meter.live_bytes == 10 * FLOAT + 10 * 8
        parts = torch.unbind_copy(torch.zeros(4, 25))
        assert meter.live_bytes == 10 * FLOAT + 10 * 8 + 100 * FLOAT
        del result, parts


def test_meta_tensors_have_no_memory():
    """A size without memory counts nothing."""
    with memory_cap(0) as meter:
        torch.zeros(10**9, device="meta").add(1)
    assert meter.peak_bytes == 0


def test_a_step_worked_out_by_hand():
    """Parameters, activations, gradients and state of one layer, byte by byte."""
    batch, inputs, outputs = 8, 5, 3
    layer = nn.Linear(inputs, outputs, bias=False)
    weight = inputs * outputs * FLOAT
    optimizer = torch.optim.Adam(layer.parameters())
    data = torch.zeros(batch, inputs)
    with memory_cap(None) as meter:
        meter.track(layer, data)
        static = weight + batch * inputs * FLOAT
        assert meter.live_bytes == static
        loss = layer(data).relu().sum()
        # relu keeps its result for its backward; the product before it is free.
        saved = batch * outputs * FLOAT
        assert meter.live_bytes == static + saved + FLOAT
        loss.backward()
        assert meter.live_bytes == static + weight + FLOAT
        optimizer.step()
        # Two moments, and a step count.
        assert meter.live_bytes == static + 3 * weight + 2 * FLOAT
        optimizer.zero_grad()
        assert meter.live_bytes == static + 2 * weight + 2 * FLOAT
        del loss, optimizer
        gc.collect()
        assert meter.live_bytes == static
    # Before optimizer.step() frees its own, the new moments and their root are there.
    assert meter.peak_bytes >= static + 4 * weight + 2 * FLOAT


def test_momentum_appears_in_the_first_step_and_stays():
    """SGD without momentum keeps nothing; with momentum, one copy of the weights."""
    for momentum, copies in ((0.0, 0), (0.9, 1)):
        layer = nn.Linear(10, 10, bias=False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=momentum)
        with memory_cap(None) as meter:
            meter.track(layer)
            for _ in range(3):
                layer(torch.zeros(1, 10)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                assert meter.live_bytes == (1 + copies) * 100 * FLOAT


# --- what exists already --------------------------------------------------------------


def test_what_is_tracked_counts_once_however_often():
    """Modules with gradients, optimizers, and nested batches are counted once."""
    layer = nn.BatchNorm1d(10)
    layer(torch.zeros(2, 10)).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    batch = {"x": (torch.zeros(5), [torch.zeros(6)]), "y": "text"}
    meter = MemoryMeter()
    meter.track(layer, optimizer, batch)
    weights, buffers, counter = 2 * 10 * FLOAT, 2 * 10 * FLOAT, 8
    expected = 3 * weights + buffers + counter + 11 * FLOAT
    assert meter.live_bytes == meter.peak_bytes == expected
    meter.track(layer, optimizer, batch, layer.weight, batch["x"][0][:2])
    assert meter.live_bytes == meter.peak_bytes == expected
    del batch
    assert meter.live_bytes == expected - 11 * FLOAT


def test_tracking_more_than_the_cap_is_an_error():
    """A model that does not fit is refused before it runs."""
    meter = MemoryMeter(399, name="client a")
    with pytest.raises(MemoryCapExceeded, match="client a: track brings"):
        meter.track(torch.zeros(100))


# --- any program ----------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda x: x.clone(),
    "view": lambda x: x.view(-1),
    "slice": lambda x: x[: max(1, len(x) // 2)],
    "add": lambda x: x + 1,
    "add_": lambda x: x.add_(1),
    "twice": lambda x: torch.cat([x, x]),
}


def bytes_by_storage(tensors: list[Tensor]) -> int:
    """Add up the memory of tensors, each storage once, without the meter."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@given(
    st.lists(
        st.tuples(st.sampled_from([*COMMANDS, "new", "free"]), st.integers(0, 9)),
        max_size=30,
    )
)
def test_live_bytes_are_the_storages_that_are_alive(program):
    """After every command of any program, the count is the sum over live storages."""
    tensors: list[Tensor] = []
    highest = 0
    with memory_cap(None) as meter:
        for command, number in program:
            if command == "new" or not tensors:
                tensors.append(torch.zeros(number + 1))
            elif command == "free":
                del tensors[number % len(tensors)]
            else:
                chosen = tensors[number % len(tensors)]
                tensors.append(COMMANDS[command](chosen))
                del chosen
            with unmetered():
                highest = max(highest, bytes_by_storage(tensors))
                assert meter.live_bytes == bytes_by_storage(tensors)
            assert meter.peak_bytes == highest


def test_a_byte_more_or_less_would_be_seen():
    """The independent count above tells a view from a copy."""
    values = torch.zeros(10)
    assert bytes_by_storage([values, values[:5]]) == 10 * FLOAT
    assert bytes_by_storage([values, values[:5].clone()]) == 15 * FLOAT


# --- what does not count --------------------------------------------------------------


def test_what_is_made_unmetered_is_nobodys():
    """Inside, however deeply, nothing counts and no cap is crossed."""
    with memory_cap(100 * FLOAT) as meter:
        with unmetered():
            edge = torch.zeros(1000)
            with unmetered():
                edge = edge + 1
            edge = edge * 2
        assert meter.live_bytes == meter.peak_bytes == 0
        values = torch.zeros(100)
        assert meter.live_bytes == 100 * FLOAT
        del edge, values
        assert meter.live_bytes == 0


def test_metering_goes_on_after_an_error_inside_unmetered():
    """An edge that raises does not switch the device's meter off."""
    with memory_cap(None) as meter:
        with pytest.raises(ZeroDivisionError), unmetered():
            _ = 1 / 0
        values = torch.zeros(10)
    assert meter.peak_bytes == values.nbytes


def test_two_meters_of_one_thread_count_the_same():
    """A meter around a meter sees what the inner one sees."""
    with memory_cap(None) as outer, memory_cap(None) as inner:
        _ = torch.zeros(10) + 1
    assert outer.peak_bytes == inner.peak_bytes == 20 * FLOAT


def test_a_meter_can_be_entered_again_and_goes_on_counting():
    """Between metered steps nothing is seen, and what died is forgotten."""
    meter = MemoryMeter()
    with meter:
        kept, lost = torch.zeros(10), torch.zeros(20)
    unseen = torch.zeros(1000)
    del lost
    with meter:
        assert meter.live_bytes == 10 * FLOAT
        more = kept + 1
        assert meter.live_bytes == 20 * FLOAT
    del kept, more, unseen
    assert (meter.live_bytes, meter.peak_bytes) == (0, 30 * FLOAT)


def test_tensors_may_outlive_their_meter():
    """A meter that is gone is not missed by what it counted."""
    with memory_cap(None) as meter:
        values = torch.zeros(10)
    del meter
    gc.collect()
    del values


def test_the_generator_and_the_numbers_do_not_notice_the_meter():
    """Metered arithmetic is the same arithmetic."""
    results = []
    for cap in (memory_cap(None), unmetered()):
        torch.manual_seed(3)
        with cap:
            layer = nn.Sequential(nn.Linear(20, 20), nn.Dropout(), nn.Linear(20, 1))
            layer(torch.randn(8, 20)).sum().backward()
            results.append([p.grad for p in layer.parameters()])
    assert all(map(torch.equal, *results))


# --- devices --------------------------------------------------------------------------


def test_on_cuda_a_storage_counts_in_blocks() -> None:
    """Fake tensors of CUDA need none: 512 bytes for 4, 1,024 for 516, none for none."""
    cuda = torch.device("cuda", 0)
    with DryRun(), MemoryMeter() as meter:
        kept = [torch.empty(n, dtype=torch.uint8, device=cuda) for n in (4, 516, 0)]
        assert meter.live_bytes == 512 + 1024
        kept.pop(0)
        assert meter.live_bytes == 1024
        assert meter.bytes_by_kind() == {ACTIVATIONS: 1024}


def test_a_meter_of_one_device_counts_no_other() -> None:
    cuda = torch.device("cuda", 0)
    with DryRun(), MemoryMeter(device=cuda) as meter:
        kept = torch.empty(512, dtype=torch.uint8, device=cuda), torch.empty(9)
    assert (meter.peak_bytes, len(kept)) == (512, 2)
    with DryRun(), MemoryMeter(device=torch.device("cpu")) as meter:
        kept = torch.empty(512, dtype=torch.uint8, device=cuda), torch.empty(9)
    assert (meter.peak_bytes, len(kept)) == (36, 2)
