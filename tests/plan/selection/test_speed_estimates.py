"""Speeds learned from steps, worked out by hand, and what a plan makes of them."""

from dataclasses import replace
from math import inf, nan
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.plan.rounds import Routing, plan_round
from flwr_smartsplit.plan.selection.history import NO_HISTORY
from flwr_smartsplit.plan.selection.speed_estimates import Speeds, learned, with_speeds
from flwr_smartsplit.plan.timing import Work, step_seconds, work_of
from flwr_smartsplit.types import (
    DeviceProfile,
    DeviceTraits,
    EdgeProfile,
    Link,
    Route,
)
from tests.plan.fleets import seen
from tests.plan.profiles import chain_of

SILENT = DeviceProfile(client_key="a", budget_bytes=None, num_examples=8, batch_size=4)
EDGES = (EdgeProfile(name="edge"), EdgeProfile(name="other"))


def work(flops: float, num_bytes: float = 0) -> Work:
    """Ask a device for so much."""
    return Work(
        device_flops=flops,
        edge_flops=0,
        boundary_bytes=num_bytes,
        num_exchanges=1,
        state_bytes=0,
    )


def test_all_of_a_first_steps_time_may_have_been_work() -> None:
    """So its way to the edge may have taken none."""
    found = learned(None, work(80, 5), 4.0)
    assert found is not None
    assert (found.flops_per_second, found.bytes_per_second) == (20.0, None)


def test_two_routes_tell_work_and_way_apart() -> None:
    """80 FLOPs alone take 4 s, so 20 take 1 of 3 s; 10 bytes and back take 2."""
    found = learned(learned(None, work(80), 4.0), work(20, 10), 3.0)
    assert found is not None
    assert found.flops_per_second == pytest.approx(20.0)
    assert found.bytes_per_second == pytest.approx(10.0)


def test_the_shortest_step_of_each_route_counts() -> None:
    """A slow round says nothing that was not known; a fast one says more."""
    before = learned(None, work(80), 4.0)
    assert before is not None
    assert learned(before, work(80), 40.0) == before
    faster = learned(before, work(80), 2.0)
    assert faster is not None
    assert faster.flops_per_second == 40.0


@pytest.mark.parametrize("seconds", [None, 0.0, -1.0, 5e-324, inf, nan])
def test_a_time_that_means_nothing_teaches_nothing(seconds: float | None) -> None:
    """Nor does work that is not known, or that is none."""
    before = learned(None, work(80), 4.0)
    assert learned(before, work(80), seconds) is before
    assert learned(before, None, 1.0) is before
    assert learned(None, work(0, 5), 1.0) is None


def test_routes_that_are_alike_tell_nothing_apart() -> None:
    """Half of everything takes half of the time, whatever takes it."""
    found = learned(learned(None, work(80, 40), 4.0), work(40, 20), 2.0)
    assert found is not None
    assert (found.flops_per_second, found.bytes_per_second) == (20.0, None)


@pytest.mark.parametrize("asked", [[(80, 5)], [(80, 0), (20, 10), (40, 4)]])
def test_unsteady_steps_never_make_a_way_endlessly_fast(
    asked: list[tuple[float, float]],
) -> None:
    """One route leaves it open; several come close, however many rounds there are."""
    rng, speeds = Random(0), None
    for number in range(60):
        flops, size = asked[number % len(asked)]
        steady = flops / 20 + 2 * size / 10
        speeds = learned(speeds, work(flops, size), steady * rng.uniform(1.0, 1.3))
    assert speeds is not None
    assert len(speeds.steps) == len(asked)
    if len(asked) == 1:
        assert speeds.bytes_per_second is None
    else:
        assert speeds.flops_per_second == pytest.approx(20.0, rel=0.1)
        assert speeds.bytes_per_second == pytest.approx(10.0, rel=0.1)


