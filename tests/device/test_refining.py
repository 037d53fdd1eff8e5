"""An edge that advises its clients: cuts move and rounds end early, and no bit else."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flwr_smartsplit import MemoryBudget, Route, predicted_peak_bytes
from flwr_smartsplit.device import budget_adapter as adapting
from flwr_smartsplit.device.budget_adapter import Adapter, profile_of
from flwr_smartsplit.device.local_training import Conditions, Outcome, train_locally
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.device.step_timer import StepTimer
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.errors import EdgeUnreachable, RefusedMove
from flwr_smartsplit.memory.budget import as_budget
from flwr_smartsplit.memory.cap import CapMode
from flwr_smartsplit.types import (
    Action,
    Advice,
    ClientPlan,
    Cohort,
    RecomputePlan,
    Status,
)
from tests.device.test_budget_adapter import Listed
from tests.device.test_routes import FAR, NEAR, Pair
from tests.faults import Deliver
from tests.tasks import (
    BATCH_SIZE,
    TASK,
    client_plan,
    device_part,
    differences,
    examples,
    initial_state,
)

PROFILE = profile_of(TASK, batch_size=BATCH_SIZE)
NUM_STEPS = 12
NUM_EXAMPLES = NUM_STEPS * BATCH_SIZE
SPLIT = partial(Route.split, edge=NEAR)

IMPORTANT = Cohort(median_step_seconds=1.0, median_importance=0.0, low_importance=0.0)
"""Everybody is."""
UNIMPORTANT = replace(IMPORTANT, median_importance=1e9, low_importance=1e9)
Script = Callable[[int, int], float]
"""What a step takes, by the steps done and the cut."""


def always(seconds: float) -> Script:
    """Take so long whatever is done, or a little less with an earlier cut."""
    return lambda step, cut: seconds * (1 + cut / 100)


def slow_then_fast(step: int, cut: int) -> float:
    """Be slow for some steps, and fast later."""
    return (3.0 if step < 6 else 0.1) * (1 + cut / 100)


@dataclass
class Refined:
    """Client 0 and two edges, in a round of twelve steps."""

    pair: Pair
    script: Script = lambda step, cut: 1.0
    budget: MemoryBudget | int | None = None
    cohort: Cohort | None = IMPORTANT
    epochs: int = 1
    _walk: RouteRunner | None = None

    def run(self, route: Route, *, num_steps: int = NUM_STEPS) -> Outcome:
        """Train along a route."""
        state = initial_state()
        plan = replace(
            client_plan(0, route, state, addresses=self.pair.addresses),
            cohort=self.cohort,
            num_examples=NUM_EXAMPLES,
            predicted_peak_bytes=predicted_peak_bytes(PROFILE, route),
        )
        conditions = Conditions(
            task=self.pair.task,
            connect=lambda place, address: self.pair.edges[place].connect(address),
            cap_mode=CapMode.SAMPLED,
            local_epochs=self.epochs,
            between_steps=self._between(),
            step_seconds=self._seconds,
        )
        return train_locally(
            plan, device_part(state, route), batches(num_steps), conditions
        )

    def _between(self) -> Callable[[RouteRunner], None]:
        budget = as_budget(self.budget)
        adapter = Adapter(budget, self.pair.task, batch_size=BATCH_SIZE)

        def between(runner: RouteRunner) -> None:
            self._walk = runner
            adapter(runner)

        return between

    def _seconds(
        self, plan: ClientPlan, route: Route, recompute: RecomputePlan
    ) -> float:
        del plan, recompute
        step = 0 if self._walk is None else self._walk.num_steps
        return self.script(step, route.cuts[0] if route.cuts else 0)


def batches(num_steps: int) -> list[tuple[Tensor, Tensor]]:
    """Draw batches; the first of more batches are those of fewer."""
    inputs, targets = examples(3).tensors
    picks = [torch.arange(n, n + BATCH_SIZE) % len(inputs) for n in range(num_steps)]
    return [(inputs[pick], targets[pick]) for pick in picks]


@pytest.fixture
def refined(tmp_path: Path) -> Iterator[Refined]:
    """Start two edges."""
    yield Refined(Pair(tmp_path))


def moves_of(outcome: Outcome) -> list[tuple[int, int, int]]:
    """List when a cut moved, and how."""
    return [(move.step, move.before, move.after) for move in outcome.report.moves]


def plain(refined: Refined, route: Route, **changes: Any) -> Outcome:
    """Train without a cohort, so that nothing is advised."""
    return replace(refined, cohort=None, budget=None, **changes).run(route)


def assert_same_bits(refined: Refined, outcome: Outcome, cut: int) -> None:
    """Compare with a run that had the last cut from the beginning."""
    expected = plain(refined, SPLIT(cut))
    assert outcome.report.status is Status.OK, outcome.report.message
    assert expected.report.moves == ()
    assert outcome.report.loss == expected.report.loss
    assert outcome.receipts == expected.receipts
    assert differences(outcome.state, expected.state) == []


# --- cuts -----------------------------------------------------------------------------


def test_cuts_move_earlier_and_later_and_change_no_bit(refined: Refined) -> None:
    """Two steps to be sure, four between two moves; the reasons are told."""
    refined.script = slow_then_fast
    outcome = refined.run(SPLIT(4))
    assert moves_of(outcome) == [(2, 4, 3), (6, 3, 2), (10, 2, 5)]
    assert_same_bits(refined, outcome, 5)
    reasons = [move.reason for move in outcome.report.moves]
    assert [reason.split(":")[0] for reason in reasons] == [
        *["the edge finds it slow"] * 2,
        "the edge finds it fast",
    ]


def test_the_same_times_give_the_same_moves(refined: Refined) -> None:
    """No clock has a say."""
    refined.script = slow_then_fast
    first, second = refined.run(SPLIT(4)), refined.run(SPLIT(4))
    assert first.report.moves == second.report.moves
    assert first.receipts == second.receipts
    assert differences(first.state, second.state) == []


def test_over_several_edges_the_first_one_advises(refined: Refined) -> None:
    """It is told the loss; the edges behind it keep what they have."""
    refined.script = slow_then_fast
    outcome = refined.run(Route.hops((4, 6), edges=(NEAR, FAR)))
    assert moves_of(outcome) == [(2, 4, 3), (6, 3, 2), (10, 2, 5)]
    expected = plain(refined, Route.hops((5, 6), edges=(NEAR, FAR)))
    assert outcome.receipts == expected.receipts
    assert differences(outcome.state, expected.state) == []


@pytest.mark.parametrize(
    "route", [Route.whole(), Route.u_shape(4, 7, edge=NEAR)], ids=["whole", "u-shape"]
)
def test_where_no_edge_knows_the_loss_there_is_no_advice(
    refined: Refined, route: Route
) -> None:
    """Not even to end."""
    for cohort in (IMPORTANT, UNIMPORTANT):
        report = replace(refined, script=always(9.0), cohort=cohort).run(route).report
        assert (report.status, report.moves) == (Status.OK, ())
        assert (report.released, report.num_steps) == ("", NUM_STEPS)


def test_costs_are_found_only_when_there_is_advice_to_move(
    refined: Refined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take seconds for large models."""
    monkeypatch.setattr(adapting, "profile_of", None)
    assert refined.run(SPLIT(4)).report.status is Status.OK
    refined.cohort = UNIMPORTANT
    refined.script = always(9.0)
    assert refined.run(SPLIT(4)).report.released
    refined.cohort = IMPORTANT
    with pytest.raises(TypeError):
        refined.run(SPLIT(4))


