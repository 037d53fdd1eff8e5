"""Stages: what plans of recomputation are made of, and what one of them holds.

A stage is one unit, or several between which nothing is kept that a plan could start
again from. Its numbers come from a logged step, so they add up to what a step holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from flwr_smartsplit.types import ChainProfile, Leg, StepBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """One way to run a stage once and keep what backward needs.

    Bytes are as in ``StepBytes``.
    """

    saved_bytes: int
    kept_bytes: int
    forward_peak_bytes: int
    rerun_peak_bytes: int
    backward_peak_bytes: int
    extra_cost: float = 0.0  # What backward runs again
    selective: tuple[int, ...] = ()  # Units that keep their costly results only


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Units ``[start, stop)`` kept or run again together; none for the loss."""

    start: int
    stop: int
    runs: tuple[StageRun, ...]  # Ways to run it, keeping all first
    passing_peak_bytes: int = 0  # Most that its forward makes if nothing is kept
    output_bytes: int = 0
    context_bytes: int = 0  # What later stages use of it besides its output
    arriving_bytes: int = 0  # Gradients that are there when a rerun of it begins
    left_bytes: int = 0  # Gradients that its backward leaves until the end
    cost: float = 0.0  # Of its forward, in FLOPs or milliseconds
    rerun_cost: float = 0.0  # The same up to the last tensor that it saves
    can_rerun: bool = True


def stages_of(profile: ChainProfile, leg: Leg) -> tuple[Stage, ...]:
    """Divide a device's segment into stages; the loss is the last if it is there."""
    found: list[Stage] = []
    pending: list[int] = []
    for index in range(leg.start, leg.stop):
        pending.append(index)
        step = profile.units[index].step
        is_place = step.is_output_saved and not step.crossing_bytes
        if step.output_bytes and is_place and index < leg.stop - 1:
            found.append(_merged(profile, pending))
            pending = []
    found.append(_merged(profile, pending))
    if leg.stop == len(profile.units):
        last = profile.units[-1].step
        if last.output_bytes and last.is_output_saved:
            loss, end = profile.loss, leg.stop
            runs, left = (_run_of([loss]),), loss.left_bytes
            found.append(
                Stage(start=end, stop=end, runs=runs, left_bytes=left, can_rerun=False)
            )
        else:
            found[-1] = _with_loss(found[-1], profile.loss, last.output_bytes)
    return tuple(found)


def _merged(profile: ChainProfile, indices: Sequence[int]) -> Stage:
    units = [profile.units[index] for index in indices]
    plain = [unit.step for unit in units]
    runs = [_run_of(plain)]
    selective = [unit.selective_step or unit.step for unit in units]
    which = tuple(i for i, u in zip(indices, units, strict=True) if u.selective_step)
    if which:
        extra = sum(u.selective_step.rerun_flops for u in units if u.selective_step)
        runs.append(replace(_run_of(selective), extra_cost=extra, selective=which))
    passing = alive = 0
    for step in plain:
        passing = max(passing, alive + step.passing_peak_bytes)
        alive = step.crossing_bytes or step.output_bytes or alive
    arriving = (step.arriving_bytes for step in reversed(plain))
    return Stage(
        start=indices[0],
        stop=indices[-1] + 1,
        runs=tuple(runs),
        passing_peak_bytes=passing,
        output_bytes=alive,
        context_bytes=sum(step.context_bytes for step in plain),
        arriving_bytes=next(filter(None, arriving), plain[-1].gradient_bytes),
        left_bytes=sum(step.left_bytes for step in plain),
        cost=sum(unit.forward_flops for unit in units),
        rerun_cost=sum(unit.forward_flops for unit in units[:-1])
        + units[-1].step.rerun_flops,
        can_rerun=all(step.can_rerun for step in plain),
    )


def _run_of(steps: Sequence[StepBytes]) -> StageRun:
    """Add up what units in a row hold, if all of them run once."""
    saved = alive = forward = rerun = kept = 0
    before: list[int] = []
    for step in steps:
        before.append(saved)
        rerun = max(forward, saved + alive + step.rerun_peak_bytes)
        forward = max(forward, saved + alive + step.forward_peak_bytes)
        kept = saved + step.kept_bytes
        saved += step.saved_bytes
        if step.output_bytes or step.crossing_bytes:
            alive = 0 if step.is_output_saved else step.output_bytes
    backward = left = 0
    for step, held in zip(reversed(steps), reversed(before), strict=True):
        backward = max(backward, held + left + step.backward_peak_bytes)
        left += step.left_bytes
    return StageRun(
        saved_bytes=saved,
        kept_bytes=kept,
        forward_peak_bytes=forward,
        rerun_peak_bytes=rerun,
        backward_peak_bytes=backward,
    )


def _with_loss(stage: Stage, loss: StepBytes, alive_bytes: int) -> Stage:
    """Join the loss to the last stage, whose output it does not keep."""
    peak = alive_bytes + loss.forward_peak_bytes

    def joined(run: StageRun) -> StageRun:
        held = run.saved_bytes + peak
        return replace(
            run,
            forward_peak_bytes=max(run.forward_peak_bytes, held),
            backward_peak_bytes=max(run.backward_peak_bytes, held) + loss.left_bytes,
        )

    return replace(
        stage,
        runs=tuple(map(joined, stage.runs)),
        left_bytes=stage.left_bytes + loss.left_bytes,
        can_rerun=False,
    )


def always_held_bytes(profile: ChainProfile, legs: Sequence[Leg]) -> int:
    """Add up what a device with these segments holds at any moment of a step."""
    units = [index for leg in legs for index in range(leg.start, leg.stop)]
    held_bytes = sum(profile.units[index].resident_bytes for index in units)
    return profile.batch_bytes + held_bytes - profile.repeated_bytes(units)


def left_from(stages: Sequence[Stage]) -> list[int]:
    """List what the backward of each stage and those after it leaves; 0 at the end."""
    lefts = [stage.left_bytes for stage in reversed(stages)]
    return list(accumulate(lefts, initial=0))[::-1]


def passing_peaks(stages: Sequence[Stage]) -> list[int]:
    """List the most that stages up to each of these make if nothing is kept."""
    most, before, peaks = 0, 0, []
    for stage in stages:
        most = max(most, before + stage.passing_peak_bytes)
        before = stage.output_bytes
        peaks.append(most)
    return peaks
