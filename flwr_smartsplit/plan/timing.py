"""How long a client's part of a round takes: work over speeds, nothing measured.

The planner compares routes by these sums, and the simulations' clock says by them how
long a round would have taken on a fleet.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

from flwr_smartsplit.errors import bytes_text
from flwr_smartsplit.plan.checkpointing.plan import extra_flops
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    DeviceProfile,
    EdgeProfile,
    Link,
    RecomputePlan,
    Route,
    UnitCost,
    Work,
)
from flwr_smartsplit.types.options import STEP_OVER_FORWARD

NO_WAIT = Link()


def work_of(
    profile: ChainProfile, route: Route, recompute: RecomputePlan = KEEP_ALL
) -> Work:
    """Add up what a route asks for; each rerun of a plan counts as forward."""
    units, flops = profile.units, _step_flops(profile.units)
    own = [
        index
        for leg in route.device_legs(len(units))
        for index in range(leg.start, leg.stop)
    ]
    device_flops = sum(flops[index] for index in own)
    extra = 0 if recompute.is_empty else extra_flops(profile, route, recompute)
    crossed = [route.cuts[0], route.cuts[-1]] if route.returns else route.cuts[:1]
    between = route.cuts[1:-1] if route.returns else route.cuts[1:]
    sizes = [profile.num_micro_batches * units[c - 1].boundary_bytes for c in crossed]
    coded = [_coded_work(profile, cut) for cut in crossed]
    here = sum(each.here_flops for each in coded[:1])
    here += sum(each.there_flops for each in coded[1:])
    there = sum(each.here_flops + each.there_flops for each in coded) - here
    return Work(
        device_flops=device_flops + extra + here,
        edge_flops=sum(flops) - device_flops + there,
        boundary_bytes=sum(sizes),
        unreturned_bytes=sum(each.idle_bytes for each in coded[:1])
        + sum(each.saved_bytes for each in coded[1:]),
        unsent_bytes=sum(each.saved_bytes for each in coded[:1])
        + sum(each.idle_bytes for each in coded[1:]),
        num_exchanges=profile.num_micro_batches * len(crossed),
        hops=tuple(_hop(profile, cut, *crossed[1:]) for cut in between),
        state_bytes=sum(
            units[index].parameter_bytes
            - units[index].frozen_bytes
            + units[index].buffer_bytes
            for index in own
        ),
        extra_flops=extra,
        coding_flops=here,
        edge_coding_flops=there,
        doubtful_bytes=sum(each.doubtful_bytes for each in coded),
    )


def _hop(profile: ChainProfile, cut: int, *returning: int) -> tuple[int, int]:
    """Say what a link from edge to edge carries on, and back.

    What returns to the device comes back over it, and its gradient goes on over it.
    """
    there = back = 0
    for index, each in enumerate((cut, *returning)):
        size = profile.num_micro_batches * profile.units[each - 1].boundary_bytes
        coded = _coded_work(profile, each)
        sent, returned = size - coded.saved_bytes, size - coded.idle_bytes
        there += returned if index else sent
        back += sent if index else returned
    return there, back


class _CodedWork(NamedTuple):
    """What the codec of a cut saves and takes, in all micro-batches of a step."""

    saved_bytes: int  # Of the boundary
    idle_bytes: int  # Of its gradient; all of it where nothing before is trained
    doubtful_bytes: int  # Of both
    here_flops: int  # Where the boundary is made
    there_flops: int  # Where it arrives


def _coded_work(profile: ChainProfile, cut: int) -> _CodedWork:
    unit, parts = profile.units[cut - 1], profile.num_micro_batches
    coding, returns = unit.coding, not _is_frozen(profile.units[:cut])
    likely_back = coding.likely_saved_back_bytes
    back = coding.saved_back_bytes + likely_back if returns else unit.boundary_bytes
    return _CodedWork(
        parts * (coding.saved_bytes + coding.likely_saved_bytes),
        parts * back,
        parts * (coding.likely_saved_bytes + likely_back * returns),
        parts * (coding.send_flops + coding.receive_back_flops * returns),
        parts * (coding.receive_flops + coding.send_back_flops * returns),
    )


def _step_flops(units: Sequence[UnitCost]) -> list[int]:
    """Count each unit's FLOPs in a step.

    Once forward; once more for the gradient that passes through, if something before is
    trained; and once more for the gradients of what backward multiplies with, which a
    frozen unit's parameters have not.
    """
    found, is_reached = [], False
    for unit in units:
        is_trained = unit.gradient_bytes > 0
        is_reached = is_reached or is_trained
        is_frozen = unit.parameter_bytes > 0 and not is_trained
        passes = STEP_OVER_FORWARD - is_frozen if is_reached else 1
        found.append(passes * unit.forward_flops)
    return found


def _is_frozen(units: Sequence[UnitCost]) -> bool:
    return not any(unit.gradient_bytes for unit in units)


def step_seconds(
    work: Work,
    *,
    flops_per_second: float,
    link: Link,
    edge_flops_per_second: float,
    edge_links: Sequence[Link] = (),
) -> float:
    """Add up the seconds of one training step; nothing overlaps.

    ``edge_links`` are those from edge to edge, in route order.
    """
    return (
        work.device_flops / flops_per_second
        + work.edge_flops / edge_flops_per_second
        + work.up_bytes / link.up_bytes_per_second
        + work.down_bytes / link.down_bytes_per_second
        + 2 * link.latency_seconds * work.num_exchanges
        + hop_seconds(work, edge_links)
    )


def hop_seconds(work: Work, links: Sequence[Link]) -> float:
    """Return what crossing from edge to edge takes in a step; nothing without links."""
    return sum(
        there / link.up_bytes_per_second
        + back / link.down_bytes_per_second
        + 2 * link.latency_seconds * work.num_exchanges
        for (there, back), link in zip(work.hops, links, strict=False)
    )


def links_along(route: Sequence[str], edges: Iterable[EdgeProfile]) -> list[Link]:
    """Return the links from each edge of a route to the next; unknown ones are free."""
    named = {name: EdgeProfile(name=name) for name in route}
    named |= {edge.name: edge for edge in edges}
    return [named[one].link_to(named[to]) or NO_WAIT for one, to in pairwise(route)]


def transfer_seconds(num_bytes: float, link: Link) -> float:
    """Return the seconds until so many bytes arrive and as many go back."""
    return (
        num_bytes / link.down_bytes_per_second
        + num_bytes / link.up_bytes_per_second
        + 2 * link.latency_seconds
    )


def round_seconds(
    work: Work,
    device: DeviceProfile,
    edge: EdgeProfile | None = None,
    *beyond: EdgeProfile,
) -> float | None:
    """Say how long a client's part of a round takes; None if nobody knows its speed.

    ``beyond`` are the edges that the route goes on to. A link or an edge of unknown
    speed takes no time.
    """
    flops_per_second = device.traits.flops_per_second
    if flops_per_second is None:
        return None
    home = device.traits.link or NO_WAIT
    near = home if edge is None else device.traits.link_to(edge.name) or NO_WAIT
    on_route = () if edge is None else (edge, *beyond)
    edge_flops = inf if edge is None else edge.flops_per_second or inf
    each = step_seconds(
        work,
        flops_per_second=flops_per_second,
        link=near,
        edge_flops_per_second=edge_flops,
        edge_links=links_along([each.name for each in on_route], on_route),
    )
    return device.num_steps * each + transfer_seconds(work.state_bytes, home)


def over_limit(
    work: Work, device: DeviceProfile, edges: Sequence[EdgeProfile]
) -> tuple[int, int] | None:
    """Say what a round would send over a link that may not carry it, and its limit.

    None if all of the device's links may, to whichever of the edges it goes.
    """
    stepped, state = device.num_steps * work.most_bytes, 2 * work.state_bytes
    traits = device.traits
    shares_home = any(edge.name not in traits.edge_links for edge in edges)
    asked = [(traits.link, state + stepped * shares_home)]
    own = [traits.edge_links[e.name] for e in edges if e.name in traits.edge_links]
    asked += [(link, stepped) for link in own]
    for link, num_bytes in asked:
        limit = None if link is None else link.most_bytes_per_round
        if limit is not None and num_bytes > limit:
            return num_bytes, limit
    return None


def why_over_limit(num_bytes: int, limit: int) -> str:
    """Say why no route is left, with the least bytes that one would send."""
    return (
        f"no route sends so little: {bytes_text(num_bytes)} in a round, and its link "
        f"may carry {bytes_text(limit)}. Raise Link(most_bytes_per_round=...), make "
        "fewer steps, or write fewer bytes at the cut."
    )
