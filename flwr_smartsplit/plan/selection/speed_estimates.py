"""Speeds that devices do not tell, learned from the steps that they made.

A step's seconds are work over the device's speed, and bytes over that of its way to the
edge. One route leaves open which of them took the time; two tell them apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf

from flwr_smartsplit.types import DeviceProfile, EdgeProfile, Link, Work
from flwr_smartsplit.types.devices import LEAST_RATE, MOST_FLOPS_PER_SECOND

LEAST_SECONDS = 1e-9  # A shorter step is none
MOST_STEPS = 8  # Of one client, each on another route; the last ones are kept
_LEAST_DETERMINANT = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The shortest step that a device made on one route."""

    flops: float  # Its own work
    num_bytes: float  # To the edge and back, together
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """How fast a device seems to be in training."""

    steps: tuple[Step, ...]  # One for each route
    flops_per_second: float
    bytes_per_second: float | None = None  # With the edge's own time, if told apart


def learned(
    before: Speeds | None, work: Work | None, step_seconds: float | None
) -> Speeds | None:
    """Learn from one more round; numbers that mean nothing teach nothing."""
    if work is None or step_seconds is None or not LEAST_SECONDS <= step_seconds < inf:
        return before
    new = Step(
        flops=work.device_flops,
        num_bytes=work.up_bytes + work.down_bytes,
        seconds=step_seconds,
    )
    if new.flops <= 0:
        return before
    others = []
    for step in () if before is None else before.steps:
        if (step.flops, step.num_bytes) != (new.flops, new.num_bytes):
            others.append(step)
        elif step.seconds < new.seconds:
            new = step
    return _fitted((*others, new)[-MOST_STEPS:])


def with_speeds(
    device: DeviceProfile, speeds: Speeds | None, edges: Iterable[EdgeProfile]
) -> DeviceProfile:
    """Fill in what a device does not say of itself; what it says stands.

    Its way to all edges is taken to be the same.
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


def _fitted(steps: tuple[Step, ...]) -> Speeds:
    """Fit seconds per FLOP and per byte, both above 0, with least relative errors."""
    work = [step.flops / step.seconds for step in steps]
    way = [step.num_bytes / step.seconds for step in steps]
    ww = sum(w * w for w in work)
    bb = sum(b * b for b in way)
    wb = sum(w * b for w, b in zip(work, way, strict=True))
    determinant = ww * bb - wb * wb
    # Of routes that are alike nothing can be told apart.
    if determinant > _LEAST_DETERMINANT * ww * bb:
        per_flop = (sum(work) * bb - sum(way) * wb) / determinant
        per_byte = (sum(way) * ww - sum(work) * wb) / determinant
        if per_flop > 0 and per_byte > 0:
            return Speeds(
                steps=steps,
                flops_per_second=_plausible(1 / per_flop),
                bytes_per_second=_plausible(1 / per_byte),
            )
    # Either took no time that shows: then all of the shortest steps was work.
    return Speeds(steps=steps, flops_per_second=_plausible(max(work)))


def _plausible(rate: float) -> float:
    """Keep a rate that traits may have, whatever a client says it measured."""
    return min(max(rate, LEAST_RATE), MOST_FLOPS_PER_SECOND)
