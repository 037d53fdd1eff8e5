"""What units make and free in a step in which their cheap operators run twice.

A second logged step tells, in which all units that can are light. Each unit's numbers
hold whatever the others do: a light unit keeps its input if and only if the plain one
does (``split/trace/selective_checkpointing.py``).
"""

from dataclasses import replace

from flwr_smartsplit.profile.fake_step import log_step
from flwr_smartsplit.profile.memory_trace import StepLog
from flwr_smartsplit.profile.unit_memory import step_bytes
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import RecomputePlan, StepBytes, UnitCost

_MOST_FLOPS = 0.1
"""The part of its forward that a light unit may run again."""


def light_plan(chain: Chain) -> RecomputePlan:
    """Plan for all units of a chain to be light that can be."""
    able = (i for i, unit in enumerate(chain.units) if unit.light_forward is not None)
    return RecomputePlan(light=tuple(able))


def light_steps(
    chain: Chain, plain: StepLog, *, batch_size: int, task: Task
) -> list[StepBytes | None]:
    """Find what each unit makes and frees if its cheap operators run twice.

    Parameters
    ----------
    chain : Chain
        The units.
    plain : StepLog
        A step in which none of them does.
    batch_size : int
        Examples per step.
    task : Task
        Supplies the optimizer, the loss and the shape of the targets.

    Returns
    -------
    list[StepBytes or None]
        None for a unit that has no such variant.
    """
    plan = light_plan(chain)
    found: list[StepBytes | None] = [None] * len(chain)
    if plan.is_empty:
        return found
    log = log_step(chain, batch_size=batch_size, task=task, recompute=plan)
    steps, _ = step_bytes(chain, log, batch_size=batch_size, task=task, recompute=plan)
    for index in plan.light:
        more = log.rerun_flops(index) - plain.rerun_flops(index)
        times = min(task.accumulate, batch_size)
        found[index] = replace(steps[index], rerun_flops=more * times)
    return found


def with_light_step(unit: UnitCost, light: StepBytes | None) -> UnitCost:
    """Add what a light unit makes and frees, if being light is worth it."""
    if light is None or light.saved_bytes >= unit.step.saved_bytes:
        return unit
    is_cheap = light.rerun_flops <= _MOST_FLOPS * unit.forward_flops
    return replace(unit, light_step=light) if is_cheap else unit
