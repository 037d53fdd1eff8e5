"""Cuts that move between two steps of a round change where it is done, and no bit."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from flwr_smartsplit import (
    Route,
    Task,
    Unit,
    predicted_peak_bytes,
    proximal,
)
from flwr_smartsplit.device.local_training import Conditions, Outcome
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.device.step_timer import StepTimer
from flwr_smartsplit.edge import client as link_module
from flwr_smartsplit.edge import cut_moves as moving_module
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.cut_moves import MoveCut, pack_units
from flwr_smartsplit.edge.session import Session
from flwr_smartsplit.errors import (
    EdgeUnreachable,
    InvalidRoute,
    MemoryCapExceeded,
    RefusedMove,
)
from flwr_smartsplit.memory.cap import CapMode, MemoryCap
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.train import unit_migration as carrying_module
from flwr_smartsplit.train.unit_migration import MigratedUnits
from flwr_smartsplit.types import Status
from tests.device.test_routes import FAR, NEAR, Pair
from tests.faults import Deliver, Hook
from tests.tasks import (
    BATCH_SIZE,
    TASK,
    client_plan,
    device_part,
    differences,
    initial_state,
    loader,
    tiny_chain,
    tiny_cnn,
)

NUM_STEPS = 9  # Three epochs, each with a last batch of one example.
SPLIT = partial(Route.split, edge=NEAR)
Between = Callable[[RouteRunner], None]


def one_cycle(optimizer: Optimizer, config: Any) -> LRScheduler:
    """Change rates and momenta from step to step."""
    del config
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=NUM_STEPS + 1)


VARIANTS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "plain": {"optimizer_fn": partial(torch.optim.SGD, lr=0.05)},
    "adam": {"optimizer_fn": partial(torch.optim.Adam, lr=0.01)},
    "adagrad": {"optimizer_fn": partial(torch.optim.Adagrad, lr=0.01)},
    "proximal": {
        "optimizer_fn": partial(proximal, optimizer_fn=TASK.optimizer_fn, mu=0.5)
    },
    "scheduled": {"schedule_fn": one_cycle},
    "clipped": {"max_gradient_norm": 0.3},
    "all": {
        "optimizer_fn": partial(torch.optim.AdamW, lr=0.01),
        "schedule_fn": one_cycle,
        "max_gradient_norm": 0.3,
    },
}

EVERYWHERE = {0: 2, 1: 8, 2: 7, 3: 1, 4: 6, 5: 5, 7: 3, 8: 4}
"""Every cut, earlier and later, by the number of steps done before."""
BELOW = {0: 1, 2: 5, 3: 2, 5: 4, 6: 1, 8: 3}
"""The same below a second cut at six."""


class Moving(Pair):
    """Client 0 and two edges, in a round of nine steps."""

    between: Between | None = None
    epochs = 3
    cap_mode = CapMode.STRICT

    @property
    def chain(self) -> Chain:
        """The task's model."""
        return build_chain(self.task)

    def _parts(self, route: Route) -> Any:
        state = initial_state()
        plan = client_plan(0, route, state, addresses=self.addresses)
        conditions = Conditions(
            task=self.task,
            connect=lambda place, address: self.edges[place].connect(address),
            cap_mode=self.cap_mode,
            local_epochs=self.epochs,
            between_steps=self.between,
        )
        return plan, device_part(state, route), loader(0), conditions

    def run(
        self, route: Route, between: Between | None = None, *, epochs: int = 3
    ) -> Outcome:
        """Train along a route, with something between the steps."""
        self.between, self.epochs = between, epochs
        return self.train(route)


def losses_into(losses: list[float]) -> Between:
    """Write down the mean loss so far before each step."""
    return lambda runner: losses.append(runner.report(num_epochs=1).loss)


def moving(plan: dict[int, int], *others: Between) -> Between:
    """Move the cut before certain steps."""

    def between(runner: RouteRunner) -> None:
        for other in others:
            other(runner)
        if runner.num_steps in plan:
            runner.move(plan[runner.num_steps], reason=f"test {runner.num_steps}")

    return between


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Moving]:
    """Start two edges."""
    yield Moving(tmp_path)


