"""What each unit of a chain costs: exact bytes and FLOPs, found without allocating.

A prediction is a dry run: fake tensors go through the same ``SegmentRunner`` under
the same meter as a real step, so nothing has to be modelled (`docs/memory-model.md`).
One step of the whole chain is enough for every cut, because a device that ends at a
cut does what the whole chain does up to there (`profile/memory_trace.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.profile.cache import (
    profile_digest,
    read_profile,
    write_profile,
)
from flwr_smartsplit.profile.fake_step import log_step
from flwr_smartsplit.profile.memory_trace import StepLog
from flwr_smartsplit.profile.optimizer_memory import OptimizerCosts
from flwr_smartsplit.profile.unit_memory import (
    selective_steps,
    step_bytes,
    unit_flops,
    with_selective_step,
)
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import constants_of, warnings_ignored
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.micro_batches import micro_batch_size
from flwr_smartsplit.train.optimizer_in_backward import early_ones
from flwr_smartsplit.types import ChainProfile, UnitCost


def profile_chain(
    chain: Chain, *, batch_size: int, task: Task, cache_dir: Path | None = None
) -> ChainProfile:
    """Find the exact costs of a chain for one batch size and optimizer.

    Parameters
    ----------
    chain : Chain
        The model's units; parameters may be on meta.
    batch_size : int
        Examples per step.
    task : Task
        Supplies the optimizer, the loss and the shape of the targets.
    cache_dir : Path, optional
        A folder to keep profiles in, under a digest of all they depend on.

    Returns
    -------
    ChainProfile
        One ``UnitCost`` per unit. Nothing is allocated and nothing real is run.

    Raises
    ------
    InvalidTask
        If model, loss and optimizer cannot do a step at this batch size.

    Examples
    --------
    >>> import torch
    >>> from functools import partial
    >>> task = Task(
    ...     model_fn=partial(torch.nn.Linear, 4, 2),
    ...     loss_fn=torch.nn.functional.cross_entropy,
    ...     optimizer_fn=partial(torch.optim.SGD, lr=0.1),
    ...     example_inputs=torch.zeros(1, 4),
    ...     example_targets=torch.zeros(1, dtype=torch.int64),
    ... )
    >>> chain = Chain.from_module(torch.nn.Linear(4, 2), task.example_inputs)
    >>> profile_chain(chain, batch_size=8, task=task).units[0].parameter_bytes
    40
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: a step needs at least one.")
    if cache_dir is None:
        return _found(chain, batch_size, task)
    digest = profile_digest(chain, batch_size=batch_size, task=task)
    profile = read_profile(cache_dir, digest)
    if profile is None:
        profile = _found(chain, batch_size, task)
        write_profile(cache_dir, digest, profile)
    return profile


@warnings_ignored()
def _found(chain: Chain, batch_size: int, task: Task) -> ChainProfile:
    try:
        log = log_step(chain, batch_size=batch_size, task=task)
        optimizers = _optimizer_costs(chain, task, log)
        flops = unit_flops(chain, batch_size=batch_size)
        steps, loss = step_bytes(chain, log, batch_size=batch_size, task=task)
        selective = selective_steps(chain, log, batch_size=batch_size, task=task)
    except Exception as error:
        reason = (str(error) or "no message").splitlines()[0].rstrip(".")
        raise InvalidTask(
            f"a dry run of {type(chain.model).__name__} at batch size {batch_size} "
            f"fails: {type(error).__name__}: {reason}. Model, loss "
            "and optimizer must fit the examples and not look at values.",
            batch_size=batch_size,
        ) from error
    accumulates = min(task.accumulate, batch_size) > 1
    units = []
    for unit, (forward, rerun), step, selective_step in zip(
        _unit_costs(chain, log, optimizers, accumulates),
        *(flops, steps, selective),
        strict=True,
    ):
        plain = replace(step, rerun_flops=rerun)
        counted = replace(unit, forward_flops=forward, step=plain)
        units.append(with_selective_step(counted, selective_step))
    return ChainProfile(
        batch_size=batch_size,
        batch_bytes=log.batch_bytes,
        units=tuple(units),
        loss=loss,
        updates_last=task.max_gradient_norm is not None,
        targets_bytes=micro_batch_size(batch_size, task.accumulate)
        * task.example_targets[:1].nbytes,
        num_micro_batches=min(task.accumulate, batch_size),
    )


