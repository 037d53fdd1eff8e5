"""The cap: an error in time, with its numbers, and a way to go on afterwards."""

import gc
import pickle
import re
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from flwr_smartsplit import Route
from flwr_smartsplit.device.local_training import Conditions, Outcome, train_locally
from flwr_smartsplit.errors import MemoryCapExceeded
from flwr_smartsplit.memory import cap as cap_module
from flwr_smartsplit.memory.cap import CapMode, MemoryCap, known_steps, memory_cap
from flwr_smartsplit.memory.meter import ACTIVATIONS, MemoryMeter, phase
from flwr_smartsplit.split.build import state_of
from flwr_smartsplit.types import Status
from tests.tasks import TASK, client_plan, loader, transposed_mlp

FLOAT = 4


def test_the_cap_itself_is_allowed_and_a_byte_more_is_not():
    """Reaching the cap is fine; the operator that crosses it is named."""
    with memory_cap(100 * FLOAT):
        torch.zeros(100)
    with pytest.raises(MemoryCapExceeded), memory_cap(100 * FLOAT - 1):
        torch.zeros(100)


def test_the_error_carries_its_numbers_and_survives_pickling():
    """Who, where, in which phase, how much and for what, also after a journey."""
    batch = torch.zeros(2**18)  # 1 MiB
    with pytest.raises(MemoryCapExceeded) as info:
        with memory_cap(2 * 2**20, name="client a") as cap, phase("forward"):
            cap.track(batch)
            batch.repeat(3)
    error = pickle.loads(pickle.dumps(info.value))
    for each in (info.value, error):
        assert (each.live_bytes, each.budget_bytes) == (4 * 2**20, 2 * 2**20)
        assert (each.client, each.phase) == ("client a", "forward")
        assert each.bytes_by_kind == {ACTIVATIONS: 3 * 2**20, "batch": 2**20}
        assert each.operator.startswith("aten.")
        assert str(each) == (
            f"client a: {each.operator} in forward brings live tensors to 4 MiB, 2 MiB "
            "over the cap of 2 MiB (activations and temporaries 3 MiB, batch 1 MiB). "
            "Cut earlier, lower the batch size, or raise the budget."
        )


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


def test_a_sparse_gradient_does_not_hide_the_error():
    """The breakdown takes a sparse tensor apart: values and indices."""
    table = nn.Embedding(100, 4, sparse=True)
    with pytest.raises(MemoryCapExceeded) as info, memory_cap(2_000) as cap:
        cap.track(table)
        table(torch.tensor([1, 2])).sum().backward()
        torch.zeros(1_000)
    assert info.value.bytes_by_kind["gradients"] == 2 * 4 * FLOAT + 2 * 8


# --- what the live bytes are for ------------------------------------------------------


class AddingUp(MemoryMeter):
    """A meter that compares its breakdown with its sum after every operator."""

    def __torch_dispatch__(self, func: Any, *others: Any) -> Any:
        result = super().__torch_dispatch__(func, *others)
        assert sum(self.bytes_by_kind().values()) == self.live_bytes
        return result


def test_kinds_add_up_and_change_with_the_phase():
    """What a step holds is named rightly in forward, backward and optimizer."""
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6))
    weights, buffers = (30 + 12) * FLOAT, 12 * FLOAT + 8
    optimizer = torch.optim.Adam(model.parameters())
    batch = (torch.randn(4, 5), torch.ones(4))
    meter = AddingUp()
    with meter:
        meter.track(model, optimizer, batch)
        kinds = {"parameters": weights, "batch": 24 * FLOAT, "buffers": buffers}
        assert meter.bytes_by_kind() == kinds
        loss = model(batch[0]).mul(batch[1][:, None]).sum()
        assert meter.bytes_by_kind().keys() == {*kinds, ACTIVATIONS}
        loss.backward()
        del loss
        kinds["gradients"] = weights
        assert meter.bytes_by_kind() == kinds
        optimizer.step()
        kinds["optimizer state"] = 2 * weights + 3 * FLOAT
        assert meter.bytes_by_kind() == kinds
        optimizer.zero_grad()
        del kinds["gradients"]
        assert meter.bytes_by_kind() == kinds
    assert list(kinds.values()) != sorted(meter.bytes_by_kind().values())
    meter.forget(batch)
    del kinds["batch"]
    assert meter.bytes_by_kind() == kinds


def test_what_nobody_claims_is_an_activation():
    """A batch that was forgotten, and a tensor on meta, are not called batches."""
    meter = MemoryMeter()
    batch = torch.zeros(10)
    meter.track(batch, torch.zeros(3, device="meta"))
    meter.forget(batch)
    with meter:
        batch.add_(1)
    assert meter.bytes_by_kind() == {ACTIVATIONS: 10 * FLOAT}


