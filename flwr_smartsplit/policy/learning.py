"""Speeds that devices do not tell, learned from the steps that they made.

What a step took bounds a device's speed from below: all of the time may have been
work. The best bound of all rounds counts, so one slow round is soon forgotten.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf

from flwr_smartsplit.policy.timing import Work
from flwr_smartsplit.types import DeviceProfile, EdgeProfile, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """How fast a device has been at least.

    Parameters
    ----------
    flops_per_second : float
        Floating-point operations of training.
    bytes_per_second : float or None
        To an edge and back, whatever the edge itself takes included; None as long as
        its own work may have taken all of the time.
    """

    flops_per_second: float
    bytes_per_second: float | None = None


def learned(
    before: Speeds | None, work: Work | None, step_seconds: float | None
) -> Speeds | None:
    """Learn from one more round.

    Parameters
    ----------
    before : Speeds or None
        What was known.
    work : Work or None
        What a step asked for; None if nobody knows.
    step_seconds : float or None
        How long it took; None, or a number that means nothing, if nobody knows.

    Examples
    --------
    >>> def work(flops, num_bytes):
    ...     return Work(device_flops=flops, edge_flops=0, boundary_bytes=num_bytes,
    ...                 num_exchanges=1, state_bytes=0)
    >>> whole = learned(None, work(80, 0), 4.0)
    >>> whole
    Speeds(flops_per_second=20.0, bytes_per_second=None)
    >>> learned(whole, work(20, 10), 3.0)
    Speeds(flops_per_second=20.0, bytes_per_second=10.0)
    """
    if work is None or step_seconds is None or not 0 < step_seconds < inf:
        return before
    flops = work.device_flops / step_seconds
    rate = None
    if before is not None:
        flops = max(flops, before.flops_per_second)
        rate = before.bytes_per_second
    if flops == 0:
        return before
    away_seconds = step_seconds - work.device_flops / flops
    if work.boundary_bytes > 0 and away_seconds > 0:
        rate = max(rate or 0.0, 2 * work.boundary_bytes / away_seconds)
    return Speeds(flops_per_second=flops, bytes_per_second=rate)


def with_speeds(
    device: DeviceProfile, speeds: Speeds | None, edges: Iterable[EdgeProfile]
) -> DeviceProfile:
    """Fill in what a device does not say of itself; what it says stands.

    Parameters
    ----------
    device : DeviceProfile
        What it says.
    speeds : Speeds or None
        What was learned of it.
    edges : Iterable[EdgeProfile]
        To all of which its way is taken for the same.
    """
    traits = device.traits
    if speeds is None or traits.flops_per_second is not None:
        return device
    links = dict(traits.edge_links)
    if speeds.bytes_per_second is not None and traits.link is None:
        rate = speeds.bytes_per_second
        link = Link(up_bytes_per_second=rate, down_bytes_per_second=rate)
        links = {edge.name: link for edge in edges} | links
    known = replace(traits, flops_per_second=speeds.flops_per_second, edge_links=links)
    return replace(device, traits=known)
