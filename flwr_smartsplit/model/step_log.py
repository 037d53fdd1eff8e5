"""One step of a whole chain under fake tensors, with every change of its memory.

A device that holds units ``[0, cut)`` makes and frees the same storages in the same
order as the whole chain does in those units: autograd runs what was recorded last
first, so all of the rest is done when a boundary's gradient is there, and
``SegmentRunner`` holds neither boundary nor gradient. So one log tells the peak of
every cut. What differs is added: how the gradient arrives, and whose optimizer runs.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.model.chain import Chain
from flwr_smartsplit.model.dry_run import constants_of, fake_batch, fake_copy
from flwr_smartsplit.model.layout import is_dense, num_spanned
from flwr_smartsplit.model.memory import MemoryMeter
from flwr_smartsplit.model.segment import SegmentRunner
from flwr_smartsplit.task import Task

_UNKNOWN = -1


class _LoggingMeter(MemoryMeter):
    """A meter that writes down every change, and which storage changed."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[int] = []
        self.births: list[int] = []  # The change that first saw the storage.

    def _made(self, storage: Any) -> None:
        storage.born = len(self.changes)

    def _change(self, storage: Any, num_bytes: int) -> None:
        super()._change(storage, num_bytes)
        self.changes.append(num_bytes)
        self.births.append(storage.born)

    @property
    def position(self) -> int:
        """The number of the next change."""
        return len(self.changes)

    def birth_of(self, tensor: Tensor) -> int:
        """Find the change that first saw a tensor's storage."""
        known = self._storages.get(tensor.untyped_storage()._cdata)
        return _UNKNOWN if known is None else known.born


@dataclass
class _Passage:
    """How the value of one unit goes out, and how its gradient comes back.

    Positions are numbers of changes; bytes are what the wire adds to them.
    """

    forward_end: int
    boundary_bytes: int
    carrier_bytes: int
    spanned_bytes: int
    packing_bytes: int
    backward_start: int = 0
    gradient_birth: int = _UNKNOWN
    gradient_bytes: int = 0
    unpacking_bytes: int = 0


class _Observed(nn.Module):
    """A segment that tells a log of its units' values while it trains."""

    def __init__(self, segment: nn.Module, meter: _LoggingMeter) -> None:
        super().__init__()
        self.segment = segment
        self.meter = meter
        self.passages: list[_Passage] = []

    def forward(self, inputs: Any, **how: Any) -> Any:
        self.passages.clear()
        return self.segment(inputs, observe=self._observe, **how)

    def _observe(self, index: int, value: Any) -> None:
        del index
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        passage = _Passage(
            forward_end=self.meter.position,
            boundary_bytes=sum(t.numel() * t.element_size() for t in tensors),
            carrier_bytes=sum(t.numel() * t.element_size() for t in tensors[:1]),
            spanned_bytes=sum(
                num_spanned(tuple(t.shape), t.stride()) * t.element_size()
                for t in tensors
            ),
            packing_bytes=sum(
                t.numel() * t.element_size()
                for t in tensors
                if not is_dense(tuple(t.shape), t.stride())
            ),
        )
        self.passages.append(passage)
        if tensors and tensors[0].requires_grad:
            tensors[0].register_hook(partial(self._gradient_came, passage))

    def _gradient_came(self, passage: _Passage, gradient: Tensor) -> None:
        shape, strides = tuple(gradient.shape), gradient.stride()
        size = gradient.element_size()
        passage.backward_start = self.meter.position
        passage.gradient_birth = self.meter.birth_of(gradient)
        passage.gradient_bytes = num_spanned(shape, strides) * size
        if not is_dense(shape, strides):
            passage.unpacking_bytes = gradient.numel() * size


@dataclass(frozen=True)
class _Used:
    """Names of what a step used."""

    trained: frozenset[str]
    constants: frozenset[str]

    @classmethod
    def by(cls, segment: nn.Module, meter: _LoggingMeter) -> "_Used":
        """Look which parameters have gradients, and which constants were seen."""
        trained = {n for n, p in segment.named_parameters() if p.grad is not None}
        seen = {
            name
            for name, constant in constants_of(segment).items()
            if meter.birth_of(constant) != _UNKNOWN
        }
        return cls(frozenset(trained), frozenset(seen))