# --- a whole round, phase by phase ----------------------------------------------------


def trained(budget_bytes: int | None) -> Outcome:
    """Train a network that is mostly parameters under a cap."""
    optimizer_fn = partial(torch.optim.Adam, lr=0.1)
    task = replace(TASK, model_fn=transposed_mlp, optimizer_fn=optimizer_fn)
    state = state_of(transposed_mlp())
    plan = client_plan(0, Route.whole(), state, budget_bytes=budget_bytes)
    no_edge = partial(pytest.fail, "a whole route needs no edge")
    return train_locally(plan, state, loader(0), Conditions(task=task, connect=no_edge))


def test_a_budget_can_be_crossed_in_every_phase_of_a_round():
    """Raised to what was just reached, again and again, it is at last enough."""
    needed, budget, messages = trained(None).report.peak_bytes, 0, []
    while (report := trained(budget).report).status is not Status.OK:
        assert report.status is Status.OUT_OF_MEMORY
        assert report.peak_bytes > budget
        messages.append(report.message)
        budget = report.peak_bytes
    assert budget == needed
    says = re.compile(
        r"client c0: (?:aten\.\S+ in (\w+)|track) brings live tensors to .+, .+ over "
        r"the cap of .+ \((.+)\)\. Cut earlier, lower the batch size, or raise .+"
    )
    found = [says.fullmatch(message) for message in messages]
    assert all(found)
    phases = [match[1] or "track" for match in found]
    expected = ["building", "track", "forward", "backward", "optimizer"]
    assert list(dict.fromkeys(phases)) == expected
    assert "optimizer state" in found[-1][2]


# --- when it looks --------------------------------------------------------------------


def looked_at(cap: MemoryCap, sizes: list[int]) -> list[int]:
    """Number the steps that are metered, when batches have these sizes."""
    steps = []
    for step, size in enumerate(sizes):
        with cap.step(torch.zeros(size)):
            if cap.live_bytes:
                steps.append(step)
        assert cap.live_bytes == 0
    return steps


@pytest.mark.parametrize(
    ("every", "num_steps", "steps"),
    [
        (1, 4, [0, 1, 2, 3]),
        (2, 7, [0, 1, 2, 4, 6]),
        (3, 8, [0, 1, 3, 6]),
        (50, 101, [0, 1, 50, 100]),
        (50, 1, [0]),
    ],
)
def test_a_sampled_cap_looks_at_two_and_then_at_one_in_so_many(every, num_steps, steps):
    """The step in which state is made, the one that finds it, and a sample."""
    cap = MemoryCap(None, mode="sampled", every=every)
    assert looked_at(cap, [5] * num_steps) == steps


def test_each_shape_is_counted_for_itself():
    """A smaller last batch is looked at twice, whenever it comes."""
    cap = MemoryCap(None, mode=CapMode.SAMPLED, every=4)
    assert looked_at(cap, [5, 5, 5, 3, 5, 5, 3, 5, 3]) == [0, 1, 3, 5, 6]
    with cap.step({"x": torch.zeros(5), "y": [torch.zeros(1), "text"]}):
        assert cap.live_bytes == 6 * FLOAT


def test_strict_looks_at_all_and_off_at_nothing():
    """Also at what is built and tracked; off raises whatever the budget."""
    assert looked_at(MemoryCap(None, mode="strict", every=9), [5] * 4) == [0, 1, 2, 3]
    off = MemoryCap(0, mode="off")
    off.track(torch.zeros(100))
    with off.building():
        torch.zeros(100)
    assert looked_at(off, [5] * 4) == []
    with memory_cap(0, mode="off"):
        torch.zeros(100)
    assert off.peak_bytes == 0
    for mode in ("strict", "sampled"):
        with pytest.raises(MemoryCapExceeded), MemoryCap(0, mode=mode).building():
            torch.zeros(100)


@pytest.mark.parametrize("inner", ["step", "building"])
def test_what_is_nested_is_metered_once(inner):
    """A step inside a strict block, or inside a step, meters no operator twice."""
    batch = torch.zeros(5)
    with memory_cap(None) as cap, cap.step(batch):
        with cap.step(batch) if inner == "step" else cap.building():
            assert len(_get_current_dispatch_mode_stack()) == 1
            kept = batch + 1
            assert cap.live_bytes == 10 * FLOAT
        assert len(_get_current_dispatch_mode_stack()) == 1
    assert _get_current_dispatch_mode_stack() == []
    assert cap.peak_bytes == 10 * FLOAT
    del kept


