"""Real and dry steps of a whole model and of a device: their peaks and their times.

The device's segment runs as it does along a route, without the messages: the boundary
and its gradient cross as the bytes of the wire.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flwr_smartsplit import Task
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.split.build import materialise
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import DryRun, fake_batch, fake_copy
from flwr_smartsplit.split.segment import Boundary
from flwr_smartsplit.train.micro_batches import micro_batches
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.types import KEEP_ALL, RecomputePlan

Batch = tuple[Tensor, Tensor]
State = Mapping[str, npt.NDArray[Any]]
MIN_PAIRS, MAX_PAIRS = 3, 15
NUM_STEPS = 2
"""Optimizer state is made in the first; the second is the one that counts."""


def packed(boundary: Boundary) -> tuple[WireTensor, ...]:
    """Describe the tensors of a boundary as they are sent."""
    return tuple(map(WireTensor.pack, boundary))


def random_batch(task: Task, *, batch_size: int, seed: int) -> Batch:
    """Draw inputs and targets that fit a task."""
    generator = torch.Generator().manual_seed(seed)
    num_classes = int(task.example_targets.max()) + 1
    if not isinstance(task.example_inputs, Tensor):
        raise TypeError("only models of a single input are measured.")
    shape = (batch_size, *task.example_inputs.shape[1:])
    return (
        torch.randn(shape, generator=generator),
        torch.randint(0, num_classes, (batch_size,), generator=generator),
    )


def random_state(chain: Chain, start: int, stop: int, *, seed: int) -> State:
    """Draw numbers for the parameters of some units, and nothing for the others."""
    rng = np.random.default_rng(seed)
    segment = chain.segment(start, stop)
    buffers = {name for name, _ in segment.named_buffers()}
    state: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in segment.state_dict().items():
        shape, kind = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if name in buffers:
            state[name] = np.ones(shape, dtype=kind)
        else:
            width = max(1, int(np.prod(shape[1:])))
            state[name] = rng.normal(0, width**-0.5, shape).astype(kind)
    return state


def runner_of(
    chain: Chain, task: Task, units: range, *, seed: int, steps_in_backward: bool
) -> SegmentRunner:
    """Give some units real tensors, ready for training steps."""
    state = random_state(chain, units.start, units.stop, seed=seed)
    segment = materialise(chain, units.start, units.stop, state)
    streams = UnitStreams(seed, 1, "0")
    return SegmentRunner(
        segment, task, streams=streams, steps_in_backward=steps_in_backward
    )


def dry_whole_peak_bytes(chain: Chain, task: Task, *, batch_size: int) -> int:
    """Find the peak of a plain step of the whole model; nothing is allocated."""
    mode = DryRun()
    segment = fake_copy(chain.segment(0, len(chain)), mode)
    example = chain.example_inputs, task.example_targets
    batch = fake_batch(example, mode, batch_size=batch_size)
    with mode:
        return _whole_peak_bytes(SegmentRunner(segment, task), batch)


def measured_whole_peak_bytes(chain: Chain, task: Task, batch: Batch) -> int:
    """Measure the peak of a plain step of the whole model, in bytes."""
    whole = range(len(chain))
    return _whole_peak_bytes(
        runner_of(chain, task, whole, seed=0, steps_in_backward=False), batch
    )


def _whole_peak_bytes(runner: SegmentRunner, batch: Batch) -> int:
    def do(step: int) -> None:
        runner.finish(*batch, step=step, inputs_are_boundary=False)

    return _peak_bytes(runner, batch, do)


def measured_peak_bytes(
    runner: SegmentRunner, batch: Batch, gradient: WireTensor
) -> int:
    """Measure the peak of a device's part of a step, the second of two."""

    def do(step: int) -> None:
        for part, (inputs, _) in micro_batches(batch, runner.task.accumulate):
            at: dict[str, Any] = {"step": step, "part": part}
            packed(runner.forward(inputs, inputs_are_boundary=False, **at))
            runner.backward(lambda: (gradient.unpack(),))

    return _peak_bytes(runner, batch, do)


