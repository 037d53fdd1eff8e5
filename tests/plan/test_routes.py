"""Cuts: the deepest route that fits a budget, or the least that would do."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.errors import NoFeasibleRoute
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.routes import (
    RouteRequest,
    chosen_option,
    deepest_route,
    deepest_split,
)
from flwr_smartsplit.types import Constraints, Route
from tests.plan.profiles import chain_of, device

PEAKS = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


def depth(route: Route, num_units: int) -> int:
    """Count the units that stay on the device."""
    return route.legs(num_units)[0].stop


@pytest.mark.parametrize(
    ("budget", "route"),
    [
        (10, Route.split(1)),
        (19, Route.split(1)),
        (20, Route.split(2)),
        (30, Route.split(3)),
        (39, Route.split(3)),
        (40, Route.whole()),
        (10**9, Route.whole()),
        (None, Route.whole()),
    ],
)
def test_the_deepest_route_that_fits_is_taken(budget: int | None, route: Route) -> None:
    """A budget is enough if the peak equals it."""
    profile = chain_of([10, 20, 30, 40])
    assert deepest_route(profile, budget_bytes=budget, edge="edge") == route


def test_peaks_need_not_grow_with_depth() -> None:
    """A deep route that fits is taken though a shallower one does not."""
    profile = chain_of([10, 90, 90, 30, 80])
    assert deepest_route(profile, budget_bytes=30, edge="e") == Route.split(4, edge="e")
    assert deepest_route(profile, budget_bytes=29, edge="e") == Route.split(1, edge="e")
    falling = chain_of([90, 80, 70])
    assert deepest_route(falling, budget_bytes=70, edge="e") == Route.whole()


def test_no_chosen_cut_leaves_the_device_less_than_it_keeps() -> None:
    """If that fits nobody, the client sits out."""
    profile = chain_of([10, 20, 30, 40, 50])
    request = RouteRequest(
        device=device("a", 49),
        profile=profile,
        edges=("edge",),
        constraints=Constraints(recompute=False),
    )
    (deepest,) = deepest_split(request).cuts

    def keeping(units: int) -> RouteRequest:
        kept = Constraints(recompute=False, min_device_units=units)
        return replace(request, constraints=kept)

    assert deepest_split(keeping(deepest)).cuts == (deepest,)
    with pytest.raises(NoFeasibleRoute, match="no route fits"):
        deepest_split(keeping(deepest + 1))


def test_a_route_of_ones_own_keeps_as_many_units_at_the_device() -> None:
    """Shallow boundaries leak, whoever chooses them."""
    profile = chain_of([10, 20, 30, 40, 50])
    request = RouteRequest(
        device=device("a"),
        profile=profile,
        edges=("edge",),
        constraints=Constraints(min_device_units=2),
    )
    for route in (Route.split(2), Route.whole()):
        assert chosen_option(request, lambda _, route=route: route).route == route
    with pytest.raises(NoFeasibleRoute, match="first 2 units on the device"):
        chosen_option(request, lambda _: Route.split(1))


def test_without_an_edge_only_the_whole_model_will_do() -> None:
    """A split needs somewhere to go."""
    profile = chain_of([10, 20])
    assert deepest_route(profile, budget_bytes=20, edge=None) == Route.whole()
    with pytest.raises(NoFeasibleRoute) as raised:
        deepest_route(profile, budget_bytes=19, edge=None)
    assert raised.value.needed_bytes == 20


def test_no_route_names_the_least_that_would_do() -> None:
    """The error carries both numbers, and the route they belong to."""
    mebibyte = 2**20
    profile = chain_of([5 * mebibyte, 3 * mebibyte, 9 * mebibyte], batch_size=32)
    with pytest.raises(NoFeasibleRoute) as raised:
        deepest_route(profile, budget_bytes=2 * mebibyte, edge="edge")
    assert raised.value.needed_bytes == 3 * mebibyte
    assert raised.value.budget_bytes == 2 * mebibyte
    message = str(raised.value)
    assert "device[:2] > edge[2:]" in message
    assert "needs 3 MiB at batch size 32, the budget is 2 MiB" in message


def test_a_chain_of_one_unit_cannot_be_split() -> None:
    """It is whole or nothing."""
    assert deepest_route(chain_of([7]), budget_bytes=7, edge="e") == Route.whole()
    with pytest.raises(NoFeasibleRoute):
        deepest_route(chain_of([7]), budget_bytes=6, edge="e")


@given(peaks=PEAKS, budget=st.integers(0, 1100))
def test_a_route_fits_and_no_deeper_one_does(peaks: list[int], budget: int) -> None:
    """Checked against trying everything."""
    profile = chain_of(peaks)
    fitting = [n for n, peak in enumerate(peaks, start=1) if peak <= budget]
    if not fitting:
        with pytest.raises(NoFeasibleRoute) as raised:
            deepest_route(profile, budget_bytes=budget, edge="e")
        assert raised.value.needed_bytes == min(peaks)
        return
    route = deepest_route(profile, budget_bytes=budget, edge="e")
    assert depth(route, len(peaks)) == max(fitting)
    assert predicted_peak_bytes(profile, route) <= budget


@given(peaks=PEAKS, budget=st.integers(1, 1000), more=st.integers(0, 1000))
def test_more_memory_never_gives_a_shallower_route(
    peaks: list[int], budget: int, more: int
) -> None:
    """A larger budget keeps at least as many units on the device."""
    profile = chain_of(peaks)
    try:
        small = deepest_route(profile, budget_bytes=budget, edge="e")
    except NoFeasibleRoute as error:
        small_depth = 0
        assert error.needed_bytes > budget
    else:
        small_depth = depth(small, len(peaks))
    try:
        large = deepest_route(profile, budget_bytes=budget + more, edge="e")
    except NoFeasibleRoute:
        assert small_depth == 0
    else:
        assert depth(large, len(peaks)) >= small_depth


@given(peaks=PEAKS)
def test_what_an_error_asks_for_is_enough(peaks: list[int]) -> None:
    """Raising the budget to ``needed_bytes`` gives a route."""
    profile = chain_of(peaks)
    with pytest.raises(NoFeasibleRoute) as raised:
        deepest_route(profile, budget_bytes=0, edge="e")
    needed = raised.value.needed_bytes
    route = deepest_route(profile, budget_bytes=needed, edge="e")
    assert predicted_peak_bytes(profile, route) == needed