KINDS = {
    "split": (SPLIT(3), EVERYWHERE),
    "u-shape": (Route.u_shape(3, 6, edge=NEAR), BELOW),
    "hops": (Route.hops((3, 6), edges=(NEAR, FAR)), BELOW),
    "both": (Route((3, 6, 8), ("device", NEAR, FAR, "device")), BELOW),
}


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("split", name) for name in VARIANTS),
        *itertools.product(list(KINDS)[1:], ["momentum", "clipped", "all"]),
    ],
)
def test_a_route_that_moves_trains_to_the_same_bits(
    tmp_path: Path, kind: str, name: str
) -> None:
    """Loss after every step, the state everywhere, and what the edges sign for."""
    pair = Moving(tmp_path, replace(TASK, **VARIANTS[name]))
    route, plan = KINDS[kind]
    expected_losses: list[float] = []
    losses: list[float] = []
    last = route.with_first_cut(list(plan.values())[-1])
    expected = pair.run(last, losses_into(expected_losses))
    outcome = pair.run(route, moving(plan, losses_into(losses)))
    assert outcome.report.status is Status.OK, outcome.report.message
    assert len(losses) == NUM_STEPS
    assert losses == expected_losses
    assert outcome.report.loss == expected.report.loss
    assert outcome.receipts == expected.receipts
    assert differences(outcome.state, expected.state) == []
    whole = pair.run(Route.whole())
    assert differences(pair.merged(outcome), whole.state) == []
    moves = [(move.step, move.after) for move in outcome.report.moves]
    assert moves == list(plan.items())


@pytest.mark.parametrize("cut", range(1, len(tiny_chain())))
@pytest.mark.parametrize("start", [1, 8])
def test_every_cut_moves_to_every_other(pair: Moving, start: int, cut: int) -> None:
    """And back again before the next step, which changes nothing either."""
    plain = pair.run(SPLIT(cut))

    def there_and_back(runner: RouteRunner) -> None:
        if runner.num_steps == 2:
            runner.move(cut)
        if runner.num_steps == 5:
            runner.move(start)
            runner.move(cut)

    outcome = pair.run(SPLIT(start), there_and_back)
    assert outcome.receipts == plain.receipts
    assert differences(outcome.state, plain.state) == []
    assert len(outcome.report.moves) == (0 if cut == start else 3)


# --- memory ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cap_mode"),
    [
        ("momentum", CapMode.STRICT),
        ("adam", CapMode.STRICT),
        ("clipped", CapMode.SAMPLED),
    ],
)
@pytest.mark.parametrize(
    ("route", "cuts"),
    [(SPLIT(8), (5, 2, 6)), (Route.u_shape(6, 7, edge=NEAR), (2, 4, 1))],
)
def test_the_peak_after_a_move_is_that_of_the_new_route(
    tmp_path: Path, name: str, cap_mode: CapMode, route: Route, cuts: tuple[int, ...]
) -> None:
    """In the steps that follow, also where only some are looked at."""
    task = replace(TASK, **VARIANTS[name])
    pair = Moving(tmp_path, task)
    profile = profile_of(task, batch_size=BATCH_SIZE)
    peaks: list[tuple[int, int]] = []

    def between(runner: RouteRunner) -> None:
        if runner.num_steps and runner.num_steps % 3 == 0:
            peaks.append((runner.route.cuts[0], runner.cap.peak_bytes))
            runner.move(cuts[len(peaks) - 1])
            runner.cap.meter.peak_bytes = 0

    pair.cap_mode = cap_mode
    pair.run(route, between, epochs=4)
    assert [cut for cut, _ in peaks] == [route.cuts[0], *cuts[:-1]]
    for cut, peak_bytes in peaks:
        there = route.with_first_cut(cut)
        assert peak_bytes == predicted_peak_bytes(profile, there)


def test_moving_earlier_holds_nothing_twice(pair: Moving) -> None:
    """The device's memory only falls while it gives units away."""
    seen: list[tuple[int, int]] = []

    def between(runner: RouteRunner) -> None:
        if runner.num_steps == 4:
            before = runner.cap.live_bytes
            runner.cap.meter.peak_bytes = 0
            with runner.cap.building():
                runner.move(2)
            assert runner.cap.peak_bytes <= before
            seen.append((before, runner.cap.live_bytes))

    assert pair.run(SPLIT(8), between).report.status is Status.OK
    ((before, after),) = seen
    assert after < before


