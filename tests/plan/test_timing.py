"""Timing: seconds are work over speed, worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from flwr_smartsplit.plan.search_space import search_space
from flwr_smartsplit.plan.selection.candidates import candidates_of
from flwr_smartsplit.plan.timing import (
    Work,
    hop_seconds,
    links_along,
    over_limit,
    round_seconds,
    step_seconds,
    transfer_seconds,
    work_of,
)
from flwr_smartsplit.types import (
    NO_CONSTRAINTS,
    ChainProfile,
    DeviceProfile,
    DeviceTraits,
    EdgeProfile,
    Link,
    RecomputePlan,
    Rerun,
    Route,
)
from tests.plan.profiles import chain_of, device

CHAIN = chain_of([10, 20, 30, 40])
LINK = Link(up_bytes_per_second=8, down_bytes_per_second=16, latency_seconds=0.5)


def test_a_split_shares_the_work_at_its_cut() -> None:
    """A unit has 32 FLOPs forward, three times that a step, and 8 bytes."""
    assert work_of(CHAIN, Route.split(1)) == Work(
        device_flops=3 * 32,
        edge_flops=3 * 96,
        boundary_bytes=16,
        num_exchanges=1,
        state_bytes=8,
    )


def test_the_whole_model_sends_no_boundary() -> None:
    """Everything is at the device."""
    work = work_of(CHAIN, Route.whole())
    assert (work.device_flops, work.edge_flops) == (3 * 128, 0)
    assert (work.boundary_bytes, work.num_exchanges, work.state_bytes) == (0, 0, 32)


def test_a_route_that_returns_crosses_the_link_twice_a_step() -> None:
    """And has both of its segments' parameters."""
    work = work_of(CHAIN, Route.u_shape(1, 3))
    assert (work.boundary_bytes, work.num_exchanges, work.state_bytes) == (32, 2, 16)
    assert work.edge_flops == 3 * 64


def test_hops_between_edges_are_none_of_the_devices_link() -> None:
    """Only the first cut is."""
    work = work_of(CHAIN, Route.hops((1, 2), edges=("a", "b")))
    assert (work.boundary_bytes, work.num_exchanges) == (16, 1)


UNEVEN = replace(
    CHAIN,
    units=tuple(
        replace(unit, boundary_bytes=size)
        for unit, size in zip(CHAIN.units, (16, 24, 40, 0), strict=True)
    ),
)
OVER_TWO = Route((1, 2, 3), ("device", "a", "b", "device"))


def test_a_hop_carries_its_boundary_on_and_the_gradient_back() -> None:
    """As many bytes, unless nothing before is trained, in every micro-batch."""
    route = Route.hops((1, 2, 3), edges=("a", "b", "c"))
    assert work_of(UNEVEN, route).hops == ((24, 24), (40, 40))
    assert work_of(frozen(UNEVEN, 0, 1), route).hops == ((24, 0), (40, 40))
    parts = replace(UNEVEN, num_micro_batches=3)
    assert work_of(parts, route).hops == ((72, 72), (120, 120))
    for other in (Route.whole(), Route.split(1), Route.u_shape(1, 3)):
        assert work_of(UNEVEN, other).hops == ()


def test_what_returns_to_the_device_comes_over_every_hop() -> None:
    """40 bytes more each way; 24 on only, if units 0 and 1 are frozen."""
    assert work_of(UNEVEN, OVER_TWO).hops == ((64, 64),)
    assert work_of(frozen(UNEVEN, 0, 1), OVER_TWO).hops == ((64, 40),)
    assert work_of(frozen(UNEVEN, 0, 1, 2), OVER_TWO).hops == ((24, 40),)


def test_what_runs_twice_is_work() -> None:
    """A plan adds its FLOPs to those of the device."""
    plan = RecomputePlan(reruns=(Rerun(0, 2),))
    plain = work_of(CHAIN, Route.split(2))
    assert work_of(CHAIN, Route.split(2), plan).device_flops >= plain.device_flops


def test_seconds_of_a_step_add_up() -> None:
    """96/48 + 288/96 + 16/8 + 16/16 + two latencies."""
    work = work_of(CHAIN, Route.split(1))
    found = step_seconds(work, flops_per_second=48, link=LINK, edge_flops_per_second=96)
    assert found == 2 + 3 + 2 + 1 + 1


def test_seconds_of_a_round_add_up() -> None:
    """Three steps of 9 s (10 examples, 4 a batch), and 8 bytes down and up again."""
    device = DeviceProfile(
        client_key="a",
        budget_bytes=None,
        num_examples=10,
        batch_size=4,
        traits=DeviceTraits(flops_per_second=48, link=LINK),
    )
    edge = EdgeProfile(name="x", flops_per_second=96)
    work = work_of(CHAIN, Route.split(1))
    assert transfer_seconds(8, LINK) == 0.5 + 1 + 1
    assert round_seconds(work, device, edge) == 3 * 9 + 2.5


