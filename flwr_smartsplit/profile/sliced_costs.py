"""What a device holds that does its front in slices: a dry run of just that step.

Unlike plain steps, sliced ones are not read off one log: which tensors are alive
together depends on the cut and on the slice.
"""

from dataclasses import replace

import torch
from torch import Tensor

from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.memory.meter import MemoryMeter, unmetered
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import DryRun, fake_batch, fake_copy
from flwr_smartsplit.split.layout import is_dense
from flwr_smartsplit.split.segment import Boundary
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.slicing import SlicedRunner, dense_slice, room_for

_NUM_STEPS = 2  # The optimizer makes its state in the first.


def predicted_sliced_peak_bytes(
    chain: Chain, task: Task, *, cut: int, batch_size: int, slice_size: int
) -> int:
    """Predict the most a device holds that runs its front slice by slice.

    Parameters
    ----------
    chain : Chain
        The model's units; parameters may be on meta.
    task : Task
        Supplies the optimizer, the loss and the shape of the targets.
    cut : int
        The first unit after the device's.
    batch_size : int
        Examples per step.
    slice_size : int
        Examples per slice, fewer than in a batch; if it is not, a plain step is done,
        whose peak ``predicted_peak_bytes`` tells.

    Returns
    -------
    int
        Bytes, from the second step on. Nothing is allocated and nothing real is run.

    Raises
    ------
    ValueError
        If ``slice_size`` is not in ``1..batch_size - 1``.
    InvalidRoute
        If the chain has no such cut, or its front mixes samples.
    """
    if not 0 < slice_size < batch_size:
        raise ValueError(
            f"slice_size is {slice_size}: give 1..{batch_size - 1} for a batch of "
            f"{batch_size}; a larger slice is a plain step."
        )
    mixing = [unit.name for unit in chain.units[:cut] if not unit.is_samplewise]
    if mixing:
        raise InvalidRoute(
            f"units {', '.join(mixing)} are not known to treat samples one by one: "
            "their front cannot be sliced."
        )
    # Both look at values, and hold nothing that a plain step does not.
    task = replace(task, max_gradient_norm=None, schedule_fn=None)
    mode, meter = DryRun(), MemoryMeter()
    front = fake_copy(chain.segment(0, cut), mode)
    edge = _FakeEdge(chain, task, cut, mode)
    batch, edge.targets = fake_batch(
        (chain.example_inputs, task.example_targets), mode, batch_size=batch_size
    )
    with mode:
        runner = SegmentRunner(front, task)
        sliced = SlicedRunner(runner, slice_size)
        meter.track(batch, edge.targets, front, runner.optimizer)
        with meter:
            for step in range(_NUM_STEPS):
                sliced.forward(batch, step=step, send=edge.take)
                edge.train(step)
                sliced.backward(batch, step=step, receive=edge.gradient_part)
    return meter.peak_bytes


class _FakeEdge:
    """The rest of the route, which is not on the device; only layouts come of it."""

    def __init__(self, chain: Chain, task: Task, cut: int, mode: DryRun) -> None:
        tail = fake_copy(chain.segment(cut, len(chain)), mode)
        self._runner = SegmentRunner(tail, task, is_trained=False)
        self._boundary: list[Tensor] = []
        self._gradient: Tensor | None = None
        self.targets: Tensor

    def take(self, start: int, boundary: Boundary) -> None:
        """Copy what has gaps, as packing does; lay the boundary together."""
        for tensor in boundary:
            if not is_dense(tuple(tensor.shape), tensor.stride()):
                tensor.contiguous()
        with unmetered():
            if start == 0:
                num_examples = int(self.targets.shape[0])
                self._boundary = [room_for(part, num_examples) for part in boundary]

    @unmetered()
    def train(self, step: int) -> None:
        """Find how the gradient lies in memory."""
        tensors = tuple(self._boundary)
        inputs = tensors if len(tensors) > 1 else tensors[0]
        _, self._gradient = self._runner.finish(
            inputs, self.targets, step=step, inputs_are_boundary=True
        )
        for parameter in self._runner.segment.parameters():
            parameter.grad = None

    def gradient_part(self, start: int, stop: int) -> Tensor:
        """Make room for a part of the gradient, as unpacking does."""
        if self._gradient is None:
            raise RuntimeError("the segment gave its boundary no gradient.")
        with unmetered():
            part = dense_slice(self._gradient, start, stop)
        flat = torch.empty(part.numel(), dtype=part.dtype)
        return flat.as_strided(part.shape, part.stride())