def test_a_device_that_measures_is_advised_too(refined: Refined) -> None:
    """After its warm-up, by a clock that makes each step take five seconds."""
    now = iter(range(0, 10**6, 5))
    plan = replace(
        client_plan(0, SPLIT(6), initial_state(), addresses=refined.pair.addresses),
        cohort=IMPORTANT,
        num_examples=NUM_EXAMPLES,
    )
    conditions = Conditions(
        task=TASK,
        connect=lambda place, address: refined.pair.edges[place].connect(address),
        between_steps=Adapter(as_budget(None), TASK, batch_size=BATCH_SIZE),
        clock=lambda: float(next(now)),
    )
    state = device_part(initial_state(), SPLIT(6))
    outcome = train_locally(plan, state, batches(NUM_STEPS), conditions)
    assert moves_of(outcome)[0] == (5, 6, 4)
    assert outcome.report.step_seconds == 5.0


def test_nobody_is_sent_later_whose_pace_is_not_known(
    refined: Refined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of plan, when what was measured no longer counts."""
    monkeypatch.setattr(StepTimer, "latest", lambda *_: None)
    advice = Advice(Action.LATER, "the edge finds it fast")
    monkeypatch.setattr(
        "flwr_smartsplit.edge.session.judged",
        lambda progress, *_, **__: (progress, advice),
    )
    refined.script = always(0.1)
    outcome = refined.run(SPLIT(4))
    assert outcome.report.status is Status.OK
    assert moves_of(outcome) == []


# --- budgets --------------------------------------------------------------------------


def at(cut: int) -> int:
    """Say what a cut needs if nothing runs twice."""
    return predicted_peak_bytes(PROFILE, SPLIT(cut))


def test_no_advice_goes_over_the_devices_budget(refined: Refined) -> None:
    """A later cut needs some more; without it, the cut stays."""
    refined.script = always(0.1)
    assert at(5) > at(4)
    refined.budget = at(4)
    assert moves_of(refined.run(SPLIT(4))) == []
    refined.budget = None
    assert moves_of(refined.run(SPLIT(4)))[0] == (2, 4, 5)


def test_what_the_edge_wants_is_what_the_device_goes_back_to(refined: Refined) -> None:
    """A budget that falls and rises again ends at the advised cut, not the planned."""
    refined.script = lambda step, cut: (3.0 if step < 3 else 1.0) * (1 + cut / 100)
    tight, ample = predicted_peak_bytes(PROFILE, SPLIT(1)), 10 * at(8)
    refined.budget = Listed((*[ample] * 4, *[tight] * 2, ample))
    outcome = refined.run(SPLIT(4))
    assert moves_of(outcome) == [(2, 4, 3), (4, 3, 1), (11, 1, 3)]
    assert_same_bits(refined, outcome, 3)


def test_a_later_cut_on_the_way_back_does_not_change_what_is_planned(
    refined: Refined,
) -> None:
    """A device that its budget sent to the front still goes back all the way."""
    refined.script = lambda step, cut: 0.1 if step < 4 else 1.0
    tight, ample = predicted_peak_bytes(PROFILE, SPLIT(1)), 10 * at(8)
    refined.budget = Listed((tight, tight, ample))
    outcome = refined.run(SPLIT(6))
    moves = moves_of(outcome)
    assert moves[0] == (0, 6, 1)
    assert 1 < moves[1][2] < 6
    assert moves[-1][2] == 6
    assert_same_bits(refined, outcome, 6)


def test_an_edge_that_has_no_room_refuses_and_all_goes_on(refined: Refined) -> None:
    """The device keeps its cut; the advice comes again, four steps later."""
    asked = []

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, MoveCut):
            asked.append(request.step)
            raise RefusedMove("no room.")
        return deliver(request)

    refined.pair.edges[NEAR].hook = hook
    refined.script = always(3.0)
    outcome = refined.run(SPLIT(4))
    assert asked == [2, 6, 10]
    assert moves_of(outcome) == []
    assert_same_bits(refined, outcome, 4)


def test_units_that_stay_on_their_device_stay(tmp_path: Path) -> None:
    """A cut behind them cannot move before them."""
    local = replace(TASK, is_local=lambda name: name.startswith("1."))
    refined = Refined(Pair(tmp_path, local), script=always(3.0))
    assert moves_of(refined.run(SPLIT(3))) == [(2, 3, 2)]


# --- release --------------------------------------------------------------------------


def test_who_is_released_has_trained_on_the_first_batches(refined: Refined) -> None:
    """Bit for bit, at both places, and it weighs what it has trained on."""
    refined.script = lambda step, cut: 1.0 if step < 5 else 9.0
    refined.cohort = UNIMPORTANT
    outcome = refined.run(SPLIT(4))
    report = outcome.report
    assert (report.num_steps, report.num_examples, report.num_epochs) == (7, 28, 1)
    assert report.released.startswith("the edge finds it slow")
    expected = replace(refined, cohort=None).run(SPLIT(4), num_steps=7)
    assert outcome.receipts == expected.receipts
    assert differences(outcome.state, expected.state) == []
    assert report.loss == expected.report.loss
    assert expected.report.released == ""
    more = replace(refined, cohort=None).run(SPLIT(4), num_steps=8)
    assert differences(outcome.state, more.state)


def test_in_a_later_pass_every_example_counts_once(refined: Refined) -> None:
    """Three passes of four steps, released in the second."""
    refined.script = lambda step, cut: 1.0 if step < 4 else 9.0
    refined.cohort = UNIMPORTANT
    refined.epochs = 3
    report = refined.run(SPLIT(4), num_steps=4).report
    assert (report.num_steps, report.num_examples, report.num_epochs) == (6, 16, 2)


def test_advice_after_the_last_step_releases_nobody(refined: Refined) -> None:
    """All was done."""
    refined.script = always(9.0)
    refined.cohort = UNIMPORTANT
    report = refined.run(SPLIT(4), num_steps=2).report
    assert (report.released, report.num_steps) == ("", 2)
    assert refined.run(SPLIT(4), num_steps=3).report.released


# --- faults ---------------------------------------------------------------------------


def test_a_step_that_comes_twice_is_judged_once(refined: Refined) -> None:
    """Its reply, advice and all, is repeated."""
    refined.script = always(9.0)
    refined.cohort = UNIMPORTANT
    once = refined.run(SPLIT(1))

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.Forward):
            deliver(request)
        return deliver(request)

    refined.pair.edges[NEAR].hook = hook
    twice = refined.run(SPLIT(1))
    assert twice.report.num_steps == once.report.num_steps == 2
    assert twice.receipts == once.receipts


def test_a_step_that_comes_again_with_another_time_voids_the_session(
    refined: Refined,
) -> None:
    """It was changed on the way."""

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.Forward) and request.step == 1:
            deliver(request)
            return deliver(replace(request, step_seconds=99.0))
        return deliver(request)

    refined.pair.edges[NEAR].hook = hook
    report = refined.run(SPLIT(4)).report
    assert report.status is Status.EDGE_FAILED
    assert "was changed" in report.message


def test_an_edge_that_dies_in_an_advised_move_ends_the_round(refined: Refined) -> None:
    """As in any move."""

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, MoveCut):
            raise EdgeUnreachable("the line is dead.")
        return deliver(request)

    refined.pair.edges[NEAR].hook = hook
    refined.script = always(3.0)
    assert refined.run(SPLIT(4)).report.status is Status.EDGE_FAILED
