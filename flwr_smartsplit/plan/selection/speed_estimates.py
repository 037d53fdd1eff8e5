"""Speeds and links that devices do not tell, learned from the steps that they made.

A step's seconds are work over the device's speed, and bytes over that of its way to the
edge. What the device tells of them is taken off first, and what edges tell of links
between them. Of what is left, one route leaves open which of them took the time; two
tell them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from flwr_smartsplit.plan.timing import NO_WAIT, links_along, step_seconds
from flwr_smartsplit.types import DeviceProfile, DeviceTraits, EdgeProfile, Link, Work
from flwr_smartsplit.types.devices import LEAST_RATE, MOST_FLOPS_PER_SECOND

LEAST_SECONDS = 1e-9  # A shorter step is none
MOST_ROUTES = 8  # Of one client, each at any edges; the last ones are kept
_LEAST_DETERMINANT = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The shortest step that a device made on one route over the same edges."""

    work: Work
    edges: tuple[str, ...]
    seconds: float

    @property
    def asked(self) -> tuple[float, int]:
        """The device's own FLOPs, and the bytes to the edge and back."""
        return self.work.device_flops, self.work.up_bytes + self.work.down_bytes


Steps = tuple[Step, ...]
"""Those of one device; the last one was made last."""


def learned(
    before: Steps, work: Work | None, seconds: float | None, *edges: str
) -> Steps:
    """Learn from one more round; numbers that mean nothing teach nothing."""
    if work is None or seconds is None or not LEAST_SECONDS <= seconds < inf:
        return before
    new = Step(work=work, edges=edges, seconds=seconds)
    if not any(new.asked):
        return before
    others = []
    for step in before:
        if (step.work, step.edges) != (work, edges):
            others.append(step)
        elif step.seconds < new.seconds:
            new = step
    steps = (*others, new)
    latest = dict.fromkeys(step.asked for step in reversed(steps) if step.asked[0])
    kept = [*latest][:MOST_ROUTES]
    return tuple(step for step in steps if not step.asked[0] or step.asked in kept)


def with_speeds(
    device: DeviceProfile, steps: Steps, edges: Sequence[EdgeProfile]
) -> DeviceProfile:
    """Fill in what a device does not say of itself; what it says stands.

    Its way is taken to be the same to all edges of which it says nothing.
    """
    traits = device.traits
    speed, rate = _fitted(_untold(steps, traits, edges))
    if speed is not None:
        traits = replace(traits, flops_per_second=speed)
    if rate is not None:
        link = Link(up_bytes_per_second=rate, down_bytes_per_second=rate)
        new = {e.name: link for e in edges if traits.link_to(e.name) is None}
        traits = replace(traits, edge_links={**new, **traits.edge_links})
    return device if traits is device.traits else replace(device, traits=traits)


class _Untold(NamedTuple):
    """What is left of a step without what the device tells."""

    flops: float  # 0 if it tells its speed
    num_bytes: float  # 0 if it tells the rates of its link
    seconds: float
    all_seconds: float  # That the step took


def _untold(
    steps: Steps, traits: DeviceTraits, edges: Sequence[EdgeProfile]
) -> list[_Untold]:
    """Take off what is told; of what is alike then, the shortest counts."""
    found: dict[tuple[float, float], _Untold] = {}
    speed = traits.flops_per_second
    for step in steps:
        flops, num_bytes = step.asked
        link = (traits.link_to(step.edges[0]) if step.edges else None) or NO_WAIT
        told = step_seconds(
            step.work,
            flops_per_second=speed or inf,
            link=link,
            edge_flops_per_second=inf,
            edge_links=links_along(step.edges, edges),
        )
        has_rate = min(link.up_bytes_per_second, link.down_bytes_per_second) < inf
        new = _Untold(
            flops=flops if speed is None else 0.0,
            num_bytes=0.0 if has_rate else num_bytes,
            seconds=step.seconds - told,
            all_seconds=step.seconds,
        )
        teaches = new.flops > 0 if speed is None else new.num_bytes > 0
        if teaches and new.seconds >= LEAST_SECONDS:
            # The order is that of the last ones.
            before = found.pop(new[:2], new)
            found[new[:2]] = before if before.seconds < new.seconds else new
    return [*found.values()]


def _fitted(steps: list[_Untold]) -> tuple[float | None, float | None]:
    """Fit FLOPs and bytes per second, with least errors relative to whole steps.

    None for what is told, or does not show.
    """
    work = [step.flops / step.all_seconds for step in steps]
    way = [step.num_bytes / step.all_seconds for step in steps]
    took = [step.seconds / step.all_seconds for step in steps]
    ww, bb, wb = _product(work, work), _product(way, way), _product(work, way)
    wt, bt = _product(work, took), _product(way, took)
    determinant = ww * bb - wb * wb
    # Of routes that are alike nothing can be told apart.
    if determinant > _LEAST_DETERMINANT * ww * bb:
        per_flop = (wt * bb - bt * wb) / determinant
        per_byte = (bt * ww - wt * wb) / determinant
        if per_flop > 0 and per_byte > 0:
            return _plausible(1 / per_flop), _plausible(1 / per_byte)
    # Either took no time that shows: then all was work, or way if the speed is told.
    if not any(work):
        return None, _plausible(bb / bt) if bt > 0 else None
    if min(took) == 1:  # Nothing is told; the shortest step says most.
        return _plausible(max(work)), None
    return _plausible(ww / wt) if wt > 0 else None, None


def _product(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _plausible(rate: float) -> float:
    """Keep a rate that traits may have, whatever a client says it measured."""
    return min(max(rate, LEAST_RATE), MOST_FLOPS_PER_SECOND)
