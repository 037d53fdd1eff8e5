"""What each unit of a chain costs: exact bytes, found without allocating them.

A prediction is a dry run: fake tensors go through the same ``SegmentRunner`` under
the same meter as a real step, so nothing has to be modelled (`docs/memory-model.md`).
Two steps are run, since optimizer state appears in the second.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.model.chain import Chain
from flwr_smartsplit.model.dry_run import fake_batch, fake_copy
from flwr_smartsplit.model.memory import MemoryMeter
from flwr_smartsplit.model.segment import SegmentRunner
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ChainProfile, UnitCost

_NUM_STEPS = 2


def profile_chain(chain: Chain, *, batch_size: int, task: Task) -> ChainProfile:
    """Find the exact costs of a chain for one batch size and optimizer.

    Parameters
    ----------
    chain : Chain
        The model's units; parameters may be on meta.
    batch_size : int
        Examples per step.
    task : Task
        Supplies the optimizer, the loss and the shape of the targets.

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
    try:
        peaks = [
            _device_peak(chain, stop, batch_size=batch_size, task=task)
            for stop in range(1, len(chain) + 1)
        ]
    except Exception as error:
        raise InvalidTask(
            f"a dry run of {type(chain.model).__name__} at batch size {batch_size} "
            f"fails: {type(error).__name__}: {str(error).splitlines()[0]} Model, loss "
            "and optimizer must fit the examples and not look at values.",
            batch_size=batch_size,
        ) from error
    units = tuple(
        UnitCost(
            name=unit.name,
            parameter_bytes=_total_bytes(chain.segment(index, index + 1).parameters()),
            buffer_bytes=_total_bytes(chain.segment(index, index + 1).buffers()),
            boundary_bytes=boundary_bytes,
            device_peak_bytes=peak_bytes,
        )
        for index, (unit, (peak_bytes, boundary_bytes)) in enumerate(
            zip(chain.units, peaks, strict=True)
        )
    )
    return ChainProfile(batch_size=batch_size, units=units)


def _device_peak(
    chain: Chain, stop: int, *, batch_size: int, task: Task
) -> tuple[int, int]:
    """Dry-run a device that holds units ``[0, stop)``; return peak and boundary."""
    mode = FakeTensorMode()
    segment = fake_copy(chain.segment(0, stop), mode)
    *inputs, targets = fake_batch(
        (*chain.example_inputs, task.example_targets), mode, batch_size=batch_size
    )
    batch = tuple(inputs)
    with mode:
        runner = SegmentRunner(segment, task)
        meter = MemoryMeter()
        meter.track(segment, batch, targets)
        with meter:
            for step in range(_NUM_STEPS):
                boundary_bytes = _fake_step(
                    runner, batch, targets, step=step, ends=stop == len(chain)
                )
    return meter.peak_bytes, boundary_bytes


def _fake_step(
    runner: SegmentRunner,
    batch: tuple[Tensor, ...],
    targets: Tensor,
    *,
    step: int,
    ends: bool,
) -> int:
    """Do one step as a device would, and return the bytes of its output."""
    if ends:
        runner.finish(batch, targets, step=step, inputs_are_boundary=False)
        return 0
    boundary = runner.forward(batch, step=step, inputs_are_boundary=False)
    boundary_bytes: int = boundary.numel() * boundary.element_size()
    # Popped, so that the runner alone holds it, as it does on a device.
    gradient = [torch.empty_like(boundary, requires_grad=False)]
    del boundary
    runner.backward(gradient.pop())
    return boundary_bytes


def _total_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
