"""A budget that falls and rises: what the device does changes, and no number does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest

from flwr_smartsplit import MemoryBudget, Route, predicted_peak_bytes
from flwr_smartsplit.device import budget_adapter as adapting
from flwr_smartsplit.device.budget_adapter import Adapter
from flwr_smartsplit.device.local_training import Conditions, Outcome, train_locally
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.protocol import HoldState
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.memory.budget import as_budget
from flwr_smartsplit.memory.cap import CapMode
from flwr_smartsplit.plan.adaptation import MARGIN, PATIENCE_STEPS, is_calm
from flwr_smartsplit.plan.checkpointing.plan import least_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import Status
from tests.tasks import (
    BATCH_SIZE,
    TASK,
    client_plan,
    device_part,
    differences,
    examples,
    initial_state,
)

PLANNED = Route.split(7)
NUM_STEPS = 24
PROFILE = profile_of(TASK, batch_size=BATCH_SIZE)
NEEDED = predicted_peak_bytes(PROFILE, PLANNED)


def at(cut: int) -> int:
    """Say what a cut needs if nothing runs twice."""
    return predicted_peak_bytes(PROFILE, Route.split(cut))


@dataclass(frozen=True)
class Listed(MemoryBudget):
    """A budget for each step; the last one stays."""

    budgets: tuple[int | None, ...]

    def read(self, *, step: int, live_bytes: int) -> int | None:
        del live_bytes
        return self.budgets[min(step, len(self.budgets) - 1)]


@pytest.fixture
def edge() -> Iterator[tuple[Edge, str]]:
    """Start an edge that holds the first state."""
    edge = LocalEdge()
    address = edge.start(TASK)
    state = initial_state()
    edge.connect(address).send(HoldState(state_digest(state), state))
    yield edge, address
    edge.stop(address)


def run(
    edge: tuple[Edge, str],
    budgets: Sequence[int | None] | None,
    *,
    task: Task = TASK,
    planned: Route = PLANNED,
) -> tuple[Outcome, list[float]]:
    """Train under a budget; return the outcome, and the summed loss at each step."""
    service, address = edge
    plan = replace(
        client_plan(0, planned, initial_state(), addresses={"edge": address}),
        predicted_peak_bytes=predicted_peak_bytes(PROFILE, planned),
    )
    budget = None if budgets is None else as_budget(Listed(tuple(budgets)))
    adapter = budget and Adapter(budget, task, batch_size=BATCH_SIZE)
    losses: list[float] = []

    def between(runner: RouteRunner) -> None:
        losses.append(runner.metrics.loss_sum)
        if adapter is not None:
            adapter(runner)

    batches = list(batches_for(NUM_STEPS))
    conditions = Conditions(
        task=task,
        connect=lambda place, address: service.connect(address),
        cap_mode=CapMode.STRICT,
        between_steps=between,
    )
    state = device_part(initial_state(), planned)
    return train_locally(plan, state, batches, conditions), losses


def batches_for(num_steps: int) -> Iterator[tuple[object, object]]:
    """Repeat a client's whole batches."""
    inputs, targets = examples(3).tensors
    for step in range(num_steps):
        start = step % 2 * BATCH_SIZE
        stop = start + BATCH_SIZE
        yield inputs[start:stop].clone(), targets[start:stop].clone()


FALLS_AND_RISES = [
    *[NEEDED] * 3,
    *[NEEDED - 1] * 3,
    *[at(4)] * 3,
    *[at(1)] * 3,
    *[NEEDED * 2] * 12,
]


def test_a_budget_that_falls_and_rises_changes_no_number(edge):
    """Plans and cuts follow it; losses, states and the edge's tail are equal."""
    plain, plain_losses = run(edge, None)
    found, losses = run(edge, FALLS_AND_RISES)
    assert found.report.status is Status.OK, found.report.message
    assert losses == plain_losses
    assert found.report.loss == plain.report.loss
    assert differences(found.state, plain.state) == []
    assert [r.digest for r in found.receipts] == [r.digest for r in plain.receipts]


def test_every_change_is_a_row_with_its_reason(edge):
    """First a tighter plan, then earlier cuts; when there is room, all comes back."""
    report = run(edge, FALLS_AND_RISES)[0].report
    steps = [(move.step, move.before, move.after) for move in report.moves]
    assert [before > after for _, before, after in steps] == [True, True, False]
    assert (steps[0][0], steps[1][0]) == (6, 9)
    assert steps[-1] == (12 + PATIENCE_STEPS, steps[-2][2], PLANNED.cuts[0])
    first = report.replans[0]
    assert (first.step, first.before) == (3, "none")
    assert first.after != "none"
    assert report.replans[-1].after == "none"
    for row in (*report.moves, *report.replans):
        assert "the budget" in row.reason


