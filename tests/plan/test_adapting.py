"""Decisions about a budget that moved, on costs made by hand."""

from dataclasses import replace

import pytest

from flwr_smartsplit.errors import NoFeasiblePlan
from flwr_smartsplit.plan.adapting import (
    PATIENCE_STEPS,
    Standing,
    adapted,
    is_calm,
)
from flwr_smartsplit.types import KEEP_ALL, ChainProfile, RecomputePlan, Rerun, Route
from tests.plan.profiles import chain_of

PROFILE: ChainProfile = chain_of([100, 200, 300, 400, 500])
PLANNED = Route.split(4)
EARLIER = Route.split(2)


def standing(route: Route = PLANNED, **facts: object) -> Standing:
    """Stand on a route, with all the patience that is needed."""
    known: dict[str, object] = {"calm_steps": PATIENCE_STEPS, **facts}
    return Standing(planned=PLANNED, route=route, **known)  # type: ignore[arg-type]


def test_what_fits_stays() -> None:
    """Exactly enough is enough."""
    assert adapted(PROFILE, standing(), 400) is None
    assert adapted(PROFILE, standing(), None) is None


def test_the_nearest_earlier_cut_that_fits_is_taken() -> None:
    """Not the earliest; and the reason has both numbers."""
    change = adapted(PROFILE, standing(), 250)
    assert change is not None
    assert change.route == Route.split(2)
    assert change.reason == "the budget is 250 B, 400 B are needed"


def test_a_tighter_plan_comes_before_an_earlier_cut() -> None:
    """If some plan of this route fits."""
    step = PROFILE.units[0].step
    lean = replace(step, saved_bytes=200, kept_bytes=200, output_bytes=10)
    units = tuple(replace(u, step=lean, forward_flops=5) for u in PROFILE.units)
    change = adapted(replace(PROFILE, units=units), standing(), 399)
    assert change is not None
    assert change.route == PLANNED
    assert not change.recompute.is_empty


def test_nothing_that_fits_is_a_refusal_with_the_least() -> None:
    """Of all cuts."""
    with pytest.raises(NoFeasiblePlan) as error:
        adapted(PROFILE, standing(), 3)
    assert (error.value.budget_bytes, error.value.needed_bytes > 3) == (3, True)


def test_a_cut_that_is_fixed_is_not_moved() -> None:
    """Then this route is all there is."""
    with pytest.raises(NoFeasiblePlan):
        adapted(PROFILE, standing(is_fixed=True), 250 - 200)


def test_the_device_keeps_as_many_units_as_it_must() -> None:
    """Rather than leak more, the client sits the round out."""
    change = adapted(PROFILE, standing(min_device_units=2), 250)
    assert change is not None
    assert change.route == EARLIER
    with pytest.raises(NoFeasiblePlan):
        adapted(PROFILE, standing(min_device_units=3), 250)


def test_it_goes_back_only_after_a_while() -> None:
    """And at once up to the planned route if there is room for it."""
    early = standing(EARLIER, calm_steps=PATIENCE_STEPS - 1)
    assert is_calm(PROFILE, early, 1000)
    assert adapted(PROFILE, early, 1000) is None
    change = adapted(PROFILE, standing(EARLIER), 1000)
    assert change is not None
    assert (change.route, change.recompute) == (PLANNED, KEEP_ALL)
    unlimited = adapted(PROFILE, standing(EARLIER), None)
    assert unlimited is not None
    assert unlimited.route == PLANNED


def test_a_step_back_needs_a_little_more_than_is_needed() -> None:
    """300 are needed for one unit more; 305 are not 2 % above."""
    assert not is_calm(PROFILE, standing(EARLIER), 305)
    assert is_calm(PROFILE, standing(EARLIER), 307)


def test_only_less_work_or_a_later_cut_is_a_reason_to_change() -> None:
    """Another plan of the same work is none."""
    assert not is_calm(PROFILE, standing(EARLIER), 250)
    again = RecomputePlan((Rerun(0, 2),))
    change = adapted(PROFILE, standing(EARLIER, recompute=again), 250)
    assert change is not None
    assert (change.route, change.recompute) == (EARLIER, KEEP_ALL)
    assert not is_calm(PROFILE, standing(EARLIER, recompute=again), 201)
