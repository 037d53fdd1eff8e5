"""Candidates: what fits whom, and how long it takes, as the slow sums say."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.search_space import search_space
from flwr_smartsplit.plan.selection import candidates
from flwr_smartsplit.plan.selection.candidates import candidates_of
from flwr_smartsplit.plan.timing import over_limit, round_seconds
from flwr_smartsplit.types import (
    Constraints,
    DeviceProfile,
    DeviceTraits,
    EdgeProfile,
    Link,
    Route,
)
from tests.plan.profiles import chain_of, device

CHAIN = chain_of([10, 30, 20, 40])
EDGES = (EdgeProfile(name="x", flops_per_second=100.0), EdgeProfile(name="y"))
PLAIN = Constraints(recompute=False)
LINKS = st.builds(
    Link,
    up_bytes_per_second=st.floats(1, 1000),
    down_bytes_per_second=st.floats(1, 1000),
    latency_seconds=st.floats(0, 1),
)


def test_an_endless_time_does_not_open_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device that cannot be timed takes the first option that fits it."""
    space = search_space(CHAIN, PLAIN)
    endless = np.full((1, len(space.options)), np.inf)
    monkeypatch.setattr(candidates, "_seconds", lambda *_: endless)
    (found,), unfit = candidates_of([device("a", 10)], space, EDGES)
    assert unfit == {}
    assert space.options[found.best].route == Route.split(1)


def test_no_option_sends_more_than_a_link_may_carry() -> None:
    """Of all that fit in memory; where none is left, the least is named."""
    space = search_space(CHAIN, PLAIN)
    plain = device("a", None)
    sent = {
        over_limit(option.work, limited(plain, 0), EDGES): index
        for index, option in enumerate(space.options)
    }
    sizes = sorted(num_bytes for num_bytes, _ in filter(None, sent))
    assert len(sizes) > 1
    for most in (sizes[0] - 1, sizes[0], sizes[-1] - 1, sizes[-1]):
        found, unfit = candidates_of([limited(plain, most)], space, EDGES)
        expected = [
            index
            for index, option in enumerate(space.options)
            if over_limit(option.work, limited(plain, most), EDGES) is None
        ]
        if most < sizes[0]:
            assert f"no route sends so little: {sizes[0]} B" in unfit["a"]
        else:
            assert found[0].fits.tolist() == expected
            assert found[0].best in expected


def limited(device: DeviceProfile, most: int) -> DeviceProfile:
    """Give a device a link that may carry so many bytes."""
    link = Link(most_bytes_per_round=most)
    return replace(device, traits=replace(device.traits, link=link))


def test_the_space_has_the_deepest_first() -> None:
    """The whole model, then every cut."""
    space = search_space(CHAIN, PLAIN)
    assert [option.route for option in space.options] == [
        Route.whole(),
        Route.split(3),
        Route.split(2),
        Route.split(1),
    ]
    assert space.peaks.tolist() == [40, 20, 30, 10]
    assert space.whole_peak_bytes == 40
    assert space.cheapest is space.options[3]


def test_constraints_shrink_the_space() -> None:
    """No edges: no cuts. Units that must stay, or a least number: no cut before."""
    assert len(search_space(CHAIN, has_edges=False).options) == 1
    for constraints in (
        Constraints(kept_units=frozenset({1}), recompute=False),
        Constraints(min_device_units=2, recompute=False),
    ):
        routes = [option.route for option in search_space(CHAIN, constraints).options]
        assert routes == [Route.whole(), Route.split(3), Route.split(2)]


def test_what_recomputes_comes_after_what_does_not() -> None:
    """And every option's peak is that of its route and plan."""
    space = search_space(CHAIN)
    is_plain = [option.recompute.is_empty for option in space.options]
    assert is_plain == sorted(is_plain, reverse=True)
    for option in space.options:
        assert option.peak_bytes == predicted_peak_bytes(
            CHAIN, option.route, option.recompute
        )


@pytest.mark.parametrize(
    ("budget", "routes"),
    [
        (None, ["whole", "3", "2", "1"]),
        (10**30, ["whole", "3", "2", "1"]),
        (30, ["3", "2", "1"]),
        (25, ["3", "1"]),
        (10, ["1"]),
    ],
)
def test_options_within_the_budget_fit(budget: int | None, routes: list[str]) -> None:
    """Peaks do not fall with the cut."""
    space = search_space(CHAIN, PLAIN)
    (found,), unfit = candidates_of([device("a", budget)], space, EDGES)
    options = [space.options[index].route for index in found.fits]
    assert [str(r.cuts[0]) if r.cuts else "whole" for r in options] == routes
    assert found.best == found.fits[0]
    assert np.isnan(found.best_seconds)
    assert unfit == {}


def test_who_fits_nothing_is_told_the_least_that_would_do() -> None:
    """With the route, the batch size and the budget."""
    space = search_space(CHAIN, PLAIN)
    found, unfit = candidates_of([device("a", 9), device("b", 10)], space, EDGES)
    assert [each.device.client_key for each in found] == ["b"]
    assert "(device[:1] > edge[1:]) needs 10 B at batch size 4" in unfit["a"]
    assert "the budget is 9 B" in unfit["a"]
    _, unfit = candidates_of([device("a", 9)], search_space(CHAIN, has_edges=False), ())
    assert "give the strategy an edge" in unfit["a"]


@given(
    flops=st.lists(st.one_of(st.none(), st.floats(1, 1e6)), min_size=1, max_size=5),
    links=st.lists(st.one_of(st.none(), LINKS), min_size=5, max_size=5),
    near=st.one_of(st.none(), LINKS),
    num_edges=st.integers(0, 2),
)
def test_seconds_are_those_of_the_slow_sums(
    flops: list[float | None],
    links: list[Link | None],
    near: Link | None,
    num_edges: int,
) -> None:
    """For every device and option at once, over the fastest edge."""
    edges = EDGES[:num_edges]
    space = search_space(CHAIN, PLAIN, has_edges=bool(edges))
    devices = [
        DeviceProfile(
            client_key=str(index),
            budget_bytes=None,
            num_examples=10,
            batch_size=4,
            traits=DeviceTraits(
                flops_per_second=speed,
                link=links[index],
                edge_links={} if near is None else {"x": near},
            ),
        )
        for index, speed in enumerate(flops)
    ]
    found, _ = candidates_of(devices, space, edges)
    for each in found:
        for place, seconds in zip(each.fits, each.seconds, strict=True):
            option = space.options[place]
            places = edges if option.route.cuts else (None,)
            slow = [round_seconds(option.work, each.device, edge) for edge in places]
            if each.device.traits.flops_per_second is None:
                assert np.isnan(seconds)
                assert slow[0] is None
            else:
                assert seconds == pytest.approx(min(s for s in slow if s is not None))
    for each in found:
        if not np.isnan(each.best_seconds):
            assert each.seconds[list(each.fits).index(each.best)] == each.best_seconds