def test_a_step_in_another_thread_is_metered_there():
    """That this thread's block is strict does not meter another thread."""

    def work() -> None:
        with cap.step(torch.zeros(5)):
            torch.zeros(7)
        torch.zeros(100)

    with memory_cap(None) as cap:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert cap.peak_bytes == 12 * FLOAT


def test_a_batch_is_forgotten_also_after_an_error():
    """Whoever catches the error may keep the batch."""
    cap, batch = MemoryCap(None), torch.zeros(5)
    with pytest.raises(ZeroDivisionError), cap.step(batch):
        _ = 1 / 0
    assert (cap.live_bytes, cap.peak_bytes) == (0, 5 * FLOAT)
    assert _get_current_dispatch_mode_stack() == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"budget_bytes": -1},
            r"budget_bytes is -1: give a whole number of bytes .*or None",
        ),
        ({"every": 0}, "every is 0: give at least 1"),
        ({"every": -5}, "every is -5: give at least 1"),
        ({"mode": "lazy"}, "mode is 'lazy': .*one of 'sampled', 'strict', 'off'"),
        ({"mode": None}, "mode is None: .*one of 'sampled', 'strict', 'off'"),
    ],
)
def test_misuse_is_refused_with_what_is_allowed(wrong, words):
    """Before anything runs; the error repeats what was given."""
    budget_bytes = wrong.pop("budget_bytes", None)
    with pytest.raises(ValueError, match=words), memory_cap(budget_bytes, **wrong):
        pytest.fail("the block was entered")


def grey(*, is_channels_last: bool) -> torch.Tensor:
    """Make one grey image: two orders of memory have one shape."""
    if is_channels_last:
        return torch.ones(2, 5, 5, 1).permute(0, 3, 1, 2)
    return torch.ones(2, 1, 5, 5)


def sparse(num_values: int) -> torch.Tensor:
    """Make a sparse vector."""
    index = torch.arange(num_values)[None]
    ones = torch.ones(num_values)
    return torch.sparse_coo_tensor(index, ones, (9,), check_invariants=True)


KINDS = {
    "shape": (torch.ones(4, 3), torch.ones(3, 4)),
    "dtype": (torch.ones(4, dtype=torch.uint8), torch.ones(4, dtype=torch.int64)),
    "layout": (grey(is_channels_last=False), grey(is_channels_last=True)),
    "gaps": (torch.ones(4), torch.ones(8)[::2]),
    "storage": (torch.ones(4), torch.ones(8)[:4]),
    "repetition": (torch.ones(4, 4), torch.ones(4, 1).expand(4, 4)),
    "a gradient": (torch.ones(4), torch.ones(4, requires_grad=True)),
    "sparse": (torch.ones(9), sparse(3)),
    "sparse values": (sparse(2), sparse(3)),
    "nesting": (
        (torch.ones(4), torch.ones(4)),
        {"a": torch.ones(4), "b": torch.ones(4)},
    ),
    "a list": ((torch.ones(4), torch.ones(4)), [torch.ones(4), torch.ones(4)]),
    "keys": ({"a": torch.ones(4)}, {"b": torch.ones(4)}),
    "no targets": ((torch.ones(4), torch.ones(4)), (torch.ones(4), None)),
}


def num_metered(cap: MemoryCap, batch: Any) -> int:
    """Take two steps; count those that the cap looks at."""
    count = 0
    for _ in range(2):
        with cap.step(batch):
            modes = _get_current_dispatch_mode_stack()
            count += any(isinstance(mode, MemoryMeter) for mode in modes)
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_every_new_kind_of_step_is_metered(kind):
    cap = MemoryCap(None, mode="sampled")
    usual, new = KINDS[kind]
    assert [num_metered(cap, usual) for _ in range(2)] == [2, 0]
    assert [num_metered(cap, new) for _ in range(2)] == [2, 0]


def test_a_cap_that_knows_steps_by_their_shapes_would_be_seen(monkeypatch):
    """Planted: of the kinds above, only the one of another shape is then new."""
    monkeypatch.setattr(cap_module, "_kind_of", lambda leaf: tuple(leaf.shape))
    seen = {}
    for kind in ("shape", "dtype", "layout", "gaps"):
        cap = MemoryCap(None, mode="sampled")
        seen[kind] = [num_metered(cap, batch) for batch in KINDS[kind]]
    old = [2, 0]
    assert seen == {"shape": [2, 2], "dtype": old, "layout": old, "gaps": old}


# --- what is known from earlier rounds ------------------------------------------------


