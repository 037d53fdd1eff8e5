"""Speeds and links learned from steps, by hand, and what a plan makes of them."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, nan
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.plan.rounds import Routing, plan_round
from flwr_smartsplit.plan.selection import speed_estimates
from flwr_smartsplit.plan.selection.history import NO_HISTORY
from flwr_smartsplit.plan.selection.speed_estimates import (
    MOST_ROUTES,
    Steps,
    learned,
    with_speeds,
)
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


def found(steps: Steps, **told: Any) -> tuple[float | None, Link | None]:
    """Return what a plan takes for a device's speed, and for its link to an edge."""
    device = replace(SILENT, traits=DeviceTraits(**told))
    traits = with_speeds(device, steps, EDGES).traits
    return traits.flops_per_second, traits.link_to("edge")


def of(*rounds: tuple[Work, float], edge: str = "edge") -> Steps:
    """Learn from a step of each round."""
    steps: Steps = ()
    for asked, seconds in rounds:
        steps = learned(steps, asked, seconds, edge)
    return steps


def rate_of(link: Link | None) -> Any:
    """Return a learned rate: it is that of both directions, without a latency."""
    assert link is not None
    rate = link.up_bytes_per_second
    assert link == Link(up_bytes_per_second=rate, down_bytes_per_second=rate)
    return rate


# --- a device that says nothing -------------------------------------------------------


def test_all_of_a_first_steps_time_may_have_been_work() -> None:
    """So its way to the edge may have taken none."""
    assert found(of((work(80, 5), 4.0))) == (20.0, None)


def test_two_routes_tell_work_and_way_apart() -> None:
    """80 FLOPs alone take 4 s, so 20 take 1 of 3 s; 10 bytes and back take 2."""
    speed, link = found(of((work(80), 4.0), (work(20, 10), 3.0)))
    assert speed == pytest.approx(20.0)
    assert rate_of(link) == pytest.approx(10.0)


def test_the_shortest_step_of_each_route_counts() -> None:
    """A slow round says nothing that was not known; a fast one says more."""
    before = of((work(80), 4.0))
    assert learned(before, work(80), 40.0, "edge") == before
    assert found(learned(before, work(80), 2.0, "edge")) == (40.0, None)
    assert found(learned(before, work(80), 2.0, "other")) == (40.0, None)


@pytest.mark.parametrize("seconds", [None, 0.0, -1.0, 5e-324, inf, nan])
def test_a_time_that_means_nothing_teaches_nothing(seconds: float | None) -> None:
    """Nor does work that is not known, or that is none."""
    before = of((work(80), 4.0))
    assert learned(before, work(80), seconds) is before
    assert learned(before, None, 1.0) is before
    assert learned((), work(0), 1.0) == ()
    assert found(of((work(0, 5), 1.0))) == (None, None)


def test_routes_that_are_alike_tell_nothing_apart() -> None:
    """Half of everything takes half of the time, whatever takes it."""
    assert found(of((work(80, 40), 4.0), (work(40, 20), 2.0))) == (20.0, None)


@pytest.mark.parametrize("asked", [[(80, 5)], [(80, 0), (20, 10), (40, 4)]])
def test_unsteady_steps_never_make_a_way_endlessly_fast(
    asked: list[tuple[float, int]],
) -> None:
    """One route leaves it open; several come close, however many rounds there are."""
    rng, steps = Random(0), ()
    for number in range(60):
        flops, size = asked[number % len(asked)]
        steady = flops / 20 + 2 * size / 10
        steps = learned(steps, work(flops, size), steady * rng.uniform(1.0, 1.3))
    assert len(steps) == len(asked)
    speed, link = found(steps)
    if len(asked) == 1:
        assert link is None
    else:
        assert speed == pytest.approx(20.0, rel=0.1)
        assert rate_of(link) == pytest.approx(10.0, rel=0.1)


def test_the_last_routes_are_kept_at_every_edge() -> None:
    """A client that moves among many cuts is still known by few steps."""
    steps: Steps = ()
    for flops in range(1, 2 * MOST_ROUTES + 1):
        for edge in ("edge", "other"):
            steps = learned(steps, work(flops, 5), 1.0, edge)
    latest = range(MOST_ROUTES + 1, 2 * MOST_ROUTES + 1)
    assert [step.work.device_flops for step in steps[::2]] == [*latest]
    assert len(steps) == 2 * MOST_ROUTES