def _peak_bytes(runner: SegmentRunner, batch: Batch, do: Callable[[int], None]) -> int:
    """Meter two steps, the second with a meter of its own."""
    for step in range(NUM_STEPS):
        meter = MemoryMeter()
        with meter:
            meter.track(batch, runner.segment, runner.optimizer)
            do(step)
    return meter.peak_bytes


def arriving_gradient(
    chain: Chain, cut: int, task: Task, *, batch_size: int
) -> WireTensor:
    """Make a gradient that lies in memory as the edge's would, by a dry run of it."""
    mode = DryRun()

    def dry(start: int, stop: int) -> SegmentRunner:
        segment = fake_copy(chain.segment(start, stop), mode)
        with mode:
            return SegmentRunner(segment, task)

    example = chain.example_inputs, task.example_targets
    inputs, targets = fake_batch(example, mode, batch_size=batch_size)
    head, tail = dry(0, cut), dry(cut, len(chain))
    with mode:
        sent = head.forward(inputs, step=0, inputs_are_boundary=False)
        boundary = sent if len(sent) > 1 else sent[0]
        _, gradients = tail.finish(boundary, targets, step=0, inputs_are_boundary=True)
    if not gradients:
        raise RuntimeError(f"nothing after cut {cut} depends on its boundary.")
    gradient = gradients[0]
    real = torch.empty_strided(gradient.shape, gradient.stride(), dtype=gradient.dtype)
    return WireTensor.pack(real.fill_(1e-4))


def split_seconds(
    head: SegmentRunner, tail: SegmentRunner, batch: Batch, step: int
) -> float:
    """Do one step of a device and of the rest in turn; return its CPU seconds."""
    started = time.process_time()
    sent = packed(head.forward(batch[0], step=step, inputs_are_boundary=False))
    values = tuple(tensor.unpack() for tensor in sent)
    boundary = values if len(values) > 1 else values[0]
    loss, gradients = tail.finish(
        boundary, batch[1], step=step, inputs_are_boundary=True
    )
    if not gradients:
        raise RuntimeError("the rest of the model gave its boundary no gradient.")
    returned = WireTensor.pack(gradients[0])
    head.backward(lambda: (returned.unpack(),))
    float(loss)
    return time.process_time() - started


def whole_seconds(runner: SegmentRunner, batch: Batch, step: int) -> float:
    """Do one plain step of the whole model; return its CPU seconds."""
    started = time.process_time()
    loss, _ = runner.finish(*batch, step=step, inputs_are_boundary=False)
    float(loss)
    return time.process_time() - started


def timed_steps(
    chain: Chain,
    task: Task,
    batch: Batch,
    *,
    cut: int,
    plan: RecomputePlan = KEEP_ALL,
    max_seconds: float,
) -> list[tuple[float, float]]:
    """Time plain whole steps and split ones in turn, in pairs of CPU seconds."""
    make = partial(runner_of, chain, task, seed=0)
    whole = make(range(len(chain)), steps_in_backward=False)
    head = make(range(cut), steps_in_backward=True)
    head.recompute = plan
    tail = make(range(cut, len(chain)), steps_in_backward=False)

    def pair(step: int) -> tuple[float, float]:
        if step % 2:  # Whoever comes second finds the caches full of the other's.
            split = split_seconds(head, tail, batch, step)
            return whole_seconds(whole, batch, step), split
        return whole_seconds(whole, batch, step), split_seconds(head, tail, batch, step)

    num_pairs = int(max_seconds / max(sum(pair(0)), 1e-9))  # That warmed caches up.
    bounded = min(max(num_pairs, MIN_PAIRS), MAX_PAIRS)
    return [pair(step) for step in range(1, bounded + 1)]