@pytest.mark.parametrize("name", ["momentum", "all"])
def test_units_that_do_not_fit_stay_where_they_are(tmp_path: Path, name: str) -> None:
    """The cut goes back, and the round goes on to the same bits."""
    pair = Moving(tmp_path, replace(TASK, **VARIANTS[name]))
    refused: list[str] = []

    def between(runner: RouteRunner) -> None:
        if runner.num_steps in (2, 5):
            meter = runner.cap.meter
            meter.budget_bytes = meter.live_bytes + 100
            try:
                runner.move(8)
            except MemoryCapExceeded as error:
                refused.append(str(error))
            meter.budget_bytes = None

    outcome = pair.run(SPLIT(3), between)
    plain = pair.run(SPLIT(3))
    assert len(refused) == 2
    assert outcome.report.moves == ()
    assert outcome.receipts == plain.receipts
    assert differences(outcome.state, plain.state) == []


def test_units_that_do_not_fit_end_in_a_report_if_nobody_cares(pair: Moving) -> None:
    """As a step over the cap does."""

    def between(runner: RouteRunner) -> None:
        runner.cap.meter.budget_bytes = runner.cap.live_bytes + 100
        runner.move(8)

    outcome = pair.run(SPLIT(3), between)
    assert outcome.report.status is Status.OUT_OF_MEMORY
    assert (outcome.state, outcome.receipts, pair.sealed()) == ({}, (), [])


# --- what cannot be moved -------------------------------------------------------------


class Stateful(torch.optim.SGD):
    """An optimizer that remembers something it should not."""

    def __init__(self, parameters: Any, *, what: str) -> None:
        super().__init__(parameters, lr=0.05)
        self.what = what
        self.calls = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Remember, in one of several ways."""
        super().step(closure)
        trained = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        if self.what == "an attribute" and trained:
            self.calls += 1
        if self.what == "an object" and trained:
            for parameter in trained:
                self.state[parameter]["object"] = object()
        if self.what == "no parameter's" and trained:
            self.state["all"] = {"sum": 1}  # type: ignore[index]
        if self.what == "the group" and trained:
            self.param_groups[0]["lr"] *= 0.9
        if self.what == "decay" and not trained:
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(0.9)
        if self.what == "an error" and not trained:
            raise ZeroDivisionError("no gradients")


REFUSALS = {
    "an attribute": "has attributes that training changes",
    "an object": "has a object",
    "no parameter's": "belongs to no parameter",
    "the group": "is set to",
    "decay": "changes parameters that have no gradient",
    "an error": "ZeroDivisionError: no gradients",
}


@pytest.mark.parametrize("what", REFUSALS)
@pytest.mark.parametrize("cut", [2, 7])
def test_what_cannot_be_carried_exactly_is_refused_and_goes_on_unmoved(
    tmp_path: Path, what: str, cut: int
) -> None:
    """At whichever place it is found; the round ends as if nobody had asked."""
    task = replace(TASK, optimizer_fn=partial(Stateful, what=what))
    pair = Moving(tmp_path, task)
    refused: list[str] = []

    def between(runner: RouteRunner) -> None:
        if runner.num_steps == 3:
            try:
                runner.move(cut)
            except RefusedMove as error:
                refused.append(str(error))

    outcome = pair.run(SPLIT(5), between)
    plain = pair.run(SPLIT(5))
    assert len(refused) == 1
    assert REFUSALS[what] in refused[0]
    assert outcome.report.moves == ()
    assert outcome.receipts == plain.receipts
    assert differences(outcome.state, plain.state) == []


class Counting(nn.BatchNorm2d):
    """A module that counts where no state is."""

    calls = 0

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Count, and normalise."""
        if self.training:
            self.calls += 1
        return super().forward(inputs)


class Warming(nn.BatchNorm2d):
    """A module with a buffer that is not in its state and that training changes."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Scale by more from step to step."""
        scale: torch.Tensor = self.scale
        if self.training:
            scale.add_(0.25)
        return super().forward(inputs * 1.0) * scale.clone()


def cnn_with(kind: type[nn.BatchNorm2d]) -> nn.Sequential:
    """Build the tests' model with another normalisation."""
    model = tiny_cnn()
    model[5] = kind(6)
    return model


def units_of(model: nn.Module) -> list[Unit]:
    """Run one child after another."""
    return [
        Unit(name, partial(_call, name), (name,), is_random=name == "3")
        for name, _ in model.named_children()
    ]