@given(
    flops=st.floats(1e6, 1e12),
    rate=st.floats(1e3, 1e9),
    works=st.lists(
        st.tuples(st.floats(1e3, 1e12), st.floats(0, 1e8)), min_size=1, max_size=12
    ),
)
def test_whatever_was_seen_makes_numbers_that_mean_something(
    flops: float, rate: float, works: list[tuple[float, float]]
) -> None:
    """And what is told apart explains a device that has such speeds."""
    link = Link(up_bytes_per_second=rate, down_bytes_per_second=rate)
    speeds = None
    for each in works:
        asked = work(*each)
        seconds = step_seconds(
            asked, flops_per_second=flops, link=link, edge_flops_per_second=1.0
        )
        speeds = learned(speeds, asked, seconds)
    assert speeds is not None
    known = with_speeds(SILENT, speeds, EDGES).traits
    assert known.flops_per_second == speeds.flops_per_second
    if speeds.bytes_per_second is None:
        assert speeds.flops_per_second <= flops * (1 + 1e-6)


@given(
    st.lists(
        st.tuples(st.floats(1, 1e20), st.floats(0, 1e15), st.floats(1e-300, 1e300)),
        min_size=1,
        max_size=12,
    )
)
def test_a_client_that_lies_about_its_times_breaks_no_plan(
    told: list[tuple[float, float, float]],
) -> None:
    """Its traits are numbers that traits may have; so nobody else pays for it."""
    speeds = None
    for flops, size, seconds in told:
        speeds = learned(speeds, work(flops, size), seconds)
    with_speeds(SILENT, speeds, EDGES)


def test_what_a_device_says_stands() -> None:
    """Only what it does not say is filled in."""
    speeds = Speeds(steps=(), flops_per_second=20.0, bytes_per_second=10.0)
    link = Link(up_bytes_per_second=10.0, down_bytes_per_second=10.0)
    assert with_speeds(SILENT, None, EDGES) is SILENT
    found = with_speeds(SILENT, speeds, EDGES).traits
    assert found.flops_per_second == 20.0
    assert found.link is None
    assert found.edge_links == {"edge": link, "other": link}
    fast = replace(SILENT, traits=DeviceTraits(flops_per_second=5.0))
    assert with_speeds(fast, speeds, EDGES) is fast
    home = Link(up_bytes_per_second=1.0)
    linked = replace(SILENT, traits=DeviceTraits(link=home))
    assert with_speeds(linked, speeds, EDGES).traits.edge_links == {}


def test_a_slow_device_takes_another_route_once_it_was_seen() -> None:
    """Whole at first; then the cut with the least work; then the one that is best.

    Ten FLOPs a second and ten bytes a second: whole takes 9 s a step, the first cut
    0.3 s and 8 s on its way, the second 0.6 s and 0.8 s.
    """
    profile = chain_of([100, 200, 300])
    boundaries, flops = (40, 4, 0), (1, 1, 28)
    units = tuple(
        replace(unit, boundary_bytes=size, forward_flops=each)
        for unit, size, each in zip(profile.units, boundaries, flops, strict=True)
    )
    profile = replace(profile, units=units, batch_size=4)
    link = Link(up_bytes_per_second=10.0, down_bytes_per_second=10.0)
    history, routes = NO_HISTORY, []
    for number in range(1, 5):
        plan = plan_round(
            [SILENT],
            {4: profile},
            round_number=number,
            num_clients=1,
            routing=Routing(edges=EDGES[:1]),
            rng=Random(0),
            history=history,
        )
        route = plan.assignments[0].option.route
        routes.append(route)
        asked = work_of(profile, route)
        seconds = step_seconds(
            asked, flops_per_second=10.0, link=link, edge_flops_per_second=inf
        )
        history = history.after(
            [seen("a", round_number=number, step_seconds=seconds, work=asked)]
        )
    first, second = Route.split(1), Route.split(2)
    assert routes == [Route.whole(), first, second, second]
