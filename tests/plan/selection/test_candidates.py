"""Candidates: what fits whom, and how long it takes, as the slow sums say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.menu import Terms, menu_of
from flwr_smartsplit.plan.selection import candidates
from flwr_smartsplit.plan.selection.candidates import candidates_of
from flwr_smartsplit.plan.timing import round_seconds
from flwr_smartsplit.types import (
    DeviceProfile,
    DeviceTraits,
    EdgeProfile,
    Link,
    Route,
)
from tests.plan.profiles import chain_of, device

CHAIN = chain_of([10, 30, 20, 40])
EDGES = (EdgeProfile(name="x", flops_per_second=100.0), EdgeProfile(name="y"))
PLAIN = Terms(has_edges=True, recompute=False)
LINKS = st.builds(
    Link,
    up_bytes_per_second=st.floats(1, 1000),
    down_bytes_per_second=st.floats(1, 1000),
    latency_seconds=st.floats(0, 1),
)


def test_an_endless_time_does_not_open_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device that cannot be timed takes the first offer that fits it."""
    menu = menu_of(CHAIN, PLAIN)
    endless = np.full((1, len(menu.offers)), np.inf)
    monkeypatch.setattr(candidates, "_seconds", lambda *_: endless)
    (found,), unfit = candidates_of([device("a", 10)], menu, EDGES)
    assert unfit == {}
    assert menu.offers[found.best].route == Route.split(1)


def test_the_menu_has_the_deepest_first() -> None:
    """The whole model, then every cut."""
    menu = menu_of(CHAIN, PLAIN)
    assert [offer.route for offer in menu.offers] == [
        Route.whole(),
        Route.split(3),
        Route.split(2),
        Route.split(1),
    ]
    assert menu.peaks.tolist() == [40, 20, 30, 10]
    assert menu.whole_peak_bytes == 40
    assert menu.cheapest is menu.offers[3]


def test_terms_shorten_the_menu() -> None:
    """No edges: no cuts. Units that must stay, or a least number: no cut before."""
    assert len(menu_of(CHAIN, Terms(has_edges=False)).offers) == 1
    for terms in (
        Terms(has_edges=True, kept_units=frozenset({1}), recompute=False),
        Terms(has_edges=True, min_device_units=2, recompute=False),
    ):
        routes = [offer.route for offer in menu_of(CHAIN, terms).offers]
        assert routes == [Route.whole(), Route.split(3), Route.split(2)]


def test_what_recomputes_comes_after_what_does_not() -> None:
    """And every offer's peak is that of its route and plan."""
    menu = menu_of(CHAIN, Terms(has_edges=True))
    is_plain = [offer.recompute.is_empty for offer in menu.offers]
    assert is_plain == sorted(is_plain, reverse=True)
    for offer in menu.offers:
        assert offer.peak_bytes == predicted_peak_bytes(
            CHAIN, offer.route, offer.recompute
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
def test_offers_within_the_budget_fit(budget: int | None, routes: list[str]) -> None:
    """Peaks do not fall with the cut."""
    menu = menu_of(CHAIN, PLAIN)
    (found,), unfit = candidates_of([device("a", budget)], menu, EDGES)
    offers = [menu.offers[index].route for index in found.fits]
    assert [str(r.cuts[0]) if r.cuts else "whole" for r in offers] == routes
    assert found.best == found.fits[0]
    assert np.isnan(found.best_seconds)
    assert unfit == {}


def test_who_fits_nothing_is_told_the_least_that_would_do() -> None:
    """With the route, the batch size and the budget."""
    menu = menu_of(CHAIN, PLAIN)
    found, unfit = candidates_of([device("a", 9), device("b", 10)], menu, EDGES)
    assert [each.device.client_key for each in found] == ["b"]
    assert "(device[:1] > edge[1:]) needs 10 B at batch size 4" in unfit["a"]
    assert "the budget is 9 B" in unfit["a"]
    _, unfit = candidates_of(
        [device("a", 9)], menu_of(CHAIN, Terms(has_edges=False)), ()
    )
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
    """For every device and offer at once, over the fastest edge."""
    edges = EDGES[:num_edges]
    menu = menu_of(CHAIN, Terms(has_edges=bool(edges), recompute=False))
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
    found, _ = candidates_of(devices, menu, edges)
    for each in found:
        for place, seconds in zip(each.fits, each.seconds, strict=True):
            offer = menu.offers[place]
            places = edges if offer.route.cuts else (None,)
            slow = [round_seconds(offer.work, each.device, edge) for edge in places]
            if each.device.traits.flops_per_second is None:
                assert np.isnan(seconds)
                assert slow[0] is None
            else:
                assert seconds == pytest.approx(min(s for s in slow if s is not None))
    for each in found:
        if not np.isnan(each.best_seconds):
            assert each.seconds[list(each.fits).index(each.best)] == each.best_seconds
