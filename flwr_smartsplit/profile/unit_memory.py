"""What each unit allocates and frees in a step, so that plans can add it up.

Read off the log that gives the peak of every cut (``memory_trace.py``).
"""

from dataclasses import replace

import numpy as np

from flwr_smartsplit.profile.fake_step import StepLogger
from flwr_smartsplit.profile.memory_trace import StepLog, as_arrived, highest
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.types import RecomputePlan, StepBytes, UnitCost

_MOST_FLOPS = 0.1
"""The largest fraction of its forward that a selective unit may rerun."""


def step_bytes(chain: Chain, log: StepLog) -> tuple[list[StepBytes], StepBytes]:
    """Find what each unit, and then the loss, allocates and frees in a step.

    FLOPs are left at 0.
    """
    units = [
        replace(
            _unit(log, index),
            passing_peak_bytes=log.passing_peaks[index],
            rerun_peak_bytes=_rerun_peak(log, index),
            arriving_bytes=_arriving_bytes(log, index),
            can_rerun=chain.units[index].can_rerun,
        )
        for index in range(log.num_units)
    ]
    return units, _loss(log)


def _unit(log: StepLog, index: int) -> StepBytes:
    boundary = log.boundaries[index]
    forward = log.forward_of(index)
    first, last = forward.start, forward.stop
    mine = log.born_in(forward)
    saved = log.saved_bytes(index)
    kept = log.sum_bytes(boundary.backward_start, mine)
    new = {birth: size for birth, size in boundary.outputs if first <= birth < last}
    end = log.boundaries[-1].forward_end
    if index == log.num_units - 1:
        end = boundary.backward_start
    alive = {birth for birth in new if log.sum_bytes(end, log.births == birth)}
    crossing_bytes = context = 0
    output_bytes = next(iter(new.values()), 0)
    is_saved = bool(new) and next(iter(new)) in alive
    if boundary.crosses_alone:
        # Context crosses every cut and stays, whichever unit keeps it.
        context = sum(new[birth] for birth in list(new)[1:] if birth not in alive)
    else:
        since = _last_alone(log, index)
        alive_after = {b: size for b, size in boundary.outputs if b >= since}
        crossing_bytes, is_saved = sum(alive_after.values()), False
        output_bytes = sum(
            size
            for birth, size in alive_after.items()
            if not log.sum_bytes(end, log.births == birth)
        )
    sent = log.sum_bytes(last, mine) + boundary.packing_bytes
    return StepBytes(
        saved_bytes=saved + context,
        kept_bytes=kept + context,
        forward_peak_bytes=max(highest(log.changes[forward][mine[forward]]), sent),
        backward_peak_bytes=_backward_peak(log, index, kept + context),
        left_bytes=_left(log, index),
        output_bytes=output_bytes,
        crossing_bytes=crossing_bytes,
        context_bytes=sum(list(new.values())[1:]) * boundary.crosses_alone,
        gradient_bytes=sum(boundary.gradient_storages.values()),
        is_output_saved=is_saved,
    )


def _last_alone(log: StepLog, index: int) -> int:
    """Find the end of the last earlier unit whose boundary is a single tensor."""
    alone = (p for p in reversed(log.boundaries[:index]) if p.crosses_alone)
    return next((boundary.forward_end for boundary in alone), log.start)


def _backward(log: StepLog, index: int) -> slice:
    """Find the changes of a unit's backward."""
    end = log.boundaries[index - 1].backward_start if index else log.backward_end
    return slice(log.boundaries[index].backward_start, end)


def _backward_peak(log: StepLog, index: int, kept: int) -> int:
    boundary, during = log.boundaries[index], _backward(log, index)
    births = log.births[during]
    gradients = boundary.gradient_storages
    changes, is_gradient = as_arrived(gradients, log.changes[during], births)
    mine = log.born_in(log.forward_of(index))[during]
    changes = changes[mine | is_gradient | (births >= during.start)]
    arrived = kept + sum(gradients.values())
    return arrived + max(highest(changes), boundary.unpacking_bytes)


def _left(log: StepLog, index: int) -> int:
    """Size of what a unit's backward leaves, without the gradient it passes on."""
    during = _backward(log, index)
    births = log.births[during]
    onward = list(log.boundaries[index - 1].gradients) if index else []
    mine = (births >= during.start) & ~np.isin(births, onward)
    return int(log.changes[during][mine].sum())


def _loss(log: StepLog) -> StepBytes:
    last = log.boundaries[-1]
    during = slice(last.forward_end, last.backward_start)
    births = log.births[during]
    changes = log.changes[during][births >= during.start]
    peak = highest(changes)
    is_onward = np.isin(births, list(last.gradients))[births >= during.start]
    return StepBytes(
        forward_peak_bytes=peak,
        passing_peak_bytes=peak,
        backward_peak_bytes=peak,
        left_bytes=int(changes[~is_onward].sum()),
        can_rerun=False,
    )


def _rerun_peak(log: StepLog, index: int) -> int:
    """Find a unit's peak up to the last tensor that it saves.

    Checkpointing reruns units when backward first asks for a saved tensor, and stops at
    the last tensor that they save.
    """
    forward, saved = log.forward_of(index), log.saved.get(index)
    if saved is None:
        return 0
    during = slice(forward.start, saved.last_save)
    return highest(log.changes[during][log.births[during] >= forward.start])


def _arriving_bytes(log: StepLog, index: int) -> int | None:
    """Size of the gradients when backward first needs what a unit saved."""
    boundary, saved = log.boundaries[index], log.saved.get(index)
    if saved is None or saved.first_use is None:
        return None
    during = slice(boundary.backward_start, saved.first_use)
    births = log.births[during]
    gradients = boundary.gradient_storages
    changes, is_gradient = as_arrived(gradients, log.changes[during], births)
    mine = is_gradient | (births >= during.start)
    return sum(gradients.values()) + int(changes[mine].sum())


# --- selective checkpointing ----------------------------------------------------------
# A second logged step makes every unit selective that can be. Each unit's numbers hold
# whatever the others do: a selective unit keeps its input if and only if the plain one
# does (``split/trace/selective_checkpointing.py``).


def selective_plan(chain: Chain) -> RecomputePlan:
    """Make every unit selective that can be."""
    able = (
        i for i, unit in enumerate(chain.units) if unit.selective_forward is not None
    )
    return RecomputePlan(selective=tuple(able))


def selective_steps(
    chain: Chain, logger: StepLogger, plain: StepLog
) -> list[StepBytes | None]:
    """Find what each unit allocates and frees if it is selective; None if it cannot."""
    plan = selective_plan(chain)
    found: list[StepBytes | None] = [None] * len(chain)
    if plan.is_empty:
        return found
    log = logger.log(plan)
    steps, _ = step_bytes(chain, log)
    for index in plan.selective:
        more = log.rerun_flops(index) - plain.rerun_flops(index)
        more *= logger.num_micro_batches
        found[index] = replace(steps[index], rerun_flops=more)
    return found


def with_selective_step(unit: UnitCost, selective: StepBytes | None) -> UnitCost:
    """Add the costs of a selective unit, if it saves memory at little cost."""
    if selective is None or selective.saved_bytes >= unit.step.saved_bytes:
        return unit
    is_cheap = selective.rerun_flops <= _MOST_FLOPS * unit.forward_flops
    return replace(unit, selective_step=selective) if is_cheap else unit
