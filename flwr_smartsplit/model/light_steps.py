"""What units make and free in a step in which their cheap operators run twice.

A second logged step tells, in which all units that can are light. Each unit's numbers
hold whatever the others do: a light unit keeps its input if and only if the plain one
does (``model/light.py``).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flwr_smartsplit.model.chain import Chain
from flwr_smartsplit.model.dry_run import fake_batch, fake_copy
from flwr_smartsplit.model.segment import autocast_of
from flwr_smartsplit.model.step_log import log_step
from flwr_smartsplit.model.unit_steps import step_bytes
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import KEEP_ALL, RecomputePlan, StepBytes

_MOST_FLOPS = 0.1
"""The part of its forward that a light unit may run again."""


def light_plan(chain: Chain) -> RecomputePlan:
    """Plan for all units of a chain to be light that can be."""
    able = (i for i, unit in enumerate(chain.units) if unit.light_forward is not None)
    return RecomputePlan(light=tuple(able))


def light_steps(
    chain: Chain, plain: Sequence[StepBytes], *, batch_size: int, task: Task
) -> list[StepBytes | None]:
    """Find what each unit makes and frees if its cheap operators run twice.

    Parameters
    ----------
    chain : Chain
        The units.
    plain : Sequence[StepBytes]
        What they make and free otherwise.
    batch_size : int
        Examples per step.
    task : Task
        Supplies the optimizer, the loss and the shape of the targets.

    Returns
    -------
    list[StepBytes or None]
        None for a unit that has no such variant, or none that is worth it.
    """
    plan = light_plan(chain)
    if plan.is_empty:
        return [None] * len(chain)
    log = log_step(chain, batch_size=batch_size, task=task, recompute=plan)
    steps, _ = step_bytes(chain, log, batch_size=batch_size, task=task, recompute=plan)
    count = partial(_step_flops, chain, batch_size=batch_size, task=task)
    found: list[StepBytes | None] = [None] * len(chain)
    once, again = count(KEEP_ALL), count(plan)
    for index in plan.light:
        (forward, backward), (_, longer) = once[index], again[index]
        step = replace(steps[index], rerun_flops=longer - backward)
        saves = step.saved_bytes < plain[index].saved_bytes
        if saves and step.rerun_flops <= _MOST_FLOPS * forward:
            found[index] = step
    return found


def _step_flops(
    chain: Chain, plan: RecomputePlan, *, batch_size: int, task: Task
) -> list[tuple[int, int]]:
    """Count the FLOPs of each unit's forward and of its backward.

    Not under the meter, which the counter disturbs: it holds what was recomputed.
    """
    mode, counter = FakeTensorMode(), FlopCounterMode(display=False)
    segment = fake_copy(chain.segment(0, len(chain)), mode).train()
    batch, targets = fake_batch(
        (chain.example_inputs, task.example_targets), mode, batch_size=batch_size
    )
    ends, starts = [0], dict[int, int]()

    def total() -> int:
        return int(counter.get_total_flops())

    def came(index: int, gradient: Tensor) -> None:
        del gradient
        starts[index] = total()

    def observe(index: int, value: Any) -> None:
        ends.append(total())
        first = tree_leaves(value)[0]
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(partial(came, index))

    with mode, counter:
        with autocast_of(task):
            outputs = segment(batch, observe=observe, recompute=plan)
            loss = task.loss_fn(outputs, targets)
        loss.backward()
    # Where no gradient comes, backward is over.
    begins = [total(), *(starts.get(i, total()) for i in range(len(chain)))]
    return [
        (after - before, end - begin)
        for (before, after), (end, begin) in zip(
            pairwise(ends), pairwise(begins), strict=True
        )
    ]
