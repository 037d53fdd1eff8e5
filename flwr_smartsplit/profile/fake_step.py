"""A training step of a whole chain under fake tensors, logged."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flwr_smartsplit.errors import InvalidTask, bytes_text
from flwr_smartsplit.memory.meter import parts_of
from flwr_smartsplit.profile.dry_loss import DryLoss
from flwr_smartsplit.profile.memory_trace import (
    UNKNOWN,
    LoggingMeter,
    Observed,
    StepLog,
    Used,
    highest,
)
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import (
    DryRun,
    StandIns,
    constants_of,
    fake_batch,
    fake_copy,
    fake_targets,
)
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.micro_batches import micro_batch_size, micro_batches
from flwr_smartsplit.train.segment_runner import SegmentRunner, autocast_of
from flwr_smartsplit.types import KEEP_ALL, WHOLE_BATCH, MicroBatch, RecomputePlan


class DryStep:
    """A whole chain under fake tensors and a log, ready for training steps."""

    def __init__(self, chain: Chain, *, batch_size: int, task: Task) -> None:
        # It reads values, and holds no more memory than a plain step.
        task = replace(task, schedule_fn=None)
        self.mode, self.meter = DryRun(), LoggingMeter()
        self.segment = fake_copy(chain.segment(0, len(chain)), self.mode)
        self.observed = Observed(self.segment, self.meter, num_units=len(chain))
        inputs, mode = chain.example_inputs, self.mode
        targets = fake_targets(
            task.example_targets, inputs, mode, batch_size=batch_size
        )
        self._batch = fake_batch(inputs, mode, batch_size=batch_size), targets
        size = micro_batch_size(batch_size, task.accumulate)
        self.task = task
        self.loss = DryLoss(task, mode, self.meter, batch_size=size)
        task = replace(task, loss_fn=self.loss)
        self._stand_ins = StandIns(mode)
        with mode, self._stand_ins:
            self.parts = _parts(self._batch, batch_size, task)
            self.runner = SegmentRunner(self.observed, task, steps_in_backward=True)
            self.meter.track(self._batch)
            self.batch_bytes = self.meter.live_bytes
            self.meter.track(
                self.segment, self.runner.optimizer
            )  # Some begin with a state.

    def run(self, step: int) -> int:
        """Run one step; return the position where its last micro-batch began."""
        with self.mode, self.meter, self._stand_ins:
            for part, batch in self.parts:
                start = self.meter.position
                self.runner.finish(
                    *batch, step=step, inputs_are_boundary=False, part=part
                )
            if self.task.max_gradient_norm is not None:
                self.runner.update()  # Later, as on a device: clipping reads values.
        return start


def _parts(batch: Any, batch_size: int, task: Task) -> list[tuple[MicroBatch, Any]]:
    """Take two micro-batches of the largest size, or the whole batch.

    The second one meets the gradients of the first, so its peak is the step's.
    """
    if micro_batch_size(batch_size, task.accumulate) == batch_size:
        return [(WHOLE_BATCH, batch)]
    _, largest = next(micro_batches(batch, task.accumulate))
    return [(MicroBatch(index, 2), largest) for index in range(2)]


class StepLogger:
    """Training steps of a whole chain under fake tensors, which can be logged.

    The first one creates the optimizer's state; none is real.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        batch_size: int,
        task: Task,
        dead: Mapping[int, frozenset[int]] | None = None,
    ) -> None:
        self._dry = DryStep(chain, batch_size=batch_size, task=task)
        self._dry.observed.dead = dead or {}
        self.num_micro_batches = min(task.accumulate, batch_size)
        self._ends: list[int] = []
        self._trained: set[str] = set()
        self._sparse: dict[str, int] = {}
        for name, parameter in self._dry.segment.named_parameters():
            if parameter.requires_grad:
                note = partial(self._note, name=name)
                parameter.register_post_accumulate_grad_hook(note)
        if self._dry.runner.optimizer is not None:
            self._dry.runner.optimizer.register_step_pre_hook(
                lambda *_: self._ends.append(self._dry.meter.position)
            )
        start = self._dry.run(0)
        self._left_bytes = _left_by_forward(self._dry, start)
        self._may_grow = False
        self._loss_bytes = _kept_bytes(self._dry)

    def log(
        self, recompute: RecomputePlan = KEEP_ALL, *, ends_at: int | None = None
    ) -> StepLog:
        """Run and log another step, of a device that ends at a unit if one is given."""
        dry = self._dry
        dry.runner.recompute = recompute
        dry.observed.ends_at = ends_at
        before = dry.meter.live_bytes
        with dry.observed.saves():
            start = dry.run(1)
        left = _left_by_forward(dry, start)
        log = StepLog(
            dry.observed,
            start=start,
            passing_peaks=self._passing_peaks(recompute),
            backward_end=self._ends[-1] if self._ends else dry.meter.position,
            batch_bytes=dry.batch_bytes,
            used=Used(
                frozenset(self._trained),
                _seen(dry.segment, dry.meter),
                dry.runner.steps_in_backward,
                self._loss_bytes,
                self._sparse,
            ),
        )
        self._may_grow |= left < self._left_bytes or dry.meter.live_bytes > before
        self._left_bytes = left
        return log

    def require_steady_memory(self) -> None:
        """Refuse a model that keeps more with each step, by one without log."""
        if not self._may_grow:
            return
        gc.collect()
        before = self._dry.meter.live_bytes
        self._dry.run(1)
        gc.collect()
        kept = self._dry.meter.live_bytes - before
        if kept > 0:
            raise InvalidTask(
                f"memory grows by {bytes_text(kept)} with each training step, in a "
                "stock loop too, so no budget would hold. Either forward keeps tensors "
                "(detach them, and let old ones go), or it writes in place into a "
                "tensor that is still needed for gradients, in a branch that the loss "
                "does not use; PyTorch never frees such a branch. Write y = y + x "
                "there instead of y += x"
            )

    def _passing_peaks(self, recompute: RecomputePlan) -> list[int]:
        """Find the peak of each unit in a forward that saves nothing."""
        dry, meter = self._dry, LoggingMeter()
        _, (inputs, _) = dry.parts[-1]
        meter.track(dry.segment, inputs)
        ends = [meter.position]

        def end(_: int, value: Any) -> Any:
            ends.append(meter.position)
            return value

        with dry.mode, meter, saved_tensors_hooks(_drop, _drop), autocast_of(dry.task):
            dry.segment(inputs, observe=end, recompute=recompute)
        changes, births = np.array(meter.changes), np.array(meter.births)
        return [
            highest(changes[first:last][births[first:last] >= first])
            for first, last in pairwise(ends)
        ]

    def _note(self, parameter: Tensor, *, name: str) -> None:
        self._trained.add(name)
        gradient = parameter.grad
        if gradient is not None and gradient.layout is torch.sparse_coo:
            self._sparse[name] = parts_of(gradient)[1].shape[0]