def _unit_costs(
    chain: Chain,
    log: StepLog,
    optimizers: Sequence["_OptimizerCost"],
    accumulates: bool,
) -> tuple[UnitCost, ...]:
    """Put together what each unit costs, and what a device holds that ends with it."""
    last = len(chain) - 1
    units = []
    static_bytes = log.batch_bytes
    for index, unit in enumerate(chain.units):
        segment = chain.segment(index, index + 1)
        parameter_bytes = _total_bytes(segment.parameters())
        constants = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for name, tensor in constants_of(segment).items()
            if name in log.constants
        }
        buffer_bytes = _total_bytes(segment.buffers()) + sum(constants.values())
        optimizer = optimizers[index]
        static_bytes += parameter_bytes + buffer_bytes + optimizer.state_bytes
        static_bytes += optimizer.gradient_bytes * accumulates
        units.append(
            UnitCost(
                name=unit.name,
                parameter_bytes=parameter_bytes,
                buffer_bytes=buffer_bytes,
                gradient_bytes=optimizer.gradient_bytes,
                optimizer_state_bytes=optimizer.state_bytes,
                keeps_gradient=accumulates,
                saved_bytes=log.saved_bytes(index),
                boundary_bytes=0 if index == last else log.boundary_bytes(index),
                forward_flops=0,  # Counted apart.
                device_peak_bytes=_peak(log, index, static_bytes, optimizer),
                waiting_bytes=0 if index == last else log.waiting_bytes(index),
                return_bytes=log.return_bytes(index, optimizer.return_temporary_bytes),
                head_update_bytes=optimizer.head_temporary_bytes,
                tail_update_bytes=optimizer.tail_temporary_bytes,
            )
        )
    return tuple(units)


def _peak(
    log: StepLog, index: int, static_bytes: int, optimizer: "_OptimizerCost"
) -> int:
    """Find the most a device holds that ends with a unit."""
    if index == log.num_units - 1:
        return log.peak_bytes
    return static_bytes + log.head_bytes(index, optimizer.head_temporary_bytes)


@dataclass(frozen=True)
class _OptimizerCost:
    """What the optimizer holds for one unit.

    And what it needs for a step of all units up to it, and of all from it on; that of
    a returned segment is nothing before the end, if gradients are clipped.
    """

    gradient_bytes: int
    state_bytes: int
    head_temporary_bytes: int
    tail_temporary_bytes: int
    return_temporary_bytes: int


def _optimizer_costs(chain: Chain, task: Task, log: StepLog) -> list[_OptimizerCost]:
    """Find what the optimizer of each unit costs, and of each device."""
    costs = OptimizerCosts(task)
    size = len(chain)
    heads = [_late(chain.segment(0, stop + 1), log) for stop in range(size)]
    tails = [_late(chain.segment(start, size), log) for start in range(size)]
    temporary_bytes = costs.temporary_bytes
    if temporary_bytes(heads[-1]) != log.optimizer_temporary_bytes:
        # It steps many parameters at once (foreach): only a step of all of them tells.
        temporary_bytes = costs.temporary_bytes_at_once
    segments = [chain.segment(index, index + 1) for index in range(size)]
    units = [(_trained(segment, log), _idle(segment, log)) for segment in segments]
    waits = task.max_gradient_norm is not None
    return [
        _OptimizerCost(
            gradient_bytes=_total_bytes(unit),
            state_bytes=costs.state_bytes(unit) + costs.early_state_bytes(idle),
            head_temporary_bytes=temporary_bytes(head),
            tail_temporary_bytes=temporary_bytes(tail),
            return_temporary_bytes=0 if waits else temporary_bytes(tail),
        )
        for (unit, idle), head, tail in zip(units, heads, tails, strict=True)
    ]


def _trained(segment: nn.Module, log: StepLog) -> list[Tensor]:
    """List the parameters that get a gradient."""
    return [p for name, p in segment.named_parameters() if name in log.trained]


def _late(segment: nn.Module, log: StepLog) -> list[Tensor]:
    """List the parameters that are stepped when backward is over."""
    trained = _trained(segment, log)
    early = {id(p) for p in early_ones(trained)} if log.steps_in_backward else set()
    return [parameter for parameter in trained if id(parameter) not in early]


def _idle(segment: nn.Module, log: StepLog) -> list[Tensor]:
    """List the parameters that an optimizer has, but that never get a gradient."""
    return [
        parameter
        for name, parameter in segment.named_parameters()
        if parameter.requires_grad and name not in log.trained
    ]


def _total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
