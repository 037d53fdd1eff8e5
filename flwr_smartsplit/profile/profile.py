"""What each unit of a chain costs: exact bytes and FLOPs, found without allocating.

A prediction is a dry run: fake tensors pass through the same ``SegmentRunner`` under
the same meter as in a real step, so nothing is modelled (``docs/memory-model.md``).
One step of the whole chain gives the costs of every cut (``memory_trace.py``).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.profile.cache import (
    profile_digest,
    read_profile,
    write_profile,
)
from flwr_smartsplit.profile.fake_step import StepLogger, logs_of_cuts
from flwr_smartsplit.profile.memory_trace import StepLog
from flwr_smartsplit.profile.optimizer_memory import OptimizerCosts
from flwr_smartsplit.profile.unit_memory import (
    selective_steps,
    step_bytes,
    with_selective_step,
)
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import (
    constants_of,
    rows_of_targets,
    warnings_ignored,
)
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.micro_batches import micro_batch_size
from flwr_smartsplit.train.optimizer_in_backward import stepped_in_backward
from flwr_smartsplit.train.segment_runner import reread_ones
from flwr_smartsplit.types import ChainProfile, SharedTensor, StepBytes, UnitCost
from flwr_smartsplit.types.sizes import whole

_INDEX_BYTES = 8


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
    batch_size = whole(batch_size, "batch_size")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: a step needs at least one.")
    if cache_dir is None:
        return _dry_run(chain, batch_size, task)
    digest = profile_digest(chain, batch_size=batch_size, task=task)
    profile = read_profile(cache_dir, digest)
    if profile is None:
        profile = _dry_run(chain, batch_size, task)
        write_profile(cache_dir, digest, profile)
    return profile


@warnings_ignored()
def _dry_run(chain: Chain, batch_size: int, task: Task) -> ChainProfile:
    try:
        logger = StepLogger(chain, batch_size=batch_size, task=task)
        log = logger.log()
        if log.sparse and min(task.accumulate, batch_size) > 1:
            raise InvalidTask(
                f"the gradients of {', '.join(log.sparse)} are sparse, and torch "
                "appends to them from micro-batch to micro-batch: use sparse=False, "
                "or do not accumulate."
            )
        logs = logs_of_cuts(chain, log, batch_size=batch_size, task=task)
        units = _unit_costs(chain, logs, batch_size, task)
        steps, loss = step_bytes(chain, log)
        selective = selective_steps(chain, logger, log)
        logger.require_steady_memory()  # Whatever else grows has been named.
    except InvalidTask:
        raise
    except Exception as error:
        reason = (str(error) or "no message").splitlines()[0].rstrip(".")
        raise InvalidTask(
            f"a dry run of {type(chain.model).__name__} at batch size {batch_size} "
            f"fails: {type(error).__name__}: {reason}. Model, loss "
            "and optimizer must fit the examples and not look at values.",
            batch_size=batch_size,
        ) from error
    return ChainProfile(
        batch_size=batch_size,
        batch_bytes=log.batch_bytes,
        units=tuple(
            map(_with_steps, units, steps, selective, _flops(log, batch_size, task))
        ),
        loss=loss,
        updates_last=task.max_gradient_norm is not None,
        targets_bytes=_targets_bytes(task, batch_size),
        num_micro_batches=min(task.accumulate, batch_size),
        shared=_shared_tensors(chain),
    )


def _targets_bytes(task: Task, batch_size: int) -> int:
    """Size of one micro-batch's targets."""
    size = micro_batch_size(batch_size, task.accumulate)
    rows = rows_of_targets(task.example_targets, task.example_inputs, batch_size=size)
    leaves = [x for x in tree_leaves(task.example_targets) if isinstance(x, Tensor)]
    return sum(
        x[:1].nbytes * count if x.dim() else x.nbytes
        for x, count in zip(leaves, rows, strict=True)
    )


