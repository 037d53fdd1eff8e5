"""What rounds teach: cohorts by whole rounds, observations by what was said."""

from dataclasses import replace
from typing import Any

import pytest

from flwr_smartsplit.flower.rounds.exchange import Dispatch, Sent
from flwr_smartsplit.flower.rounds.observations import (
    cohort_in,
    measured_seconds,
    observed,
)
from flwr_smartsplit.plan.advisor import StragglerAdvisor
from flwr_smartsplit.plan.selection.history import NO_HISTORY
from flwr_smartsplit.plan.timing import work_of
from flwr_smartsplit.types import (
    Assignment,
    ClientPlan,
    ClientReply,
    Cohort,
    DeviceProfile,
    EdgeProfile,
    Move,
    RecomputePlan,
    Replan,
    Rerun,
    Route,
    RouteOption,
    StepReport,
    Work,
)
from tests.plan.fleets import seen
from tests.plan.profiles import chain_of


def assigned(key: str, seconds: float | None) -> Assignment:
    """Choose a client whose round should take so long."""
    return Assignment(
        client_key=key,
        option=RouteOption(route=Route.whole(), peak_bytes=1, seconds=seconds),
        budget_bytes=None,
    )


def test_a_cohort_is_of_rounds_and_each_client_is_told_it_for_its_steps() -> None:
    """Rounds of 6, 30 and 5 steps of 2 s; who has 5 steps has 6 / 5 s for each."""
    devices = {
        key: DeviceProfile(
            client_key=key, budget_bytes=None, num_examples=20, batch_size=4
        )
        for key in "abc"
    }
    history = NO_HISTORY.after(
        [seen("a", num_examples=10), seen("c", num_examples=30, step_seconds=2.0)]
    )
    chosen = [assigned("a", 6.0), assigned("b", 30.0), assigned("c", None)]
    found = cohort_in(StragglerAdvisor(), chosen, devices, history)
    assert found == Cohort(
        median_step_seconds=10.0,
        median_importance=20.0,
        low_importance=15.0,
        relieves_edge=False,
    )
    limited = (EdgeProfile(name="x"), EdgeProfile(name="y", memory_bytes=5))
    assert cohort_in(
        StragglerAdvisor(), chosen, devices, history, edges=limited
    ) == replace(found, relieves_edge=True)
    assert found is not None
    assert found.for_steps(5).median_step_seconds == 2.0
    assert found.for_steps(5).low_importance == 15.0


def test_a_loss_that_is_no_number_is_none_and_times_are_those_that_were_said() -> None:
    """Predicted ones, unless somebody says how long a part took."""
    plan = ClientPlan(
        client_key="a", round_number=2, route=Route.split(1), edge_addresses={}, seed=0
    )
    report = StepReport(num_examples=8, loss_rms=float("nan"), seconds=3.0, metrics={})
    reply = ClientReply(
        client_key="a", round_number=2, state={}, receipts=(), report=report
    )
    dispatch = Dispatch(2, is_train=True, started_seconds=0.0)
    dispatch.sent["a"] = Sent(plan, (), (), assigned("a", 7.0))
    (found,) = observed(dispatch, {"a": reply}, None)
    assert (found.loss_rms, found.seconds) == (0.0, 7.0)
    assert (found.edge, found.round_number, found.step_seconds) == ("edge", 2, None)
    (timed,) = observed(dispatch, {"a": reply}, measured_seconds)
    assert timed.seconds == 3.0


def test_without_any_speed_there_is_no_cohort() -> None:
    """So edges advise nobody."""
    assert cohort_in(StragglerAdvisor(), [assigned("a", None)], {}, NO_HISTORY) is None


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"loss_rms": -1.0}, (0.0, 3.0)),
        ({"loss_rms": float("inf")}, (0.0, 3.0)),
        ({"seconds": float("nan")}, (2.0, None)),
        ({"seconds": -3.0}, (2.0, None)),
        ({"seconds": float("inf")}, (2.0, None)),
    ],
)
def test_what_no_client_can_have_measured_is_not_remembered(
    facts: dict[str, float], expected: tuple[float, float | None]
) -> None:
    """One client's nonsense must not end the planning of all."""
    plan = ClientPlan(
        client_key="a", round_number=1, route=Route.whole(), edge_addresses={}, seed=0
    )
    usual: dict[str, Any] = {"loss_rms": 2.0, "seconds": 3.0, "num_examples": 8}
    report = StepReport(metrics={}, **(usual | facts))
    reply = ClientReply(
        client_key="a", round_number=1, state={}, receipts=(), report=report
    )
    dispatch = Dispatch(1, is_train=True, started_seconds=0.0)
    dispatch.sent["a"] = Sent(plan, (), (), assigned("a", 7.0))
    (found,) = observed(dispatch, {"a": reply}, measured_seconds)
    assert (found.loss_rms, found.seconds) == expected


def test_a_step_asked_for_what_its_last_route_asks() -> None:
    """A cut that moved, or a plan that changed, leaves the least that was asked."""
    profile = chain_of([100, 200, 300])
    plan = ClientPlan(
        client_key="a",
        round_number=1,
        route=Route.split(2),
        edge_addresses={},
        seed=0,
        recompute=RecomputePlan((Rerun(0, 2),)),
    )
    dispatch = Dispatch(1, is_train=True, started_seconds=0.0)
    dispatch.sent["a"] = Sent(plan, (), (), assigned("a", 7.0), profile)

    def found(**facts: Any) -> Work | None:
        report = StepReport(num_examples=8, metrics={}, **facts)
        reply = ClientReply(
            client_key="a", round_number=1, state={}, receipts=(), report=report
        )
        (one,) = observed(dispatch, {"a": reply}, measured_seconds)
        return one.work

    assert found() == work_of(profile, plan.route, plan.recompute)
    assert found() != work_of(profile, plan.route)
    replan = Replan(step=1, before="", after="")
    assert found(replans=(replan,)) == work_of(profile, plan.route)
    move = Move(step=1, before=2, after=1)
    assert found(moves=(move,)) == work_of(profile, Route.split(1))