def held(cap, sizes):
    """Take steps that hold their batch twice; return which of them were metered."""
    steps = []
    for step, size in enumerate(sizes):
        batch = torch.zeros(size)
        with cap.step(batch):
            if _get_current_dispatch_mode_stack():
                steps.append(step)
            kept = batch + 1
            del kept
    return steps


def test_steps_that_are_known_are_metered_one_in_so_many():
    """Whichever round they are in; the peak is the one of before."""
    known = {}
    first = MemoryCap(None, mode="sampled", every=10, known=known)
    assert held(first, [5] * 6) == [0, 1]
    second = MemoryCap(None, mode="sampled", every=10, known=known)
    assert held(second, [5] * 6) == [4]  # The eleventh of all
    third = MemoryCap(None, mode="sampled", every=10, known=known)
    assert held(third, [5] * 2) == []
    assert first.peak_bytes == second.peak_bytes == third.peak_bytes == 10 * FLOAT


def test_first_steps_and_later_ones_are_known_apart():
    """The second step finds what the optimizer made in the first."""
    known = {}
    assert held(MemoryCap(None, mode="sampled", known=known), [5]) == [0]
    assert held(MemoryCap(None, mode="sampled", known=known), [5, 5, 7]) == [1, 2]
    last = MemoryCap(None, mode="sampled", known=known)
    assert held(last, [5, 5, 7, 7]) == [3]
    assert last.peak_bytes == 14 * FLOAT


def test_rounds_of_one_step_are_metered_once():
    """A round after the other, each with a cap of its own."""
    known = {}
    rounds = [MemoryCap(None, mode="sampled", known=known) for _ in range(3)]
    assert [held(cap, [5]) for cap in rounds] == [[0], [], []]
    assert [cap.peak_bytes for cap in rounds] == [10 * FLOAT] * 3


def adam_steps(cap, sizes):
    """Take steps with Adam on batches of so many rows; its state comes with the first.

    Return which were metered.
    """
    model, steps = nn.Linear(50, 50), []
    optimizer = torch.optim.Adam(model.parameters())
    for step, size in enumerate(sizes):
        batch = torch.zeros(size, 50)
        with cap.step(batch, model, optimizer):
            if _get_current_dispatch_mode_stack():
                steps.append(step)
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
    return steps


def test_a_kind_that_opened_a_round_is_not_known_for_later_in_one():
    """Planted in a count by kind: the larger batch comes second, after Adam's state."""
    known = {}
    assert adam_steps(MemoryCap(None, mode="sampled", known=known), [900, 8]) == [0, 1]
    free = MemoryCap(None, mode="strict")
    adam_steps(free, [8, 900])
    cap = MemoryCap(free.peak_bytes - 1, mode="sampled", known=known)
    with pytest.raises(MemoryCapExceeded):
        adam_steps(cap, [8, 900])
    cap = MemoryCap(None, mode="sampled", known=known)
    assert adam_steps(cap, [8, 900]) == [1]
    assert cap.peak_bytes == free.peak_bytes


def test_a_larger_kind_does_not_count_for_a_smaller_one():
    """Planted in a peak that is the cap's own: 14 numbers for batches of 5."""
    known = {}
    held(MemoryCap(None, mode="sampled", known=known), [7, 7, 5, 5])
    last = MemoryCap(None, mode="sampled", known=known)
    assert held(last, [5, 5]) == [0]  # As the first of a round, it was not seen yet.
    assert last.peak_bytes == 10 * FLOAT


def test_what_is_known_to_exceed_the_cap_is_metered_again():
    """So the error names the operator, and comes where the memory is taken."""
    known = {}
    held(MemoryCap(None, mode="sampled", known=known), [5, 5])
    tight = MemoryCap(9 * FLOAT, mode="sampled", known=known)
    with pytest.raises(MemoryCapExceeded, match="add"):
        held(tight, [5])
    tight.limit(10 * FLOAT)
    assert held(tight, [5]) == []


def test_a_cap_that_starts_over_knows_nothing():
    """What is trained has changed; the others' knowledge stays."""
    known = {}
    held(MemoryCap(None, mode="sampled", known=known), [5, 5])
    cap = MemoryCap(None, mode="sampled", known=known)
    cap.start_over()
    assert held(cap, [5, 5, 5]) == [0, 1]
    assert held(MemoryCap(None, mode="sampled", known=known), [5, 5]) == []


def test_what_is_known_goes_by_task_and_route():
    """Each set of facts has its own."""
    one = known_steps("task", 1, True)
    assert known_steps("task", 1, True) is one
    assert known_steps("task", 2, True) is not one