def test_live_bytes_stay_below_a_budget_that_a_walk_ignores_is_crossed(edge):
    """The cap follows the budget: without changes, the first step is over it."""
    found, _ = run(edge, FALLS_AND_RISES)
    assert found.report.peak_bytes <= NEEDED * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RouteRunner, "replan", lambda *_, **__: None)
        patch.setattr(RouteRunner, "move", lambda *_, **__: None)
        ignored, _ = run(edge, FALLS_AND_RISES)
    assert ignored.report.status is Status.OUT_OF_MEMORY
    assert "over the cap" in ignored.report.message


def test_a_budget_that_goes_up_and_down_does_not_move_the_cut_each_time(edge):
    """What fits the lower one stays."""
    report = run(edge, [NEEDED * 2, at(4)] * 12)[0].report
    assert report.status is Status.OK
    assert len(report.moves) == 1


def test_what_does_not_fit_at_all_ends_in_a_reply_with_the_numbers(edge):
    """The least that would do, and the budget."""
    least = min(least_bytes(PROFILE, Route.split(cut)) for cut in range(1, 8))
    report = run(edge, [NEEDED, NEEDED, least - 1])[0].report
    assert report.status is Status.OUT_OF_MEMORY
    assert "nothing fits" in report.message
    assert report.num_steps == 2
    assert run(edge, [NEEDED, NEEDED, least])[0].report.status is Status.OK


def test_units_that_stay_on_their_device_are_not_moved(edge):
    """What is left are tighter plans, and then a clear end."""
    task = replace(TASK, is_local=lambda name: name.startswith("5."))
    tight = least_bytes(PROFILE, PLANNED)
    report = run(edge, [NEEDED, tight], task=task)[0].report
    assert (report.status, report.moves) == (Status.OK, ())
    assert report.replans
    report = run(edge, [NEEDED, tight - 1], task=task)[0].report
    assert report.status is Status.OUT_OF_MEMORY


def test_a_budget_that_is_enough_needs_no_costs(edge, monkeypatch):
    """Nothing is profiled as long as all goes as planned."""
    monkeypatch.setattr(adapting, "profile_of", None)
    report = run(edge, [NEEDED, None, NEEDED + 1])[0].report
    assert (report.status, report.moves, report.replans) == (Status.OK, (), ())


def test_a_little_more_room_than_needed_is_not_enough_to_loosen(edge):
    """Otherwise it would have to be tightened again at the next breath."""
    barely = [NEEDED, at(4), *[NEEDED] * 22]
    report = run(edge, barely)[0].report
    assert report.replans[-1].after != "none"
    plenty = [NEEDED, at(4), *[int(NEEDED / (1 - MARGIN)) + 1] * 22]
    report = run(edge, plenty)[0].report
    assert report.replans == ()
    assert report.moves[-1].after == PLANNED.cuts[0]


def wobbling(num_steps: int) -> list[int]:
    """Leave a little more or less than a late cut needs, never the same twice."""
    return [at(4) + (step * 7 % 24) * 2 + 1 for step in range(num_steps)]


def test_a_look_at_one_budget_tells_of_others(edge, monkeypatch):
    """What is free is another number at every step, and a look plans for many cuts."""
    looks = []
    monkeypatch.setattr(
        adapting, "is_calm", lambda *args: looks.append(args[2]) or is_calm(*args)
    )
    budgets = [NEEDED, *wobbling(NUM_STEPS - 1)]
    report = run(edge, budgets)[0].report
    assert (report.status, len(report.moves)) == (Status.OK, 1)
    assert looks
    assert looks == sorted(set(looks))


def test_a_loss_that_cannot_be_described_is_profiled_once_a_round(edge, monkeypatch):
    """Its digest never comes again, so no profile is found by it."""
    calls = []
    monkeypatch.setattr(
        adapting, "profile_of", lambda *_, **__: calls.append(1) or PROFILE
    )
    assert run(edge, FALLS_AND_RISES)[0].report.moves
    assert calls == [1]


@dataclass(frozen=True)
class Noting(MemoryBudget):
    """No limit; it writes down what it was told."""

    told: list[int]

    def read(self, *, step: int, live_bytes: int) -> int | None:
        del step
        self.told.append(live_bytes)
        return None


@pytest.mark.parametrize("mode", CapMode)
def test_a_budget_is_told_what_is_in_use_whatever_the_cap_looks_at(mode):
    """Else free memory would leave out what this client's own tensors take."""
    told: list[int] = []
    adapter = Adapter(as_budget(Noting(told)), TASK, batch_size=BATCH_SIZE)
    conditions = Conditions(
        task=TASK, connect=lambda *_: None, cap_mode=mode, between_steps=adapter
    )
    plan = client_plan(0, Route.whole(), initial_state())
    batches = list(batches_for(2))
    train_locally(plan, initial_state(), batches, conditions)
    parameters = sum(unit.parameter_bytes for unit in PROFILE.units)
    assert told[0] >= parameters
    assert told[1] >= 3 * parameters  # With gradients and momentum.