def _call(name: str, root: nn.Module, value: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = root.get_submodule(name)(value)
    return result


def task_with(kind: type[nn.BatchNorm2d]) -> Task:
    """Make the task with another normalisation, in units listed by hand."""
    return replace(TASK, model_fn=partial(cnn_with, kind), units_fn=units_of)


def test_a_module_that_counts_outside_its_buffers_is_refused(tmp_path: Path) -> None:
    """Its number would not come along."""
    pair = Moving(tmp_path, task_with(Counting))

    def between(runner: RouteRunner) -> None:
        if runner.num_steps == 2:
            with pytest.raises(RefusedMove, match=r"training changes 5\.calls"):
                runner.move(9 - runner.route.cuts[0])
            runner.move(4 if runner.route.cuts[0] == 3 else 7)

    for cut, last in ((6, 7), (3, 4)):
        moves = pair.run(SPLIT(cut), between).report.moves
        assert [move.after for move in moves] == [last]


def test_buffers_outside_the_state_come_along(tmp_path: Path) -> None:
    """They are lost between rounds, as in FedAvg, but not within one."""
    pair = Moving(tmp_path, task_with(Warming))
    plain = pair.run(SPLIT(4))
    outcome = pair.run(SPLIT(7), moving({2: 3, 4: 8, 6: 4}))
    assert outcome.receipts == plain.receipts
    assert differences(outcome.state, plain.state) == []


def test_what_stays_on_the_device_does_not_leave_it(tmp_path: Path) -> None:
    """A unit with state of the client's own."""
    task = replace(TASK, is_local=lambda name: name.startswith("1."))
    pair = Moving(tmp_path, task)

    def between(runner: RouteRunner) -> None:
        if runner.num_steps == 2:
            with pytest.raises(RefusedMove, match="cannot move below 2"):
                runner.move(1)
            runner.move(2)

    outcome = pair.run(SPLIT(4), between)
    assert [move.after for move in outcome.report.moves] == [2]


@pytest.mark.parametrize(
    ("route", "cut", "error"),
    [
        (SPLIT(3), 0, "at least 1"),
        (SPLIT(3), 9, "outside a chain of 9 units"),
        (Route.u_shape(3, 6, edge=NEAR), 6, "strictly increasing"),
        (Route.whole(), 3, "no cut that could move"),
    ],
)
def test_there_is_no_such_cut(pair: Moving, route: Route, cut: int, error: str) -> None:
    """The device says so itself; nothing was sent."""

    def between(runner: RouteRunner) -> None:
        with pytest.raises(InvalidRoute, match=error):
            runner.move(cut)

    assert pair.run(route, between).report.status is Status.OK
    assert not any(isinstance(r, MoveCut) for r in pair.edges[NEAR].requests)


def test_an_evaluation_does_not_move(pair: Moving) -> None:
    """It has no steps that it could be fenced by."""
    state = initial_state()
    plan = client_plan(0, SPLIT(3), state, addresses=pair.addresses)
    timer = StepTimer(plan, clock=time.perf_counter)
    runner = RouteRunner(plan, TASK, MemoryCap(None), is_trained=False, timer=timer)
    connect = lambda place, address: pair.edges[place].connect(address)  # noqa: E731
    runner.open(device_part(state, SPLIT(3)), connect, token="t")
    with pytest.raises(RefusedMove, match="is trained"):
        runner.move(2)
    runner.abandon()


# --- faults ---------------------------------------------------------------------------


PLAN = {2: 6, 4: 2, 6: 7}


@pytest.mark.parametrize("name", ["momentum", "all"])
def test_a_lost_reply_moves_once(tmp_path: Path, name: str) -> None:
    """Whichever move it belongs to."""
    pair = Moving(tmp_path, replace(TASK, **VARIANTS[name]))
    expected = pair.run(SPLIT(4), moving(PLAN))
    for number in range(len(PLAN)):
        pair.edges[NEAR].hook = delivered_twice(number)
        outcome = pair.run(SPLIT(4), moving(PLAN))
        assert outcome.report.status is Status.OK
        assert outcome.receipts == expected.receipts
        assert differences(outcome.state, expected.state) == []


def delivered_twice(number: int) -> Hook:
    """Deliver one move a second time, as after a reply that was lost."""

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, MoveCut) and request.number == number:
            deliver(request)
        return deliver(request)

    return hook


