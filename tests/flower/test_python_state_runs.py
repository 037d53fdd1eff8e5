"""Models that keep something in Python, through whole federated runs."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit import MemoryBudget, Route, Task, predicted_peak_bytes
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.plan.checkpointing.plan import least_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.python_state import PythonState
from flwr_smartsplit.split.trace.facts import Prober
from tests.flower.apps import message_app, run, smart_split
from tests.flower.test_state_kinds import (
    SIZES,
    batches,
    federated,
    start_of,
    stock_fedavg,
    task_of,
)
from tests.tasks import State, differences

EDGES = (LocalEdge(name="near"),)
LIGHT = (nn.Tanh, nn.Sigmoid) * 4
"""Layers that are cheaper to run again than what they save is to keep."""


class Counter(nn.Module):
    """Scale by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        """Count, and scale."""
        self.calls[0] += 1
        return torch.tanh(x * self.calls[0])


class OwnNoise(nn.Module):
    """Draw from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        """Add noise."""
        return torch.tanh(x + torch.rand(8, generator=self.chance))


class Push(nn.Module):
    """Keep a value for later."""

    def __init__(self, stack: list[Tensor]) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        """Keep it."""
        self.stack.append(x)
        return x * 1.0


class Pop(Push):
    """Add what was kept."""

    def forward(self, x: Tensor) -> Tensor:
        """Add it."""
        return x + self.stack.pop() if self.stack else x


def linear() -> nn.Module:
    """Make a layer."""
    return nn.Linear(8, 8)


def net(*middle: Any, name: str = "") -> nn.Module:
    """Build a network; ``name`` tells recipes apart."""
    del name
    made = (linear(), nn.Tanh(), *(m() for m in middle), linear(), nn.Tanh())
    return nn.Sequential(*made, nn.Linear(8, 3))


def with_skip(name: str = "") -> nn.Module:
    """Hand a skip over in a list."""
    stack: list[Tensor] = []
    return net(partial(Push, stack), linear, partial(Pop, stack), name=name)


@dataclass(frozen=True)
class Falling(MemoryBudget):
    """Fall after a step."""

    first: int
    later: int

    def read(self, *, step: int, live_bytes: int) -> int:
        """Say what the tensors may take."""
        del live_bytes
        return self.first if step < 1 else self.later


def trained(task: Task, cut: int, budget: Any, rows: list[Any] | None = None) -> State:
    """Train two rounds with a cut and a budget."""
    apps = [
        message_app(i, budget, task=task, edges=EDGES, train_loader=batches(i))
        for i in range(len(SIZES))
    ]
    strategy = smart_split(
        EDGES, task=task, choose_route=lambda request: Route.split(cut, edge="near")
    )
    arrays = to_array_record(start_of(task))
    made = run(apps, strategy, arrays=arrays, num_rounds=2)
    assert made.kinds() == []
    if rows is not None:
        rows += strategy.round_plans[0].assignments
    state: State = made.state
    return state


def tightest(task: Task) -> tuple[int, int]:
    """Find a late cut, and the least bytes with which a device can train up to it."""
    profile = profile_of(task, batch_size=4)
    cut = len(profile.units) - 1
    return cut, least_bytes(profile, Route.split(cut))


@pytest.mark.parametrize("kind", [Counter, OwnNoise])
def test_what_counts_is_not_run_twice(kind: Any) -> None:
    """Under the tightest plan a unit that would run differently again runs once."""
    task = task_of(partial(net, kind, *LIGHT))
    stock = stock_fedavg(task)
    cut, budget = tightest(task)
    rows: list[Any] = []
    assert differences(trained(task, cut, budget, rows), stock) == []
    assert not rows[0].option.recompute.is_empty


def test_a_unit_that_is_run_twice_in_spite_of_it_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted error: nobody looks what a second run does."""
    monkeypatch.setattr(PythonState, "changes", lambda *a, **k: {})
    monkeypatch.setattr(Prober, "_repeats", lambda *a: True)
    task = task_of(partial(net, Counter, *LIGHT, name="planted"))
    stock = stock_fedavg(task)
    cut, budget = tightest(task)
    assert differences(trained(task, cut, budget), stock) != []


def test_a_cut_does_not_move_past_a_counter() -> None:
    """The budget falls, and the counter stays where it counted."""
    task = task_of(partial(net, Counter))
    stock = stock_fedavg(task)
    profile = profile_of(task, batch_size=4)
    cut = len(profile.units) - 1
    ample = predicted_peak_bytes(profile, Route.split(cut))
    state = trained(task, cut, Falling(ample, ample - 1))
    assert differences(state, stock) == []
    assert [unit.can_move for unit in profile.units].count(False) == 1


@pytest.mark.parametrize("cut", [1, 2, -1])
def test_a_skip_through_a_list_is_exact(cut: int) -> None:
    """No cut is offered between the two."""
    task = task_of(with_skip)
    chain = build_chain(task)
    assert any("both sides" in reason for reason in chain.refusals.values())
    route = Route.split(cut % len(chain), edge="near")
    made = federated(task, lambda client: route)
    assert differences(made.state, stock_fedavg(task)) == []


def test_a_lost_skip_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: a cut between the two."""
    module = "flwr_smartsplit.split.trace.cut_points.shared_state"
    monkeypatch.setattr(module, lambda *a: None)
    task = task_of(partial(with_skip, name="planted"))
    route = Route.split(3, edge="near")
    made = federated(task, lambda client: route)
    assert differences(made.state, stock_fedavg(task)) != []


class Asks(nn.Module):
    """Ask what a value is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linear(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """A traced value is no tensor."""
        x = self.first(x)
        return self.last(functional.relu(x) if isinstance(x, Tensor) else x)


def test_what_torch_fx_reads_wrongly_is_refused_before_the_first_round() -> None:
    """Whatever the routes are."""
    with pytest.raises(NotSplittable, match=r"torch.fx reads Asks wrongly.*isinstance"):
        federated(task_of(Asks), lambda client: Route.whole())


class Shows(Asks):
    """Keep what it computed, to look at."""

    def forward(self, x: Tensor) -> Tensor:
        """Nobody reads it."""
        self.shown = self.first(x).softmax(1)
        return self.last(torch.tanh(self.shown))


def test_what_forward_only_shows_changes_nothing() -> None:
    """It is no reason to refuse a model."""
    task = task_of(Shows)
    made = federated(task, lambda client: Route.split(1, edge="near"))
    assert differences(made.state, stock_fedavg(task)) == []
