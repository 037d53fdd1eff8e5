"""What one client's segment takes at an edge, read off the chain's profile."""

from typing import NamedTuple

from flwr_smartsplit.plan.checkpointing.stages import stages_of
from flwr_smartsplit.plan.checkpointing.step_memory import held_by
from flwr_smartsplit.types import EDGE, KEEP_ALL, ChainProfile, Leg


class TailBytes(NamedTuple):
    """What a session takes: in memory while it is open, on disk once it is sealed."""

    memory_bytes: int
    disk_bytes: int


def tail_bytes(profile: ChainProfile, start: int, stop: int) -> TailBytes:
    """Predict what units ``[start, stop)`` take at an edge with a memory budget.

    Such an edge updates large parameters inside backward, as devices do. The memory is
    the peak of the session's tensors, from its opening, when its state is there twice
    (read and built), to its seal; messages in transit are not part of it. It is exact
    where the route ends at this edge, and an upper bound where it goes on. The disk has
    no frozen parameters, and is without headers.
    """
    if not 0 < start < stop <= len(profile.units):
        raise ValueError(
            f"units [{start}, {stop}) cannot be at an edge: a chain of "
            f"{len(profile.units)} units is cut at 1 to {len(profile.units) - 1}."
        )
    units = profile.units[start:stop]
    repeated = profile.repeated_bytes(range(start, stop))
    resident = sum(unit.resident_bytes for unit in units) - repeated
    state = sum(unit.parameter_bytes + unit.buffer_bytes for unit in units)
    frozen = sum(unit.frozen_bytes for unit in units)
    gradients = sum(unit.new_gradient_bytes for unit in units)
    if stop == len(profile.units):  # With what the codec of the cut before takes
        step = units[0].return_bytes + profile.targets_bytes
    else:
        step = _passing_bytes(profile, start, stop)
    update = gradients + units[0].tail_update_bytes if profile.updates_last else 0
    opening = 2 * state - repeated
    return TailBytes(max(resident + max(step, update), opening), state - frozen)


def _passing_bytes(profile: ChainProfile, start: int, stop: int) -> int:
    """Bound what a step makes of units between two boundaries."""
    stages = stages_of(profile, Leg(EDGE, start, stop))
    before, first = profile.units[start - 1], profile.units[start]
    left = sum(stage.left_bytes for stage in stages)
    update = left + before.step.gradient_bytes + first.tail_update_bytes
    held = held_by(stages, KEEP_ALL).peak_bytes
    came, goes = before.coding, profile.units[stop - 1].coding
    coding = came.kept_bytes + max(came.receive_bytes, came.send_back_bytes)
    coding += goes.kept_bytes + max(goes.send_bytes, goes.receive_back_bytes)
    return before.boundary_bytes + max(held, update) + coding