def _flops(log: StepLog, batch_size: int, task: Task) -> list[tuple[int, int]]:
    """Count the FLOPs of each unit over a step's micro-batches, and of its rerun."""
    size = micro_batch_size(batch_size, task.accumulate)
    return [
        (forward * batch_size // size, rerun * batch_size // size)
        for forward, rerun in map(log.flops_of, range(log.num_units))
    ]


def _with_steps(
    unit: UnitCost,
    step: StepBytes,
    selective_step: StepBytes | None,
    flops: tuple[int, int],
) -> UnitCost:
    forward, rerun = flops
    plain = replace(step, rerun_flops=rerun)
    counted = replace(unit, forward_flops=forward, step=plain)
    return with_selective_step(counted, selective_step)


def _unit_costs(
    chain: Chain, logs: Sequence[StepLog], batch_size: int, task: Task
) -> list[UnitCost]:
    """Collect the costs of each unit, without FLOPs and ``StepBytes``."""
    log = logs[-1]
    accumulates = min(task.accumulate, batch_size) > 1
    static_bytes = log.batch_bytes
    costs = []
    held: set[int] = set()
    for index, optimizer in enumerate(_optimizer_costs(chain, task, log)):
        segment = chain.segment(index, index + 1)
        parameters = list(segment.parameters())
        parameter_bytes = _total_bytes(parameters)
        buffer_bytes = _total_bytes(segment.buffers()) + _constant_bytes(segment, log)
        buffer_bytes += log.loss_bytes * (index == len(chain) - 1)
        static_bytes += _total_bytes(p for p in parameters if id(p) not in held)
        held.update(map(id, parameters))
        static_bytes += buffer_bytes + optimizer.state_bytes
        static_bytes += optimizer.gradient_bytes * accumulates
        unit = UnitCost(
            name=chain.unit_names[index],
            parameter_bytes=parameter_bytes,
            buffer_bytes=buffer_bytes,
            gradient_bytes=optimizer.gradient_bytes,
            optimizer_state_bytes=optimizer.state_bytes,
            frozen_bytes=_total_bytes(p for p in parameters if not p.requires_grad),
            keeps_gradient=accumulates,
            saved_bytes=log.saved_bytes(index),
            boundary_bytes=log.boundary_bytes(index),
            forward_flops=0,
            device_peak_bytes=static_bytes
            + logs[index].head_bytes(index, optimizer.head_temporary_bytes),
            waiting_bytes=logs[index].waiting_bytes(index),
            return_bytes=log.return_bytes(index, optimizer.return_temporary_bytes),
            head_update_bytes=optimizer.head_temporary_bytes,
            tail_update_bytes=optimizer.tail_temporary_bytes,
            can_move=not chain.units[index].changed,
        )
        costs.append(unit)
    # Nothing crosses after the last unit, and the meter saw the whole chain's peak.
    whole = replace(costs[-1], device_peak_bytes=log.peak_bytes)
    return [*costs[:-1], replace(whole, boundary_bytes=0, waiting_bytes=0)]


def _shared_tensors(chain: Chain) -> tuple[SharedTensor, ...]:
    """Find the parameters that several units use; chains are not cut between others."""
    users: dict[nn.Parameter, list[int]] = {}
    for index in range(len(chain)):
        for parameter in chain.segment(index, index + 1).parameters():
            users.setdefault(parameter, []).append(index)
    shared = ((units, p.nbytes) for p, units in users.items() if len(units) > 1)
    return tuple(SharedTensor(tuple(units), size) for units, size in shared)


def _constant_bytes(segment: nn.Module, log: StepLog) -> int:
    """Sum the storages of the constants that the step used."""
    sizes = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for name, tensor in constants_of(segment).items()
        if name in log.constants
    }
    return sum(sizes.values())


@dataclass(frozen=True)
class _OptimizerCost:
    """Bytes of one unit's gradients and optimizer state, and of optimizer temporaries.

    The temporaries are those of a step of all units up to this one (head), and of all
    from this one on (tail); for a returned tail 0 if clipping delays the update.
    """

    gradient_bytes: int
    state_bytes: int
    head_temporary_bytes: int
    tail_temporary_bytes: int
    return_temporary_bytes: int


def _optimizer_costs(chain: Chain, task: Task, log: StepLog) -> list[_OptimizerCost]:
    named = dict(chain.segment(0, len(chain)).named_parameters())
    sparse = {id(named[name]): count for name, count in log.sparse.items()}
    costs = OptimizerCosts(task, sparse)
    size = len(chain)
    heads = [_late(chain.segment(0, stop + 1), log) for stop in range(size)]
    tails = [_late(chain.segment(start, size), log) for start in range(size)]
    temporary_bytes = costs.temporary_bytes
    if temporary_bytes(heads[-1]) != log.optimizer_temporary_bytes:
        # A foreach optimizer steps all parameters at once, so measure them together.
        temporary_bytes = costs.temporary_bytes_at_once
    waits = task.max_gradient_norm is not None
    found = []
    units = [chain.segment(index, index + 1) for index in range(size)]
    takers = [index for index, unit in enumerate(units) if _trained(unit, log)]
    for index, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        trained, idle = _trained(units[index], log), _idle(units[index], log)
        state_bytes = costs.state_bytes(trained) + costs.initial_state_bytes(idle)
        if index in (*takers[:1], *takers[-1:]):  # Both ends of a u-shape hold it.
            state_bytes += costs.constant_bytes(trained)
        tail_bytes = temporary_bytes(tail)
        found.append(
            _OptimizerCost(
                gradient_bytes=sum(_gradient_bytes(p, sparse) for p in trained),
                state_bytes=state_bytes,
                head_temporary_bytes=temporary_bytes(head),
                tail_temporary_bytes=tail_bytes,
                return_temporary_bytes=0 if waits else tail_bytes,
            )
        )
    return found


def _gradient_bytes(parameter: Tensor, sparse: Mapping[int, int]) -> int:
    """Size of a gradient; a sparse one has an index beside each of its rows."""
    count = sparse.get(id(parameter))
    if count is None:
        return parameter.numel() * parameter.element_size()
    return count * (parameter[:1].numel() * parameter.element_size() + _INDEX_BYTES)


def _trained(segment: nn.Module, log: StepLog) -> list[Tensor]:
    """List the parameters that received a gradient."""
    return [p for name, p in segment.named_parameters() if name in log.trained]


def _late(segment: nn.Module, log: StepLog) -> list[Tensor]:
    """List the parameters that are updated after backward, not inside it."""
    trained = _trained(segment, log)
    early = (
        {id(p) for p in stepped_in_backward(trained)}
        if log.steps_in_backward
        else set()
    )
    early -= {id(parameter) for parameter in reread_ones(segment)}
    return [parameter for parameter in trained if id(parameter) not in early]


def _idle(segment: nn.Module, log: StepLog) -> list[Tensor]:
    """List the trainable parameters that never receive a gradient."""
    return [
        parameter
        for name, parameter in segment.named_parameters()
        if parameter.requires_grad and name not in log.trained
    ]


def _total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