class StepLog:
    """What the second training step of a whole chain did to memory.

    Attributes
    ----------
    peak_bytes : int
        The most that was alive in both steps: the peak of the whole route.
    batch_bytes : int
        Size of the batch, its targets included.
    trained, constants : frozenset[str]
        Names of the parameters that got a gradient, and of the tensors that were used
        but are neither parameters nor buffers.
    optimizer_temporary_bytes : int
        What the optimizer's step made beyond what was there before it.
    """

    def __init__(
        self,
        meter: _LoggingMeter,
        passages: list[_Passage],
        *,
        start: int,
        backward_end: int,
        batch_bytes: int,
        used: _Used,
    ) -> None:
        self.peak_bytes = meter.peak_bytes
        self.batch_bytes = batch_bytes
        self.trained = used.trained
        self.constants = used.constants
        self._changes = np.array(meter.changes, dtype=np.int64)
        self._births = np.array(meter.births, dtype=np.int64)
        self._passages = passages
        self._start = start
        self._backward_end = backward_end
        self.optimizer_temporary_bytes = _highest(self._changes[backward_end:])

    @property
    def num_units(self) -> int:
        """The length of the chain."""
        return len(self._passages)

    def boundary_bytes(self, index: int) -> int:
        """Size of what crosses the boundary after a unit."""
        return self._passages[index].boundary_bytes

    def saved_bytes(self, index: int) -> int:
        """Size of what a unit's forward makes and backward finds."""
        first = self._passages[index - 1].forward_end if index else self._start
        last = self._passages[index].forward_end
        forward = slice(self._start, self._passages[-1].forward_end)
        births = self._births[forward]
        mine = (births >= first) & (births < last)
        return int(self._changes[forward][mine].sum())

    def waiting_bytes(self, index: int) -> int:
        """Size of the activations that wait while the units after one do their step.

        The boundary is dropped once sent; what backward needs of it is still held.
        """
        passage = self._passages[index]
        until = slice(self._start, passage.backward_start)
        births = self._births[until]
        from_forward = (births >= self._start) & (births < passage.forward_end)
        return int(self._changes[until][from_forward].sum())

    def return_bytes(self, index: int, optimizer_temporary_bytes: int) -> int:
        """Find the most a place holds that runs all units from one to the last.

        What stays is not counted; the boundary that comes in is held to the end. No
        route comes back for the first unit.
        """
        if index == 0:
            return 0
        passage = self._passages[index - 1]
        start, end = passage.forward_end, passage.backward_start
        changes = self._changes[start:end][self._births[start:end] >= start]
        entered = passage.spanned_bytes
        is_sparse = passage.packing_bytes > 0
        arrived = entered + int(changes.sum())
        left = entered + self._left_bytes(passage)
        return max(
            entered + (passage.boundary_bytes if is_sparse else 0),
            entered + _highest(changes),
            arrived + passage.carrier_bytes,  # Autograd copies the boundary's gradient.
            left + optimizer_temporary_bytes,
            left + passage.unpacking_bytes,
        )

    def _left_bytes(self, passage: _Passage) -> int:
        """Size of what a place that ends the route has made when its backward is over.

        That is the gradients, the boundary's with them, and the loss.
        """
        changes = self._changes[passage.forward_end : self._backward_end]
        births = self._births[passage.forward_end : self._backward_end]
        mine = (births >= passage.forward_end) & (births < passage.backward_start)
        mine &= births != passage.gradient_birth
        return int(changes[mine].sum()) + passage.gradient_bytes

    def head_bytes(self, index: int, optimizer_temporary_bytes: int) -> int:
        """Find the most a device that ends with a unit holds besides what stays.

        What stays, namely parameters, buffers, optimizer state and batch, is not
        counted.
        """
        passage = self._passages[index]
        forward = slice(self._start, passage.forward_end)
        births = self._births
        from_forward = (births >= self._start) & (births < passage.forward_end)
        held = self.waiting_bytes(index)
        sending = int(self._changes[forward][births[forward] >= self._start].sum())
        backward = slice(passage.backward_start, self._backward_end)
        from_backward = births >= passage.backward_start
        is_gradient = births == passage.gradient_birth
        changes = np.where(
            is_gradient[backward], -passage.gradient_bytes, self._changes[backward]
        )
        changes = changes[(from_forward | from_backward | is_gradient)[backward]]
        arrived = held + passage.gradient_bytes
        left = arrived + int(changes.sum())
        return max(
            self._forward_highest(forward),
            sending + passage.packing_bytes,
            arrived + passage.unpacking_bytes,
            arrived + _highest(changes),
            left + optimizer_temporary_bytes,
        )

    def _forward_highest(self, forward: slice) -> int:
        return _highest(self._changes[forward][self._births[forward] >= self._start])


def _highest(changes: npt.NDArray[np.int64]) -> int:
    """Find the highest sum of the first changes, or none of them."""
    return max(0, int(np.cumsum(changes).max(initial=0)))


def log_step(chain: Chain, *, batch_size: int, task: Task) -> StepLog:
    """Run two steps of a whole chain under fake tensors, and log the second.

    The optimizer makes its state in the first.
    """
    # Both look at values, and hold nothing that a plain step does not.
    task = replace(task, max_gradient_norm=None, schedule_fn=None)
    mode, meter = FakeTensorMode(), _LoggingMeter()
    segment = _Observed(fake_copy(chain.segment(0, len(chain)), mode), meter)
    batch, targets = fake_batch(
        (chain.example_inputs, task.example_targets), mode, batch_size=batch_size
    )
    ends: list[int] = []
    with mode:
        runner = SegmentRunner(segment, task)
        if runner.optimizer is not None:
            runner.optimizer.register_step_pre_hook(
                lambda *_: ends.append(meter.position)
            )
        meter.track(batch, targets)
        batch_bytes = meter.live_bytes
        meter.track(segment, runner.optimizer)  # Some make their state at once.
        with meter:
            for step in range(2):
                start = meter.position
                runner.finish(batch, targets, step=step, inputs_are_boundary=False)
    return StepLog(
        meter,
        segment.passages,
        start=start,
        backward_end=ends[-1] if ends else meter.position,
        batch_bytes=batch_bytes,
        used=_Used.by(segment.segment, meter),
    )