def test_a_link_to_an_edge_is_that_edges() -> None:
    """The model still comes over the link to the server."""
    near = Link(up_bytes_per_second=16, down_bytes_per_second=16)
    traits = DeviceTraits(flops_per_second=48, link=LINK, edge_links={"x": near})
    device = DeviceProfile(
        client_key="a", budget_bytes=None, num_examples=4, batch_size=4, traits=traits
    )
    work = work_of(CHAIN, Route.split(1))
    assert round_seconds(work, device, EdgeProfile(name="x")) == 2 + 2 + 2.5
    assert round_seconds(work, device, EdgeProfile(name="y")) == 2 + 3 + 1 + 2.5


FORTH = Link(up_bytes_per_second=8, down_bytes_per_second=4, latency_seconds=0.25)
BACK = replace(FORTH, up_bytes_per_second=4, down_bytes_per_second=8)


@pytest.mark.parametrize(
    ("links", "each_step"),
    [
        (({"b": FORTH}, {}), 3 + 6 + 0.5),  # 24 B on at 8 B/s, 24 back at 4
        (({}, {"a": BACK}), 3 + 6 + 0.5),  # The other edge says the same
        (({"b": FORTH}, {"a": FORTH}), 3 + 6 + 0.5),  # Its own counts first
        (({}, {"a": FORTH}), 6 + 3 + 0.5),
        (({}, {}), 0),
        (({"c": FORTH}, {"c": FORTH}), 0),  # Of another
    ],
)
def test_a_hop_takes_the_time_of_the_link_between_its_edges(
    links: tuple[dict[str, Link], dict[str, Link]], each_step: float
) -> None:
    """Added to three steps of 6 s, and 2.5 s for the model."""
    traits = DeviceTraits(flops_per_second=48, link=LINK)
    client = replace(device("x"), traits=traits)
    a, b = (
        EdgeProfile(name=name, links=own) for name, own in zip("ab", links, strict=True)
    )
    work = work_of(UNEVEN, Route.hops((1, 2), edges=("a", "b")))
    assert round_seconds(work, client, a) == 3 * 6 + 2.5
    assert round_seconds(work, client, a, b) == 3 * (6 + each_step) + 2.5


def test_every_hop_and_every_exchange_waits() -> None:
    """Over three edges, two hops; a route that returns exchanges twice in a step."""
    first = Link(latency_seconds=1.0)
    a = EdgeProfile(name="a", links={"b": first})
    b = EdgeProfile(name="b", links={"c": replace(first, latency_seconds=100.0)})
    along = links_along("abc", [a, b])
    work = work_of(UNEVEN, Route.hops((1, 2, 3), edges=("a", "b", "c")))
    assert hop_seconds(work, along) == 2 * 1 + 2 * 100
    assert hop_seconds(work_of(UNEVEN, OVER_TWO), along) == 2 * 2 * 1
    parts = work_of(replace(UNEVEN, num_micro_batches=3), OVER_TWO)
    assert hop_seconds(parts, along) == 3 * 2 * 2 * 1


@pytest.mark.parametrize(
    ("error", "links", "words"),
    [
        (ValueError, {"a": FORTH}, "has a link to 'a': name another edge"),
        (ValueError, {"device": FORTH}, "has a link to 'device': name another edge"),
        (
            ValueError,
            {"b": Link(most_bytes_per_round=5)},
            "'a' to 'b' has most_bytes_per_round=5: only a device's link",
        ),
        (TypeError, {"b": 1e6}, "the links of edge 'a' are {'b': 1000000.0}: give"),
        (TypeError, ("b",), "the links of edge 'a' are"),
    ],
)
def test_links_that_an_edge_cannot_have_are_refused(
    error: type[Exception], links: Any, words: str
) -> None:
    """Where they are given."""
    with pytest.raises(error, match=words):
        EdgeProfile(name="a", links=links)


@pytest.mark.parametrize(
    ("home", "near", "expected"),
    [
        (248, None, None),
        (247, None, (248, 247)),
        (200, 48, None),
        (200, 47, (48, 47)),
        (199, 48, (200, 199)),
    ],
)
def test_a_link_may_carry_so_much_in_a_round(
    home: int, near: int | None, expected: Any
) -> None:
    """3 steps of 10 + 6 bytes, and 100 of the model there and back, by hand.

    An edge without a link of its own is reached over the server's.
    """
    work = Work(boundary_bytes=10, unreturned_bytes=4, state_bytes=100)
    links = {} if near is None else {"x": Link(most_bytes_per_round=near)}
    traits = DeviceTraits(link=Link(most_bytes_per_round=home), edge_links=links)
    device = DeviceProfile(
        client_key="a", budget_bytes=None, num_examples=12, batch_size=4, traits=traits
    )
    assert over_limit(work, device, [EdgeProfile(name="x")]) == expected
    with pytest.raises(ValueError, match="most_bytes_per_round is -1"):
        Link(most_bytes_per_round=-1)


