"""How long a client's part of a round takes: work over speeds, nothing measured.

The planner compares routes by these sums, and the simulations' clock says by them how
long a round would have taken on a fleet.
"""

from math import inf

from flwr_smartsplit.plan.checkpointing.plan import extra_flops
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    DeviceProfile,
    EdgeProfile,
    Link,
    RecomputePlan,
    Route,
    Work,
)
from flwr_smartsplit.types.options import STEP_OVER_FORWARD

NO_WAIT = Link()


def work_of(
    profile: ChainProfile, route: Route, recompute: RecomputePlan = KEEP_ALL
) -> Work:
    """Add up what a route asks for; each rerun of a plan counts as forward."""
    units = profile.units
    own = [
        unit
        for leg in route.device_legs(len(units))
        for unit in units[leg.start : leg.stop]
    ]
    forward = sum(unit.forward_flops for unit in own)
    rest = sum(unit.forward_flops for unit in units) - forward
    crossed = [route.cuts[0], route.cuts[-1]] if route.returns else route.cuts[:1]
    extra = 0 if recompute.is_empty else extra_flops(profile, route, recompute)
    return Work(
        device_flops=STEP_OVER_FORWARD * forward + extra,
        edge_flops=STEP_OVER_FORWARD * rest,
        boundary_bytes=profile.num_micro_batches
        * sum(units[cut - 1].boundary_bytes for cut in crossed),
        num_exchanges=profile.num_micro_batches * len(crossed),
        state_bytes=sum(
            unit.parameter_bytes - unit.frozen_bytes + unit.buffer_bytes for unit in own
        ),
        extra_flops=extra,
    )


def step_seconds(
    work: Work, *, flops_per_second: float, link: Link, edge_flops_per_second: float
) -> float:
    """Add up the seconds of one training step; nothing overlaps."""
    return (
        work.device_flops / flops_per_second
        + work.edge_flops / edge_flops_per_second
        + work.boundary_bytes / link.up_bytes_per_second
        + work.boundary_bytes / link.down_bytes_per_second
        + 2 * link.latency_seconds * work.num_exchanges
    )


def transfer_seconds(num_bytes: float, link: Link) -> float:
    """Return the seconds until so many bytes arrive and as many go back."""
    return (
        num_bytes / link.down_bytes_per_second
        + num_bytes / link.up_bytes_per_second
        + 2 * link.latency_seconds
    )


def round_seconds(
    work: Work, device: DeviceProfile, edge: EdgeProfile | None = None
) -> float | None:
    """Say how long a client's part of a round takes; None if nobody knows its speed.

    A link or an edge of unknown speed takes no time.
    """
    flops_per_second = device.traits.flops_per_second
    if flops_per_second is None:
        return None
    home = device.traits.link or NO_WAIT
    near = home if edge is None else device.traits.link_to(edge.name) or NO_WAIT
    edge_flops = inf if edge is None else edge.flops_per_second or inf
    each = step_seconds(
        work,
        flops_per_second=flops_per_second,
        link=near,
        edge_flops_per_second=edge_flops,
    )
    return device.num_steps * each + transfer_seconds(work.state_bytes, home)