# --- a device that says something -----------------------------------------------------

UNEVEN = Link(up_bytes_per_second=4.0, down_bytes_per_second=8.0, latency_seconds=0.5)


def test_a_known_speed_leaves_its_link_to_be_learned() -> None:
    """80 FLOPs take 4 s of 6; the 10 bytes there and back take 2."""
    steps = of((work(80, 10), 6.0))
    speed, link = found(steps, flops_per_second=20.0)
    assert speed == 20.0
    assert rate_of(link) == 10.0
    speed, link = found(of((work(0, 10), 2.0)), flops_per_second=20.0)
    assert rate_of(link) == 10.0  # A cut behind units without FLOPs teaches, too.


def test_a_known_link_leaves_its_speed_to_be_learned() -> None:
    """8 bytes up take 2 s, 8 down 1, two latencies 1: of 8 s, 80 FLOPs take 4."""
    steps = of((work(80, 8), 8.0))
    assert found(steps, link=UNEVEN) == (20.0, UNEVEN)
    assert found(steps, edge_links={"edge": UNEVEN}) == (20.0, UNEVEN)
    # Of another edge's link, nothing is known of this one.
    assert found(steps, edge_links={"other": UNEVEN}) == (10.0, None)
    # A link without rates has a latency, and still a way that takes time.
    waits = Link(latency_seconds=0.5, most_bytes_per_round=99)
    assert found(of((work(80, 8), 5.0)), link=waits) == (20.0, waits)
    assert found(of((work(80), 5.0), (work(20, 10), 4.0)), link=waits)[0] == (
        pytest.approx(20.0)
    )


def test_what_edges_tell_of_links_between_them_is_taken_off() -> None:
    """80 FLOPs take 4 s, 10 bytes and back 2, those from edge to edge 10 more."""
    asked = replace(work(80, 10), hops=((20, 30),))
    steps = learned((), asked, 16.0, "edge", "other")
    between = Link(up_bytes_per_second=4.0, down_bytes_per_second=10.0)
    edges = [replace(EDGES[0], links={"other": replace(between, latency_seconds=1.0)})]
    fast = replace(SILENT, traits=DeviceTraits(flops_per_second=20.0))
    traits = with_speeds(fast, steps, [*edges, EDGES[1]]).traits
    assert rate_of(traits.link_to("edge")) == 10.0
    # Nobody tells of it: then all of it is the device's way, as the edge's work is.
    assert rate_of(with_speeds(fast, steps, EDGES).traits.link_to("edge")) == 20 / 12


def test_several_steps_are_met_with_the_least_relative_error() -> None:
    """20 bytes in 4 s, 20 in 1 of 2 s: per byte, (1/5 + 1/20) / (1/25 + 1/100) / 20."""
    steps = of((work(20, 10), 5.0), (work(20, 20), 2.0))
    took, way = (4 / 5, 1 / 2), (20 / 5, 40 / 2)
    per_byte = sum(t * w for t, w in zip(took, way, strict=True))
    per_byte /= sum(w * w for w in way)
    _, link = found(steps, flops_per_second=20.0)
    assert rate_of(link) == pytest.approx(1 / per_byte)


def test_a_step_that_was_faster_than_what_is_told_teaches_nothing() -> None:
    """A device that is faster than it says may have any link."""
    steps = of((work(80, 10), 3.0))
    assert found(steps, flops_per_second=20.0) == (20.0, None)
    assert found(of((work(80, 8), 3.0)), link=UNEVEN) == (None, UNEVEN)


def test_what_a_device_says_stands() -> None:
    """Only what it does not say is filled in."""
    steps = of((work(80), 4.0), (work(20, 10), 3.0))
    assert with_speeds(SILENT, (), EDGES) is SILENT
    traits = with_speeds(SILENT, steps, EDGES).traits
    assert traits.link is None
    assert traits.edge_links.keys() == {"edge", "other"}
    own = {"edge": UNEVEN}
    told = DeviceTraits(flops_per_second=5.0, edge_links=own)
    traits = with_speeds(replace(SILENT, traits=told), steps, EDGES).traits
    assert (traits.flops_per_second, traits.edge_links) == (5.0, own)
    all_told = replace(SILENT, traits=replace(told, link=UNEVEN))
    assert with_speeds(all_told, steps, EDGES) is all_told