def logs_of_cuts(
    chain: Chain, log: StepLog, *, batch_size: int, task: Task
) -> list[StepLog]:
    """Return a log for the cut after each unit; the last one is the whole route's.

    It is the one log, unless a tensor crosses to which no gradient comes: only a device
    that ends there holds the graph behind it.
    """
    if not (dead := _dead_of(log)):
        return [log] * log.num_units
    found: Mapping[int, frozenset[int]] = {}
    while dead != found:  # What is not run may be all that used what came before it.
        found = dead
        logger = StepLogger(chain, batch_size=batch_size, task=task, dead=found)
        others = logger.log()
        dead = _dead_of(others)
    return [
        logger.log(ends_at=index) if index in dead else others
        for index in range(log.num_units)
    ]


def _dead_of(log: StepLog) -> dict[int, frozenset[int]]:
    return {index: b.dead for index, b in enumerate(log.boundaries) if b.dead}


def _drop(value: Any) -> Any:
    """Save nothing for backward."""
    del value


def _left_by_forward(dry: DryStep, start: int) -> int:
    """Size of what the last forward of a step made, and the step has not freed."""
    return _alive_bytes(dry, [range(start, dry.observed.boundaries[-1].forward_end)])


def _kept_bytes(dry: DryStep) -> int:
    """Size of what the loss used or made in its forward, and has not freed by now."""
    return _alive_bytes(dry, dry.loss.spans)


def _alive_bytes(dry: DryStep, spans: Sequence[range]) -> int:
    """Size of what spans of changes first saw, and is still there."""
    pairs = zip(dry.meter.births, dry.meter.changes, strict=True)
    return sum(size for birth, size in pairs if any(birth in span for span in spans))


def _seen(segment: nn.Module, meter: LoggingMeter) -> frozenset[str]:
    """Name the constants that the step used."""
    return frozenset(
        name
        for name, constant in constants_of(segment).items()
        if meter.birth_of(constant) != UNKNOWN
    )
