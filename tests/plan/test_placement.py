"""Placing: near edges first, where one was before, and never beyond what is there."""

from dataclasses import replace

from flwr_smartsplit.plan.placement import Places
from flwr_smartsplit.types import EdgeProfile, Route, Work
from tests.plan.fleets import FAST, SLOW, SPACE, candidate

SPLIT = SPACE.options[1]
NEAR_X = candidate("a", flops_per_second=1.0, link=FAST, edge_links={"y": SLOW}).device
ANY = candidate("b").device


def edges(**memory_bytes: int | None) -> tuple[EdgeProfile, ...]:
    """Make edges with so much memory."""
    return tuple(EdgeProfile(name=k, memory_bytes=v) for k, v in memory_bytes.items())


def taken(places: Places, *homes: str | None) -> list[str]:
    """Place one client after the other."""
    options = [places.place(ANY, [SPLIT], home) for home in homes]
    return ["none" if o is None else o.route.edges()[0] for o in options]


def test_clients_without_a_home_fill_edges_evenly() -> None:
    """In the strategy's order."""
    assert taken(Places(edges(x=None, y=None)), *[None] * 4) == ["x", "y", "x", "y"]


def test_a_client_stays_where_it_was_unless_others_have_two_less() -> None:
    """Two at x while y is empty is one too many."""
    places = Places(edges(x=None, y=None))
    assert taken(places, "x", "x", "x", "x") == ["x", "x", "y", "x"]


def test_memory_and_disk_are_never_exceeded() -> None:
    """20 bytes each: one fits 39, two fit 40."""
    assert taken(Places(edges(x=39, y=40)), "x", "x", "x", "x") == [
        "x",
        "y",
        "y",
        "none",
    ]
    on_disk = (EdgeProfile(name="x", disk_bytes=39),)
    assert taken(Places(on_disk), "x", "x") == ["x", "none"]


def test_a_fast_link_beats_a_short_queue() -> None:
    """Only edges that are about as fast share a client's load."""
    work = Work(device_flops=1, edge_flops=1, boundary_bytes=100, num_exchanges=1)
    option = replace(SPLIT, work=work)
    places = Places(edges(y=None, x=None))
    for _ in range(3):
        placed = places.place(NEAR_X, [option], "y")
        assert placed is not None
        assert placed.route == Route.split(2, edge="x")


def test_a_whole_model_and_a_placed_route_need_no_room() -> None:
    """Whoever chose a route beforehand chose its edge, too."""
    places = Places(edges(x=0))
    assert places.place(ANY, [SPLIT], None) is None
    placed = SPLIT.at("y")
    assert places.place(ANY, [SPLIT, placed], None) == placed
    whole = places.place(ANY, [SPLIT, SPACE.options[0]], None)
    assert whole is not None
    assert (whole.route, whole.is_placed) == (Route.whole(), True)