EVEN = Link(up_bytes_per_second=50.0, down_bytes_per_second=50.0)
TOLD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "link": {"link": UNEVEN},
    "link of one edge": {"edge_links": {"edge": UNEVEN}},
    "links of all edges": {"edge_links": {"edge": UNEVEN, "other": EVEN}},
    "limit and latency": {"link": Link(latency_seconds=0.5, most_bytes_per_round=1)},
}


Asked = tuple[float, int, str | None]
WHOLE: Asked = (100.0, 0, None)


def check_what_is_found(
    asked: Sequence[Asked], *, speed: float, told: dict[str, Any]
) -> None:
    """Make steps by a true speed and true links; find what is not told of them."""
    declared = DeviceTraits(**told)
    steps: Steps = ()
    for flops, size, edge in asked:
        link = EVEN if edge is None else declared.link_to(edge) or EVEN
        if link.up_bytes_per_second == inf:
            link = replace(EVEN, latency_seconds=link.latency_seconds)
        seconds = step_seconds(
            work(flops, size),
            flops_per_second=speed,
            link=link,
            edge_flops_per_second=inf,
        )
        steps = learned(steps, work(flops, size), seconds, *filter(None, [edge]))
    traits = with_speeds(replace(SILENT, traits=declared), steps, EDGES).traits
    assert traits.flops_per_second == pytest.approx(speed)
    for edge in ("edge", "other"):
        wanted = declared.link_to(edge)
        if wanted is not None:
            assert traits.link_to(edge) == wanted
        elif any(each[2] == edge for each in asked):
            assert rate_of(traits.link_to(edge)) == pytest.approx(50.0)


@pytest.mark.parametrize("tells_speed", [False, True])
@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
@given(
    speed=st.floats(10, 1000),
    asked=st.lists(
        st.tuples(
            st.floats(10, 90), st.integers(10, 90), st.sampled_from(["edge", "other"])
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_steps_tell_all_that_their_device_does_not(
    speed: float,
    asked: list[Asked],
    told: dict[str, Any],
    *,
    tells_speed: bool,
) -> None:
    """Whatever it tells: its speed or not, no link, one for all edges, or some."""
    told = {**told, "flops_per_second": speed} if tells_speed else told
    check_what_is_found([WHOLE, *asked], speed=speed, told=told)


@pytest.mark.parametrize("told", [{"flops_per_second": 20.0}, TOLD["link"]])
def test_that_comparison_sees_a_fit_that_takes_nothing_off(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: all of a step's seconds count for what is not told."""
    asked: list[Asked] = [(20.0, 30, "edge"), (40.0, 20, "edge")]
    check_what_is_found(asked, speed=20.0, told=told)
    monkeypatch.setattr(speed_estimates, "step_seconds", lambda *_, **__: 0.0)
    with pytest.raises(AssertionError):
        check_what_is_found(asked, speed=20.0, told=told)


# --- clients that lie -----------------------------------------------------------------


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
    steps: Steps = ()
    for each in works:
        asked = work(*each)
        seconds = step_seconds(
            asked, flops_per_second=flops, link=link, edge_flops_per_second=1.0
        )
        steps = learned(steps, asked, seconds)
    speed, way = found(steps)
    assert speed is not None
    if way is None:
        assert speed <= flops * (1 + 1e-6)


@given(
    told=st.sampled_from([{}, {"flops_per_second": 1e9}, {"link": UNEVEN}]),
    made=st.lists(
        st.tuples(st.floats(0, 1e20), st.floats(0, 1e15), st.floats(1e-300, 1e300)),
        min_size=1,
        max_size=12,
    ),
)
def test_a_client_that_lies_about_its_times_breaks_no_plan(
    told: dict[str, Any], made: list[tuple[float, float, float]]
) -> None:
    """Its traits are numbers that traits may have; so nobody else pays for it."""
    found(of(*[(work(flops, size), seconds) for flops, size, seconds in made]), **told)


# --- what a plan makes of it ----------------------------------------------------------


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