def test_without_a_speed_there_is_no_time() -> None:
    """None, not 0."""
    device = DeviceProfile(
        client_key="a", budget_bytes=None, num_examples=4, batch_size=4
    )
    assert round_seconds(work_of(CHAIN, Route.whole()), device) is None


@pytest.mark.parametrize(
    "numbers",
    [
        {"up_bytes_per_second": 0.0},
        {"down_bytes_per_second": -1.0},
        {"latency_seconds": -0.1},
        {"latency_seconds": float("nan")},
    ],
)
def test_a_link_over_which_nothing_arrives_is_refused(
    numbers: dict[str, float],
) -> None:
    """With the numbers."""
    with pytest.raises(ValueError, match="give rates of at least"):
        Link(**numbers)


@pytest.mark.parametrize("flops", [0.0, -1.0, float("inf"), float("nan")])
def test_a_speed_that_means_nothing_is_refused(flops: float) -> None:
    """None is for unknown ones."""
    with pytest.raises(ValueError, match="or None"):
        DeviceTraits(flops_per_second=flops)


@pytest.mark.parametrize("counts", [(), (0, 0), (1, -1)])
def test_label_counts_that_mean_nothing_are_refused(counts: tuple[int, ...]) -> None:
    """None is for those who do not tell."""
    with pytest.raises(ValueError, match="of each class, or None"):
        DeviceTraits(label_counts=counts)


def frozen(chain: ChainProfile, *indices: int) -> ChainProfile:
    """Freeze some units of a chain."""
    units = [
        replace(unit, gradient_bytes=0) if index in indices else unit
        for index, unit in enumerate(chain.units)
    ]
    return replace(chain, units=tuple(units))


@pytest.mark.parametrize(
    ("indices", "device_passes", "edge_passes"),
    [
        ((0, 1), 2 * 1, 3 + 3),  # a frozen front: forward only
        ((1,), 3 + 2, 3 + 3),  # a gradient passes through a frozen middle
        ((0, 1, 2), 2 * 1, 1 + 3),  # only a head is trained
        ((3,), 3 + 3, 3 + 2),
        ((0, 1, 2, 3), 2 * 1, 1 + 1),
        ((), 3 + 3, 3 + 3),
    ],
)
def test_frozen_units_do_less(
    indices: tuple[int, ...], device_passes: int, edge_passes: int
) -> None:
    """Each pass of a unit is 32 FLOPs; what comes back is a gradient that is needed."""
    work = work_of(frozen(CHAIN, *indices), Route.split(2))
    assert work.device_flops == 32 * device_passes
    assert work.edge_flops == 32 * edge_passes
    comes_back = not {0, 1} <= set(indices)
    assert work.boundary_bytes == 16
    assert work.unreturned_bytes == (0 if comes_back else 16)
    taken = step_seconds(
        work, flops_per_second=1e30, link=LINK, edge_flops_per_second=1e30
    )
    # The reply is waited for, whether or not it brings a gradient.
    assert taken == pytest.approx(16 / 8 + comes_back * 16 / 16 + 2 * 0.5)


def test_a_returning_route_sends_no_gradient_to_a_frozen_middle() -> None:
    """Of both cuts, only the boundaries cross."""
    work = work_of(frozen(CHAIN, 0, 1, 2), Route.u_shape(1, 3))
    assert (work.unsent_bytes, work.unreturned_bytes) == (16, 16)
    work = work_of(frozen(CHAIN, 0), Route.u_shape(1, 3))
    assert (work.unsent_bytes, work.unreturned_bytes) == (0, 16)


def test_all_options_at_once_take_as_long_as_each_alone() -> None:
    """Also where nothing comes back."""
    for chain in (CHAIN, frozen(CHAIN, 0, 1), frozen(CHAIN, 0, 1, 2)):
        space = search_space(chain, NO_CONSTRAINTS, has_edges=True)
        traits = DeviceTraits(flops_per_second=64.0, link=LINK)
        client = replace(device("a"), traits=traits)
        edge = EdgeProfile(name="edge", flops_per_second=640.0)
        (candidate,), _ = candidates_of([client], space, [edge])
        for index, seconds in zip(candidate.fits, candidate.seconds, strict=True):
            each = space.options[index]
            alone = round_seconds(each.work, client, edge if each.route.cuts else None)
            assert seconds == pytest.approx(alone)
