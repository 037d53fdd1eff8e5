"""What a device changes when its budget moves or its edge advises it, by hand."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.errors import NoFeasiblePlan
from flwr_smartsplit.plan.adaptation import (
    PATIENCE_STEPS,
    Standing,
    adapted,
    followed,
    is_calm,
    scaled,
)
from flwr_smartsplit.types import (
    KEEP_ALL,
    Action,
    ChainProfile,
    Cohort,
    Constraints,
    RecomputePlan,
    Rerun,
    Route,
    RouteOption,
)
from tests.plan.profiles import chain_of

PROFILE: ChainProfile = chain_of([100, 200, 300, 400, 500])
PLANNED = Route.split(4)
EARLIER = Route.split(2)


def standing(
    route: Route = PLANNED, recompute: RecomputePlan = KEEP_ALL, **facts: Any
) -> Standing:
    """Stand on a route, with all the patience that is needed."""
    known: dict[str, Any] = {"calm_steps": PATIENCE_STEPS, **facts}
    option = RouteOption(route=route, recompute=recompute)
    return Standing(planned=PLANNED, option=option, **known)


def changed(
    standing: Standing, budget_bytes: int | None, profile: ChainProfile = PROFILE
) -> tuple[Route, RecomputePlan, str]:
    """Return what changes."""
    found = adapted(profile, standing, budget_bytes)
    assert found is not None
    return found[0].route, found[0].recompute, found[1]


def test_what_fits_stays() -> None:
    """Exactly enough is enough."""
    assert adapted(PROFILE, standing(), 400) is None
    assert adapted(PROFILE, standing(), None) is None


def test_the_nearest_earlier_cut_that_fits_is_taken() -> None:
    """Not the earliest; and the reason has both numbers."""
    route, _, reason = changed(standing(), 250)
    assert route == Route.split(2)
    assert reason == "the budget is 250 B, 400 B are needed"


def test_a_tighter_plan_comes_before_an_earlier_cut() -> None:
    """If some plan of this route fits."""
    step = PROFILE.units[0].step
    lean = replace(step, saved_bytes=200, kept_bytes=200, output_bytes=10)
    units = tuple(replace(u, step=lean, forward_flops=5) for u in PROFILE.units)
    profile = replace(PROFILE, units=units)
    route, recompute, _ = changed(standing(), 399, profile)
    assert route == PLANNED
    assert not recompute.is_empty
    plain = Constraints(recompute=False)
    assert changed(standing(constraints=plain), 399, profile)[:2] == (
        Route.split(3),
        KEEP_ALL,
    )
    with pytest.raises(NoFeasiblePlan) as error:
        adapted(profile, standing(constraints=plain), 99)
    assert error.value.needed_bytes == 100


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
    two, three = (Constraints(min_device_units=least) for least in (2, 3))
    assert changed(standing(constraints=two), 250)[0] == EARLIER
    with pytest.raises(NoFeasiblePlan):
        adapted(PROFILE, standing(constraints=three), 250)


def test_it_goes_back_only_after_a_while() -> None:
    """And at once up to the planned route if there is room for it."""
    early = standing(EARLIER, calm_steps=PATIENCE_STEPS - 1)
    assert is_calm(PROFILE, early, 1000)
    assert adapted(PROFILE, early, 1000) is None
    assert changed(standing(EARLIER), 1000)[:2] == (PLANNED, KEEP_ALL)
    assert changed(standing(EARLIER), None)[0] == PLANNED


def test_a_step_back_needs_a_little_more_than_is_needed() -> None:
    """300 are needed for one unit more; 305 are not 2 % above."""
    assert not is_calm(PROFILE, standing(EARLIER), 305)
    assert is_calm(PROFILE, standing(EARLIER), 307)


def test_only_less_work_or_a_later_cut_is_a_reason_to_change() -> None:
    """Another plan of the same work is none."""
    assert not is_calm(PROFILE, standing(EARLIER), 250)
    again = RecomputePlan((Rerun(0, 2),))
    assert changed(standing(EARLIER, again), 250)[:2] == (EARLIER, KEEP_ALL)
    assert not is_calm(PROFILE, standing(EARLIER, again), 201)


# --- an edge that advises -------------------------------------------------------------

CUT_PEAKS = [100, 200, 300, 400, 500, 600]
LONGER = chain_of(CUT_PEAKS)
COHORT = Cohort(median_step_seconds=3.0, median_importance=2.0, low_importance=1.0)
PLAIN = RouteOption(route=Route.split(3))


def with_flops(*flops: int) -> ChainProfile:
    """Make a chain whose units have so many FLOPs."""
    units = (
        replace(unit, forward_flops=each)
        for unit, each in zip(LONGER.units, flops, strict=True)
    )
    return replace(LONGER, units=tuple(units))


def by_cut(*seconds: float) -> object:
    """Say what a step takes at each cut, from 1 on."""
    return lambda route, recompute: seconds[route.cuts[0] - 1]


EVEN = by_cut(1.0, 2.0, 3.0, 4.0, 5.0)
LIGHT = by_cut(0.1, 0.2, 0.3, 0.4, 0.5)


def cut_of(
    action: Action,
    *,
    seconds_of: object,
    profile: ChainProfile = LONGER,
    budget_bytes: int | None = None,
    option: RouteOption = PLAIN,
    min_device_units: int = 1,
) -> int | None:
    """Return the cut that is found."""
    found = followed(
        profile,
        option,
        action,
        budget_bytes=budget_bytes,
        cohort=COHORT,
        seconds_of=seconds_of,  # type: ignore[arg-type]
        constraints=Constraints(min_device_units=min_device_units),
    )
    return None if found is None else found.route.cuts[0]


def test_earlier_is_the_nearest_earlier_cut() -> None:
    """If a step then takes less time."""
    assert cut_of(Action.EARLIER, seconds_of=EVEN) == 2


def test_an_earlier_cut_that_saves_nothing_is_passed_by() -> None:
    """A large boundary can cost more than the work that it spares."""
    assert cut_of(Action.EARLIER, seconds_of=by_cut(2.5, 3.5, 3.0)) == 1
    assert cut_of(Action.EARLIER, seconds_of=by_cut(3.0, 3.0, 3.0)) is None


def test_an_earlier_cut_leaves_the_device_what_it_must_keep() -> None:
    """However much time it would save."""
    assert cut_of(Action.EARLIER, seconds_of=EVEN, min_device_units=2) == 2
    assert cut_of(Action.EARLIER, seconds_of=EVEN, min_device_units=3) is None


def test_an_earlier_cut_has_to_fit() -> None:
    """Also where peaks do not grow with the cut."""
    high = chain_of([100, 900, 300, 400, 500, 600])
    tight: dict[str, Any] = {"seconds_of": EVEN, "budget_bytes": 350}
    assert cut_of(Action.EARLIER, **tight) == 2
    assert cut_of(Action.EARLIER, profile=high, **tight) == 1
    assert cut_of(Action.EARLIER, seconds_of=EVEN, budget_bytes=3) is None


def test_an_earlier_cut_may_need_a_plan() -> None:
    """It is found with the cut."""
    lean = replace(
        LONGER.units[0].step, saved_bytes=200, kept_bytes=200, output_bytes=10
    )
    units = tuple(replace(unit, step=lean) for unit in LONGER.units)
    found = followed(
        replace(LONGER, units=units),
        PLAIN,
        Action.EARLIER,
        budget_bytes=199,
        cohort=COHORT,
        seconds_of=lambda route, recompute: route.cuts[0] + len(recompute.reruns) / 9,
    )
    assert found is not None
    assert found.route == Route.split(2)
    assert not found.recompute.is_empty


def test_the_first_cut_has_none_before_it() -> None:
    """Nor has the last one behind it."""
    first, last = (RouteOption(route=Route.split(cut)) for cut in (1, 5))
    assert cut_of(Action.EARLIER, seconds_of=EVEN, option=first) is None
    assert cut_of(Action.LATER, seconds_of=LIGHT, option=last) is None


def test_later_is_the_nearest_later_cut_that_fits_with_a_margin() -> None:
    """400 bytes are needed, and 2 % more must be free; nothing runs twice for it."""
    assert cut_of(Action.LATER, seconds_of=LIGHT) == 4
    assert cut_of(Action.LATER, seconds_of=LIGHT, budget_bytes=409) == 4
    assert cut_of(Action.LATER, seconds_of=LIGHT, budget_bytes=408) is None


def test_a_later_cut_takes_work_from_the_edge() -> None:
    """A unit that computes nothing is not worth a move."""
    profile = with_flops(32, 32, 32, 0, 32, 32)
    assert cut_of(Action.LATER, seconds_of=LIGHT, profile=profile) == 5


def test_a_later_cut_must_not_be_slow() -> None:
    """A step may take as long as the median, and no longer."""
    assert cut_of(Action.LATER, seconds_of=by_cut(1, 1, 1, 3.0)) == 4
    assert cut_of(Action.LATER, seconds_of=by_cut(1, 1, 1, 3.1)) is None


def test_the_next_cut_of_a_route_stays_behind() -> None:
    """Hops keep all of their edges."""
    hops = RouteOption(route=Route.hops((3, 4), edges=("near", "far")))
    assert cut_of(Action.LATER, seconds_of=LIGHT, option=hops) is None
    assert cut_of(Action.EARLIER, seconds_of=EVEN, option=hops) == 2


def test_times_are_scaled_by_the_devices_work() -> None:
    """Three of six equal units took 6 s."""
    seconds_of = scaled(LONGER, PLAIN, 6.0)
    assert [seconds_of(Route.split(cut), KEEP_ALL) for cut in (1, 3, 5)] == [2, 6, 10]


@given(
    st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5),
    st.floats(0.01, 20.0),
    st.integers(1, 5),
)
def test_a_device_that_goes_one_way_is_not_sent_back(
    parts: list[float], slowness: float, cut: int
) -> None:
    """By the same times: what is fast never becomes slow, nor the other way round."""
    seconds = [slowness * sum(parts[: c + 1]) for c in range(5)]
    usual = COHORT.median_step_seconds
    directions = set()
    for _ in range(9):
        if seconds[cut - 1] > COHORT.slow_factor * usual:
            action = Action.EARLIER
        elif seconds[cut - 1] < COHORT.fast_factor * usual:
            action = Action.LATER
        else:
            break
        found = cut_of(
            action,
            seconds_of=by_cut(*seconds),
            option=RouteOption(route=Route.split(cut)),
        )
        if found is None:
            break
        directions.add(action)
        cut = found
    assert len(directions) <= 1


def test_a_device_that_is_sent_to_and_fro_would_be_seen() -> None:
    """Planted: the later cut may be as slow as it likes; 2 s become 9 s, and back."""
    slow = replace(COHORT, median_step_seconds=99.0)
    seconds_of = by_cut(1.0, 1.5, 2.0, 9.0, 9.0)
    found = followed(
        LONGER,
        PLAIN,
        Action.LATER,
        budget_bytes=None,
        cohort=slow,
        seconds_of=seconds_of,  # type: ignore[arg-type]
    )
    assert found is not None
    assert cut_of(Action.EARLIER, seconds_of=seconds_of, option=found) == 3


@pytest.mark.parametrize("action", [Action.EARLIER, Action.LATER])
def test_no_cut_that_is_found_needs_more_than_the_budget(action: Action) -> None:
    """At every budget; ignoring it is seen at once."""
    for budget_bytes in range(50, 700, 25):
        cut = cut_of(action, seconds_of=LIGHT, budget_bytes=budget_bytes)
        assert cut is None or CUT_PEAKS[cut - 1] <= budget_bytes
    ignored = cut_of(action, seconds_of=LIGHT, budget_bytes=None)
    assert ignored is not None
    assert CUT_PEAKS[ignored - 1] > 50
