"""Where a cut goes by its edge's wish, on costs made by hand."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.plan.following import followed, scaled
from flwr_smartsplit.plan.refine import RULES
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    Cohort,
    RecomputePlan,
    Route,
    Wish,
)
from tests.plan.profiles import chain_of

PEAKS = [100, 200, 300, 400, 500, 600]
PROFILE = chain_of(PEAKS)
COHORT = Cohort(median_step_seconds=3.0, median_importance=2.0, low_importance=1.0)
PLAIN = (Route.split(3), KEEP_ALL)


def with_flops(*flops: int) -> ChainProfile:
    """Make a chain whose units have so many FLOPs."""
    units = (
        replace(unit, forward_flops=each)
        for unit, each in zip(PROFILE.units, flops, strict=True)
    )
    return replace(PROFILE, units=tuple(units))


def by_cut(*seconds: float) -> object:
    """Say what a step takes at each cut, from 1 on."""
    return lambda route, recompute: seconds[route.cuts[0] - 1]


EVEN = by_cut(1.0, 2.0, 3.0, 4.0, 5.0)
LIGHT = by_cut(0.1, 0.2, 0.3, 0.4, 0.5)


def cut_of(
    wish: Wish,
    *,
    seconds_of: object,
    profile: ChainProfile = PROFILE,
    budget_bytes: int | None = None,
    way: tuple[Route, RecomputePlan] = PLAIN,
    min_device_units: int = 1,
) -> int | None:
    """Return the cut that is found."""
    found = followed(
        profile,
        way,
        wish,
        budget_bytes=budget_bytes,
        cohort=COHORT,
        seconds_of=seconds_of,  # type: ignore[arg-type]
        min_device_units=min_device_units,
    )
    return None if found is None else found[0].cuts[0]


def test_earlier_is_the_nearest_earlier_cut() -> None:
    """If a step then takes less time."""
    assert cut_of(Wish.EARLIER, seconds_of=EVEN) == 2


def test_an_earlier_cut_that_saves_nothing_is_passed_by() -> None:
    """A large boundary can cost more than the work that it spares."""
    assert cut_of(Wish.EARLIER, seconds_of=by_cut(2.5, 3.5, 3.0)) == 1
    assert cut_of(Wish.EARLIER, seconds_of=by_cut(3.0, 3.0, 3.0)) is None


def test_an_earlier_cut_leaves_the_device_what_it_must_keep() -> None:
    """However much time it would save."""
    assert cut_of(Wish.EARLIER, seconds_of=EVEN, min_device_units=2) == 2
    assert cut_of(Wish.EARLIER, seconds_of=EVEN, min_device_units=3) is None


def test_an_earlier_cut_has_to_fit() -> None:
    """Also where peaks do not grow with the cut."""
    high = chain_of([100, 900, 300, 400, 500, 600])
    tight: dict[str, Any] = {"seconds_of": EVEN, "budget_bytes": 350}
    assert cut_of(Wish.EARLIER, **tight) == 2
    assert cut_of(Wish.EARLIER, profile=high, **tight) == 1
    assert cut_of(Wish.EARLIER, seconds_of=EVEN, budget_bytes=3) is None


def test_an_earlier_cut_may_need_a_plan() -> None:
    """It is found with the cut."""
    lean = replace(
        PROFILE.units[0].step, saved_bytes=200, kept_bytes=200, output_bytes=10
    )
    units = tuple(replace(unit, step=lean) for unit in PROFILE.units)
    found = followed(
        replace(PROFILE, units=units),
        PLAIN,
        Wish.EARLIER,
        budget_bytes=199,
        cohort=COHORT,
        seconds_of=lambda route, recompute: route.cuts[0] + len(recompute.reruns) / 9,
    )
    assert found is not None
    assert found[0] == Route.split(2)
    assert not found[1].is_empty


def test_the_first_cut_has_none_before_it() -> None:
    """Nor has the last one behind it."""
    first, last = (Route.split(1), KEEP_ALL), (Route.split(5), KEEP_ALL)
    assert cut_of(Wish.EARLIER, seconds_of=EVEN, way=first) is None
    assert cut_of(Wish.LATER, seconds_of=LIGHT, way=last) is None


def test_later_is_the_nearest_later_cut_that_fits_with_a_margin() -> None:
    """400 bytes are needed, and 2 % more must be free; nothing runs twice for it."""
    assert cut_of(Wish.LATER, seconds_of=LIGHT) == 4
    assert cut_of(Wish.LATER, seconds_of=LIGHT, budget_bytes=409) == 4
    assert cut_of(Wish.LATER, seconds_of=LIGHT, budget_bytes=408) is None


def test_a_later_cut_takes_work_from_the_edge() -> None:
    """A unit that computes nothing is not worth a move."""
    profile = with_flops(32, 32, 32, 0, 32, 32)
    assert cut_of(Wish.LATER, seconds_of=LIGHT, profile=profile) == 5


def test_a_later_cut_must_not_be_slow() -> None:
    """A step may take as long as the median, and no longer."""
    assert cut_of(Wish.LATER, seconds_of=by_cut(1, 1, 1, 3.0)) == 4
    assert cut_of(Wish.LATER, seconds_of=by_cut(1, 1, 1, 3.1)) is None


def test_the_next_cut_of_a_route_stays_behind() -> None:
    """Hops keep all of their edges."""
    hops = (Route.hops((3, 4), edges=("near", "far")), KEEP_ALL)
    assert cut_of(Wish.LATER, seconds_of=LIGHT, way=hops) is None
    assert cut_of(Wish.EARLIER, seconds_of=EVEN, way=hops) == 2


def test_times_are_scaled_by_the_devices_work() -> None:
    """Three of six equal units took 6 s."""
    seconds_of = scaled(PROFILE, PLAIN, 6.0)
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
        if seconds[cut - 1] > RULES.slow_factor * usual:
            wish = Wish.EARLIER
        elif seconds[cut - 1] < RULES.fast_factor * usual:
            wish = Wish.LATER
        else:
            break
        found = cut_of(
            wish, seconds_of=by_cut(*seconds), way=(Route.split(cut), KEEP_ALL)
        )
        if found is None:
            break
        directions.add(wish)
        cut = found
    assert len(directions) <= 1


def test_a_device_that_is_sent_to_and_fro_would_be_seen() -> None:
    """Planted: the later cut may be as slow as it likes; 2 s become 9 s, and back."""
    slow = replace(COHORT, median_step_seconds=99.0)
    seconds_of = by_cut(1.0, 1.5, 2.0, 9.0, 9.0)
    found = followed(
        PROFILE,
        PLAIN,
        Wish.LATER,
        budget_bytes=None,
        cohort=slow,
        seconds_of=seconds_of,  # type: ignore[arg-type]
    )
    assert found is not None
    assert cut_of(Wish.EARLIER, seconds_of=seconds_of, way=found) == 3


@pytest.mark.parametrize("wish", [Wish.EARLIER, Wish.LATER])
def test_no_cut_that_is_found_needs_more_than_the_budget(wish: Wish) -> None:
    """At every budget; ignoring it is seen at once."""
    for budget_bytes in range(50, 700, 25):
        cut = cut_of(wish, seconds_of=LIGHT, budget_bytes=budget_bytes)
        assert cut is None or PEAKS[cut - 1] <= budget_bytes
    ignored = cut_of(wish, seconds_of=LIGHT, budget_bytes=None)
    assert ignored is not None
    assert PEAKS[ignored - 1] > 50
