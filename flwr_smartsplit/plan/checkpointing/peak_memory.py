"""Read a route's memory off a chain's profile."""

from flwr_smartsplit.errors import InvalidPlan
from flwr_smartsplit.plan.checkpointing.stages import always_held_bytes, stages_of
from flwr_smartsplit.plan.checkpointing.step_memory import held_by
from flwr_smartsplit.types import (
    KEEP_ALL,
    NO_CODING,
    ChainProfile,
    Leg,
    RecomputePlan,
    Route,
)


def predicted_peak_bytes(
    profile: ChainProfile, route: Route, recompute: RecomputePlan = KEEP_ALL
) -> int:
    """Predict the most a device holds during a training step of its route.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size and optimizer.
    route : Route
        Any route of the chain.
    recompute : RecomputePlan
        What the device runs twice.

    Returns
    -------
    int
        Bytes. Without recomputation, exactly what the meter measures from the second
        step on; with it, never less and at most 5 % more. Where several tensors cross a
        cut, never less and at most 15 % more (`docs/memory-model.md`).

    Raises
    ------
    InvalidRoute
        If a cut lies outside the chain.
    InvalidPlan
        If a part of the plan does not lie within a device segment.

    Notes
    -----
    The device of a U-shaped route holds both segments all the time. The first one's
    activations wait while the last one does its whole step; then the first runs
    backward as if nothing else were there.
    """
    first, *rest = route.device_legs(len(profile.units))
    if not recompute.is_empty:
        return _with_recompute(profile, (first, *rest), recompute)
    head = profile.units[first.stop - 1]
    if not rest:
        return head.device_peak_bytes
    tail = profile.units[rest[0].start :]
    before = always_held_bytes(profile, (first,))
    resident_bytes = always_held_bytes(profile, (first, *rest)) - before
    kept_bytes = updated = 0
    if profile.updates_last:
        kept_bytes = sum(unit.new_gradient_bytes for unit in tail)
        gradients = sum(unit.new_gradient_bytes for unit in profile.units[: first.stop])
        updated = before + gradients + kept_bytes + tail[0].tail_update_bytes
    return resident_bytes + max(
        head.device_peak_bytes + kept_bytes,
        before + head.waiting_bytes + tail[0].return_bytes,
        updated,
    )


def _with_recompute(
    profile: ChainProfile, legs: tuple[Leg, ...], plan: RecomputePlan
) -> int:
    """Follow the step through the stages of each device segment."""
    parts = [plan.within(leg.start, leg.stop) for leg in legs]
    if sum(len(p.reruns) + len(p.selective) for p in parts) < len(plan.reruns) + len(
        plan.selective
    ):
        raise InvalidPlan(f"the plan {plan} has units that do not run on the device.")
    static = always_held_bytes(profile, legs)
    first, *rest = legs
    stages = stages_of(profile, first)
    head = held_by(stages, parts[0])
    head_left = sum(stage.left_bytes for stage in stages)
    kept = 0
    update = profile.units[first.stop - 1].head_update_bytes
    last = profile.units[first.stop - 1]
    coding = last.coding
    peaks = [max(head.peak_bytes, head_left + update)]
    if coding != NO_CODING:
        sent = last.boundary_bytes + coding.send_bytes
        came = coding.kept_bytes + coding.receive_back_bytes
        peaks[0] = max(peaks[0], head.waiting_bytes + max(sent, came))
    for leg, part in zip(rest, parts[1:], strict=True):
        stages, before = stages_of(profile, leg), profile.units[leg.start - 1]
        left = sum(stage.left_bytes for stage in stages)
        update = profile.units[leg.start].tail_update_bytes
        own = held_by(stages, part).peak_bytes
        if profile.updates_last:
            kept = left
            peaks.append(head_left + left + update)
        else:
            own = max(own, left + before.step.gradient_bytes + update)
        own += before.boundary_bytes
        if before.coding != NO_CODING:
            goes = before.boundary_bytes + left + before.coding.send_back_bytes
            own = max(own, goes) + before.coding.kept_bytes
            own = max(own, before.coding.receive_bytes)
        peaks.append(head.waiting_bytes + coding.kept_bytes + own)
    peaks[0] += kept
    return static + max(peaks)
