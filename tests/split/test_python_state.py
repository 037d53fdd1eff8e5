"""Whatever Python code keeps between two calls is seen, and what cannot repeat too."""

import itertools
import random
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flwr_smartsplit import Chain
from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.python_state import PythonState
from flwr_smartsplit.split.segment import Unit

TABLE = [0]


class Keeper(nn.Module):
    """A leaf that keeps something of each kind."""

    hits = 0

    def __init__(self):
        super().__init__()
        self.number = 0
        self.list = [0]
        self.deep = {"a": [1]}
        self.queue = deque([1], maxlen=3)
        self.count = itertools.count()
        self.array = np.zeros(2)
        self.generator = torch.Generator()
        self.random = random.Random(1)
        self.numpy = np.random.default_rng(0)
        self.tensor = torch.zeros(2)
        self.lazy = None

    def forward(self, x):
        del TABLE[1:]
        return x * 1.0


CHANGES = {
    "attribute": lambda m, x: setattr(m, "number", m.number + 1),
    "list": lambda m, x: m.list.append(1),
    "nested": lambda m, x: m.deep["a"].append(2),
    "queue": lambda m, x: m.queue.append(2),
    "iterator": lambda m, x: next(m.count),
    "array": lambda m, x: m.array.__iadd__(1),
    "random": lambda m, x: m.random.random(),
    "numpy": lambda m, x: m.numpy.random(),
    "tensor": lambda m, x: m.tensor.add_(1),
    "lazy": lambda m, x: setattr(m, "lazy", x.detach()),
    "class": lambda m, x: setattr(type(m), "hits", type(m).hits + 1),
    "global": lambda m, x: TABLE.append(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_kind_of_change_is_seen(change):
    keeper = Keeper()
    before = PythonState.of(keeper)
    assert not before.changes(PythonState.of(keeper))
    change(keeper, torch.ones(2))
    assert before.changes(PythonState.of(keeper))


def network(middle):
    return nn.Sequential(nn.Linear(4, 4), middle, nn.Linear(4, 2))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_unit_that_keeps_something_neither_reruns_nor_moves(change):
    class Changing(Keeper):
        def forward(self, x):
            change(self, x)
            return x * 2.0

    units = Chain.from_module(network(Changing()), torch.zeros(1, 4)).units
    assert [unit.can_rerun for unit in units] == [True, False, True]
    assert [bool(unit.changed) for unit in units] == [False, True, False]


class OwnChance(Keeper):
    def forward(self, x):
        return x * torch.rand(1, generator=self.generator)


class CountingNorm(nn.BatchNorm1d):
    def __init__(self):
        super().__init__(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class ReadsOldStatistics(nn.BatchNorm1d):
    """A second run would read the statistics that the first run has updated."""

    def forward(self, x):
        return super().forward(x - self.running_mean)


class ReadsNewStatistics(nn.BatchNorm1d):
    """Both runs read what the first has updated."""

    def forward(self, x):
        return super().forward(x) + self.running_mean


class OwnStatistics(nn.BatchNorm1d):
    """Nobody stops a second run from updating these."""

    def __init__(self):
        super().__init__(4, track_running_stats=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, training=True)


@pytest.mark.parametrize(
    "kind",
    [OwnChance, CountingNorm, partial(ReadsOldStatistics, 4), OwnStatistics],
)
def test_a_unit_that_a_second_run_would_repeat_otherwise_does_not_rerun(kind):
    units = Chain.from_module(network(kind()), torch.zeros(1, 4)).units
    assert not units[1].can_rerun


@pytest.mark.parametrize(
    "kind",
    [
        partial(nn.BatchNorm1d, 4),
        partial(ReadsNewStatistics, 4),
        partial(nn.Dropout, 0.5),
        nn.ReLU,
        Keeper,
    ],
)
def test_norms_dropout_and_writes_to_own_values_rerun(kind):
    units = Chain.from_module(network(kind()), torch.zeros(1, 4)).units
    assert all(unit.can_rerun for unit in units)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.keeper = Keeper()

    def middle(self, x):
        return x

    def forward(self, x):
        return self.b(F.relu(self.middle(self.a(x))))


class AsksKind(Net):
    def middle(self, x):
        return x * 2.0 if isinstance(x, torch.Tensor) else x


class AsksKindInEvaluation(Net):
    def middle(self, x):
        return x.detach() if torch.is_tensor(x) and not self.training else x


class Counts(Net):
    def middle(self, x):
        self.keeper.list[0] += 1
        return x / self.keeper.list[0]


class Iterates(Net):
    def middle(self, x):
        return x / (1 + next(self.keeper.count))


class Remembers(Net):
    def middle(self, x):
        last, self.keeper.lazy = self.keeper.lazy, x.detach()
        return x if last is None else x + last


@pytest.mark.parametrize(
    "kind", [AsksKind, AsksKindInEvaluation, Counts, Iterates, Remembers]
)
def test_a_forward_that_fx_reads_wrongly_is_refused(kind):
    with pytest.raises(NotSplittable, match=r"reads .* wrongly|its forward changes"):
        Chain.from_module(kind(), torch.zeros(1, 4))


class Accumulates(Net):
    """A constant that forward makes anew; torch.fx makes it once."""

    def middle(self, x):
        return x + torch.zeros(2, 4).add_(x.detach())


class Switches(Net):
    """It acts in a later step."""

    def middle(self, x):
        self.keeper.number += 1
        return x if self.keeper.number < 9 else -x


class Queues(Net):
    def middle(self, x):
        self.keeper.list.append(x.detach())
        return x if len(self.keeper.list) < 9 else -x


@pytest.mark.parametrize("kind", [Accumulates, Switches, Queues])
def test_what_acts_in_a_later_step_is_refused(kind):
    with pytest.raises(NotSplittable, match=r"reads .* wrongly|its forward changes"):
        Chain.from_module(kind(), torch.zeros(1, 4))


class Shows(Net):
    """Keeps what it computed, for people to look at."""

    def middle(self, x):
        self.shown = x.softmax(1)
        self.keeper.lazy = x.detach()
        self.keeper.list[0] = x
        self.keeper.deep["shape"] = x.shape
        return x * 1.0


def test_what_forward_only_shows_is_not_refused():
    model = Shows()
    chain = Chain.from_module(model, torch.zeros(1, 4))
    assert chain.unit_names == ("a", "mul", "relu", "b")
    assert not any(unit.changed for unit in chain.units)
    assert not hasattr(model, "shown")
    assert (model.keeper.lazy, model.keeper.list) == (None, [0])
    assert model.keeper.deep == {"a": [1]}


class Push(nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x):
        self.stack.append(x)
        return x * 1.0


class Pop(Push):
    def forward(self, x):
        return x + self.stack.pop() if self.stack else x


def test_no_cut_between_units_that_hand_something_over_in_python():
    stack = []
    model = nn.Sequential(
        nn.Linear(4, 4), Push(stack), nn.Linear(4, 4), Pop(stack), nn.Linear(4, 2)
    )
    chain = Chain.from_module(model, torch.zeros(1, 4))
    assert chain.unit_names == ("0", "3", "4")
    assert any("both sides" in why for why in chain.refusals.values())


class Lazy(dict):
    """Loads what it lists, as mappings of transformers do."""

    def items(self):
        raise AssertionError("A snapshot runs no code.")

    __iter__ = keys = values = items


LAZY = Lazy()


class NamesLazy(Net):
    def middle(self, x):
        return x if LAZY is None else x * 1.0


def test_a_snapshot_runs_no_code_of_what_it_looks_at():
    chain = Chain.from_module(NamesLazy(), torch.zeros(1, 4))
    assert all(unit.can_rerun for unit in chain.units)


class Slotted:
    __slots__ = ("number",)

    def __init__(self):
        self.number = 0


SLOTTED = Slotted()


def counted(root, x):
    SLOTTED.number += 1
    return root.a(x)


def kept(root, x, *, seen):
    seen.append(1)
    return root.a(x)


@pytest.mark.parametrize("forward", [counted, partial(kept, seen=[])])
def test_what_the_function_of_a_unit_keeps_is_seen(forward):
    model = Net()
    first = Unit("first", forward, reads=("a",))
    last = Unit("last", lambda root, x: root.b(x), reads=("b",))
    chain = Chain.from_units(model, [first, last], torch.zeros(1, 4))
    assert [unit.can_rerun for unit in chain.units] == [False, True]
    assert chain.units[0].changed


class AsksKindByName(Net):
    @property
    def is_tested(self):
        return not vars(self)["training"]

    def middle(self, x):
        return x.detach() if torch.is_tensor(x) and self.is_tested else x


def test_code_that_names_the_mode_is_compared_in_evaluation_too():
    with pytest.raises(NotSplittable, match=r"reads .* wrongly"):
        Chain.from_module(AsksKindByName(), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("part", "can_rerun"),
    [(nn.RReLU(), False), (nn.RReLU(inplace=True), False), (nn.BatchNorm1d(4), True)],
)
def test_what_fills_a_tensor_after_it_was_saved_does_not_rerun(part, can_rerun):
    """Torch ends a rerun when all is saved: RReLU's noise would not be filled."""
    model = nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 2))
    chain = Chain.from_module(model, torch.zeros(1, 4))
    by_hand = [
        Unit(name, lambda root, x, name=name: root.get_submodule(name)(x), (name,))
        for name in "012"
    ]
    for found in (chain, Chain.from_units(model, by_hand, torch.zeros(1, 4))):
        assert all(unit.can_rerun for unit in found.units) == can_rerun