@pytest.mark.parametrize("delivers", [False, True])
@pytest.mark.parametrize("number", range(len(PLAN)))
def test_a_move_without_an_answer_is_the_end_of_the_session(
    pair: Moving, number: int, delivers: bool
) -> None:
    """Whether or not the edge has switched: nothing is sealed."""

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, MoveCut) and request.number == number:
            if delivers:
                deliver(request)
            raise EdgeUnreachable("the line is dead.")
        return deliver(request)

    pair.edges[NEAR].hook = hook
    outcome = pair.run(SPLIT(4), moving(PLAN))
    assert outcome.report.status is Status.EDGE_FAILED
    assert "the line is dead" in outcome.report.message
    assert (outcome.state, outcome.receipts, pair.sealed()) == ({}, (), [])


def test_an_edge_that_restarts_knows_no_session_to_move(pair: Moving) -> None:
    """Its incarnation is another one."""

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, MoveCut) and request.number == 1:
            pair.edges[NEAR].restart()
        return deliver(request)

    pair.edges[NEAR].hook = hook
    outcome = pair.run(SPLIT(4), moving(PLAN))
    assert outcome.report.status is Status.EDGE_FAILED
    assert "is not open at this edge" in outcome.report.message


@pytest.mark.parametrize("late", [wire.Forward, wire.Seal])
def test_a_move_that_comes_again_after_the_next_step_voids_the_session(
    pair: Moving, late: type
) -> None:
    """A repetition is due before that step; later it belongs to the past."""
    moves: list[MoveCut] = []

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, MoveCut):
            moves.append(request)
        if isinstance(request, late) and moves and getattr(request, "step", 9) > 2:
            return deliver(moves[0])
        return deliver(request)

    pair.edges[NEAR].hook = hook
    outcome = pair.run(SPLIT(4), moving({2: 6}))
    assert outcome.report.status is Status.EDGE_FAILED
    assert "step 2 came after" in outcome.report.message
    assert pair.sealed() == []


# --- planted errors -------------------------------------------------------------------


def forgetting(part: str) -> Callable[[MigratedUnits], MigratedUnits]:
    """Make a carrier that loses something on the way."""

    def carry(units: MigratedUnits) -> MigratedUnits:
        if part == "momentum":
            return replace(pack_units(units), optimizer={})
        initial = initial_state()
        kept = {
            name: initial[name] if name.endswith(part) else array
            for name, array in units.state.items()
        }
        return replace(pack_units(units), state=kept)

    return carry


@pytest.mark.parametrize("part", ["momentum", "running_mean", "num_batches_tracked"])
@pytest.mark.parametrize(
    ("place", "cut"), [(link_module, 3), (moving_module, 7)], ids=["device", "edge"]
)
def test_a_move_that_forgets_something_is_seen(
    pair: Moving, part: str, place: Any, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: momentum or a buffer stays behind, at the device or at the edge."""
    expected = pair.run(SPLIT(cut))
    moved = pair.run(SPLIT(10 - cut), moving({4: cut}))
    assert moved.receipts == expected.receipts
    monkeypatch.setattr(place, "pack_units", forgetting(part))
    outcome = pair.run(SPLIT(10 - cut), moving({4: cut}))
    assert outcome.report.status is Status.OK
    same = outcome.receipts == expected.receipts
    assert not (same and differences(outcome.state, expected.state) == [])


def test_a_move_that_forgets_the_schedule_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the new optimizer begins the schedule again."""
    pair = Moving(tmp_path, replace(TASK, **VARIANTS["scheduled"]))
    monkeypatch.setattr(carrying_module, "_replay", lambda runner, num_steps: None)
    with pytest.raises(RefusedMove, match="is set to"):
        pair.run(SPLIT(5), moving({4: 3}))


def test_a_second_update_of_one_step_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the step after a move does the update again that the move has done."""
    pair = Moving(tmp_path, replace(TASK, **VARIANTS["clipped"]))
    expected = pair.run(SPLIT(3))
    update = Session.update

    def twice(self: Session, norm: float | None) -> None:
        self._num_updated = min(self._num_updated, self.num_steps - 1)
        update(self, norm)

    monkeypatch.setattr(Session, "update", twice)
    outcome = pair.run(SPLIT(5), moving({4: 3}))
    assert outcome.receipts != expected.receipts
