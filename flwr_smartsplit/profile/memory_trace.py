"""Every change of memory in one step of a whole chain, and the sums read off it.

A device with units ``[0, cut)`` allocates and frees the same storages in the same order
as the whole chain does in those units: autograd runs backward in reverse, so all later
units are done when a boundary's gradient is there, and ``SegmentRunner`` holds neither
boundary nor gradient. So one log gives the peak of every cut. Added are the two
differences: how the gradient arrives, and whose optimizer runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.profile.tensor_layout import (
    crossing_cost,
    packing_bytes,
    spanned_bytes,
    with_gradient,
)
from flwr_smartsplit.types import TensorCost

UNKNOWN = -1


class LoggingMeter(MemoryMeter):
    """A meter that logs every change of memory and the storage that changed.

    ``forward_flops`` counts the FLOPs run with gradients enabled; during backward these
    are the reruns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward_flops = 0
        self.changes: list[int] = []
        self.births: list[int] = []  # The change that first saw the storage.
        self._ignored: dict[int, Any] = {}  # Storages, which stay alive

    def ignore(self, tensor: Tensor) -> None:
        """Never count a tensor's storage."""
        storage = tensor.untyped_storage()
        self._ignored[storage._cdata] = storage

    def see(self, *tensors: Tensor | None) -> None:
        """Count tensors that no operator was given yet."""
        self._see_all(tensors)

    def _see(self, tensor: Tensor) -> None:
        if self._ignored and tensor.layout is torch.strided:
            if tensor.untyped_storage()._cdata in self._ignored:
                return
        super()._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operator as a meter does, and count FLOPs that build a graph."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None and torch.is_grad_enabled():
            self.forward_flops += int(count(*args, **(kwargs or {}), out_val=result))
        return result

    def _made(self, storage: Any) -> None:
        storage.born = len(self.changes)

    def _change(self, storage: Any, num_bytes: int) -> None:
        super()._change(storage, num_bytes)
        self.changes.append(num_bytes)
        self.births.append(storage.born)

    @property
    def position(self) -> int:
        """The index of the next change."""
        return len(self.changes)

    def birth_of(self, tensor: Tensor) -> int:
        """Find the change that first saw a tensor's storage."""
        known = self._storages.get(tensor.untyped_storage()._cdata)
        return UNKNOWN if known is None else known.born


@dataclass
class BoundaryLog:
    """How one unit's value leaves, and how its gradient comes back.

    Positions are indices of changes; the wire adds packing and unpacking bytes.
    """

    forward_end: int
    boundary_bytes: int
    spanned_bytes: int
    packing_bytes: int
    backward_start: int = 0
    flops_at_end: int = 0  # Of forward.
    flops_before: int | None = None  # When its gradient came.
    gradients: dict[int, int] = field(default_factory=dict)  # Bytes, by birth.
    gradient_storages: dict[int, int] = field(default_factory=dict)  # If not sent.
    unpacking_bytes: int = 0
    gradient_packing_bytes: int = 0
    crosses_alone: bool = True
    dead: frozenset[int] = frozenset()  # Which of its trained tensors got no gradient.
    held: list[Any] = field(default_factory=list)  # Their graphs, until the others do.
    outputs: tuple[tuple[int, int], ...] = ()  # Birth and bytes of each storage.
    tensors: list[TensorCost] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)  # Which of these need a gradient.

    def note_gradient(self, index: int, gradient: Tensor) -> None:
        """Note how the gradient of one of the trained tensors lies in memory."""
        place = self.trained[index]
        self.tensors[place] = with_gradient(self.tensors[place], gradient)

    @property
    def gradient_bytes(self) -> int:
        """Size of all gradients that come back."""
        return sum(self.gradients.values())


@dataclass
class SavedLog:
    """When a unit saved its last tensor for backward, and when backward first used one.

    A rerun stops where the last one was saved.
    """

    last_save: int
    flops_at_last: int
    first_use: int | None = None


class _Watched(torch.autograd.Function):
    """Pass a boundary through, and report its gradients once all are there."""

    @staticmethod
    def forward(
        ctx: Any, came: Callable[..., None], *boundary: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the boundary."""
        ctx.set_materialize_grads(False)
        ctx.came = came
        return tuple(tensor.detach() for tensor in boundary)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Report the gradients and return them."""
        ctx.came(*gradients)
        return None, *gradients


class Observed(nn.Module):
    """A segment whose unit values are logged while it trains.

    Those of a boundary that need a gradient are watched together, as a device holds
    them if it ends there: the graph of each lives until their gradients come. ``dead``
    has the places among these, by unit, of those that get none: their graph does not
    run, and only the device that ``ends_at`` the unit holds it, until the others' come.
    """

    def __init__(
        self, segment: nn.Module, meter: LoggingMeter, *, num_units: int
    ) -> None:
        super().__init__()
        self.segment = segment
        self.rereads: frozenset[str] = getattr(segment, "rereads", frozenset())
        self.meter = meter
        self._last = num_units - 1
        self.boundaries: list[BoundaryLog] = []
        self.saved: dict[int, SavedLog] = {}  # By unit
        self.dead: Mapping[int, frozenset[int]] = {}
        self.ends_at: int | None = None  # The unit after which the device ends.
        self.flops_at_start = 0

    def forward(self, inputs: Any, **how: Any) -> Any:
        """Run the segment."""
        self.boundaries.clear()
        self.saved.clear()
        self.flops_at_start = self.meter.forward_flops
        return self.segment(inputs, observe=self._observe, **how)

    def saves(self) -> saved_tensors_hooks:
        """Log what is saved for backward, and when backward uses it."""
        return saved_tensors_hooks(self._save, self._use)

    def _save(self, tensor: Tensor) -> tuple[int, Tensor]:
        index = len(self.boundaries)
        meter = self.meter
        self.saved[index] = SavedLog(meter.position, meter.forward_flops)
        # A node that saves its own result would never be freed.
        return index, tensor if tensor.grad_fn is None else tensor.detach()

    def _use(self, saved: tuple[int, Tensor]) -> Tensor:
        index, tensor = saved
        log = self.saved[index]
        if log.first_use is None:
            log.first_use = self.meter.position
        return tensor

    def _observe(self, index: int, value: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        boundary = BoundaryLog(
            forward_end=self.meter.position,
            boundary_bytes=sum(t.nbytes for t in tensors),
            spanned_bytes=sum(map(spanned_bytes, tensors)),
            packing_bytes=sum(map(packing_bytes, tensors)),
            flops_at_end=self.meter.forward_flops,
            tensors=list(map(crossing_cost, tensors)),
            trained=[i for i, tensor in enumerate(tensors) if tensor.requires_grad],
        )
        boundary.outputs = tuple(
            {t.untyped_storage()._cdata: self._storage(t) for t in tensors}.values()
        )
        self.boundaries.append(boundary)
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        if type(value) is tuple and len(trained) > 1 and index < self._last:
            boundary.crosses_alone = False
            dead = self.dead.get(index, frozenset())
            places = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
            live = [i for i in range(len(places)) if i not in dead]
            if index == self.ends_at:
                boundary.held = [tensors[places[i]].grad_fn for i in dead]
            came = partial(self._gradients_came, boundary, live, dead)
            watched = _Watched.apply(came, *(tensors[places[i]] for i in live))
            for i, tensor in zip(live, watched, strict=True):
                tensors[places[i]] = tensor
            return tuple(tensors)
        if trained:
            came = partial(self._gradients_came, boundary, [0], frozenset())
            # Torch crashes unless a view that was written to by another name is asked
            # for its graph first (pytorch #196459).
            _ = trained[0].grad_fn
            trained[0].register_hook(came)
        return value

    def _storage(self, tensor: Tensor) -> tuple[int, int]:
        return self.meter.birth_of(tensor), tensor.untyped_storage().nbytes()

    def _gradients_came(
        self,
        boundary: BoundaryLog,
        watched: Sequence[int],
        dead: frozenset[int],
        *gradients: Tensor | None,
    ) -> None:
        boundary.backward_start = self.meter.position
        boundary.flops_before = self.meter.forward_flops
        pairs = zip(watched, gradients, strict=True)
        boundary.dead = dead | {i for i, gradient in pairs if gradient is None}
        most = 0
        for index, gradient in zip(watched, gradients, strict=True):
            if gradient is None:
                continue
            boundary.note_gradient(index, gradient)
            birth = self.meter.birth_of(gradient)
            # Gradients that share memory here do not where they arrive: upper bound.
            spanned = boundary.gradients.get(birth, 0) + spanned_bytes(gradient)
            boundary.gradients[birth] = spanned
            in_place = max(spanned, gradient.untyped_storage().nbytes())
            boundary.gradient_storages[birth] = in_place
            packed = packing_bytes(gradient)
            boundary.gradient_packing_bytes += packed
            most = max(most, boundary.gradient_bytes + packed)
        boundary.unpacking_bytes = most - boundary.gradient_bytes
        boundary.held.clear()


def _end_without_inputs(
    boundaries: list[BoundaryLog], changes: npt.NDArray[np.int64]
) -> None:
    """End each unit when the value it was given is gone, as before a copy is sent.

    A unit is observed while its input still lives. The next change frees that input, if
    nothing else holds it; whatever the next unit does begins with an allocation.
    """
    limits = [after.forward_end for after in boundaries[1:]] + [len(changes)]
    for boundary, limit in zip(boundaries, limits, strict=True):
        while boundary.forward_end < limit and changes[boundary.forward_end] <= 0:
            boundary.forward_end += 1


@dataclass(frozen=True)
class Used:
    """What the step used, and when updates ran.

    ``trained`` and ``constants`` are names of parameters and of other tensors;
    ``loss_bytes`` is what the loss keeps between steps, such as class weights.
    """

    trained: frozenset[str]
    constants: frozenset[str]
    steps_in_backward: bool
    loss_bytes: int = 0
    sparse: Mapping[str, int] = field(default_factory=dict)  # Values of such gradients


class StepLog:
    """What a later training step of a whole chain did to memory.

    ``changes`` are bytes, ``births`` the change that first saw each one's storage.
    """

    def __init__(
        self,
        observed: Observed,
        *,
        start: int,
        backward_end: int,
        batch_bytes: int,
        passing_peaks: list[int],
        used: Used,
    ) -> None:
        meter, boundaries = observed.meter, list(observed.boundaries)
        self.peak_bytes = meter.peak_bytes  # Of all steps so far: the whole route's.
        self.batch_bytes = batch_bytes  # With the targets.
        self.passing_peaks = passing_peaks  # Of each forward, if it saves nothing.
        self.trained, self.constants = used.trained, used.constants
        self.steps_in_backward = used.steps_in_backward
        self.loss_bytes, self.sparse = used.loss_bytes, used.sparse
        self.changes = np.array(meter.changes, dtype=np.int64)
        self.births = np.array(meter.births, dtype=np.int64)
        _end_without_inputs(boundaries, self.changes)
        self.boundaries, self.saved = boundaries, dict(observed.saved)
        for boundary in boundaries[:-1]:
            if not boundary.gradients:  # All units before it are frozen.
                boundary.backward_start = backward_end
        self.start = start
        self.backward_end = backward_end
        self._flops_at_start = observed.flops_at_start
        self._all_flops = meter.forward_flops
        self.optimizer_temporary_bytes = highest(self.changes[backward_end:])

    @property
    def num_units(self) -> int:
        """The length of the chain."""
        return len(self.boundaries)

    def boundary_bytes(self, index: int) -> int:
        """Size of the boundary after a unit."""
        return self.boundaries[index].boundary_bytes

    def forward_of(self, index: int) -> slice:
        """Find the changes of a unit's forward."""
        start = self.boundaries[index - 1].forward_end if index else self.start
        return slice(start, self.boundaries[index].forward_end)

    def born_in(self, part: slice) -> npt.NDArray[np.bool_]:
        """Mark the changes of storages that were first seen in a part of the step."""
        is_born = (self.births >= part.start) & (self.births < part.stop)
        return np.asarray(is_born, dtype=np.bool_)

    def sum_bytes(self, until: int, mine: npt.NDArray[np.bool_]) -> int:
        """Sum the marked changes from the step's start to a position."""
        part = slice(self.start, until)
        return int(self.changes[part][mine[part]].sum())

    def saved_bytes(self, index: int) -> int:
        """Size of what a unit's forward allocates and keeps for backward."""
        mine = self.born_in(self.forward_of(index))
        return self.sum_bytes(self.boundaries[-1].forward_end, mine)

    def waiting_bytes(self, index: int) -> int:
        """Size of the activations held while later units run.

        The boundary is dropped once sent; only what backward needs of it counts.
        """
        boundary = self.boundaries[index]
        if not boundary.gradients:
            return 0
        from_forward = self.born_in(slice(self.start, boundary.forward_end))
        return self.sum_bytes(boundary.backward_start, from_forward)

    def flops_of(self, index: int) -> tuple[int, int]:
        """Count the FLOPs of a unit's forward, and up to the last tensor it saves."""
        before = (
            self.boundaries[index - 1].flops_at_end if index else self._flops_at_start
        )
        saved = self.saved.get(index)
        until = before if saved is None else saved.flops_at_last
        return self.boundaries[index].flops_at_end - before, until - before

    def rerun_flops(self, index: int) -> int:
        """Count the FLOPs of the reruns in a unit's backward."""
        marks = [boundary.flops_before for boundary in self.boundaries[: index + 1]]
        first, last = (
            self._all_flops if mark is None else mark
            for mark in (marks[-1], marks[-2] if index else None)
        )
        return last - first

    def return_bytes(self, index: int, optimizer_temporary_bytes: int) -> int:
        """Find the peak of a place that runs all units from one to the last.

        Without parameters, buffers and optimizer state; the incoming boundary counts to
        the end. No route returns to the first unit.
        """
        if index == 0:
            return 0
        boundary = self.boundaries[index - 1]
        start, end = boundary.forward_end, boundary.backward_start
        changes = self.changes[start:end][self.births[start:end] >= start]
        entered = boundary.spanned_bytes
        is_sparse = boundary.packing_bytes > 0
        left = self.left_bytes(index)
        return max(
            entered + (boundary.boundary_bytes if is_sparse else 0),
            entered + highest(changes),
            left + optimizer_temporary_bytes,
            left + boundary.gradient_packing_bytes,
        )

    def leaving_bytes(self, index: int) -> int:
        """Size of what a forward that ends with a unit has made and not yet freed."""
        forward = slice(self.start, self.boundaries[index].forward_end)
        made = self.changes[forward][self.births[forward] >= self.start]
        return int(made.sum())

    def left_bytes(self, index: int) -> int:
        """Size of what a place that runs all units from one on holds after backward.

        What came counts to the end; nothing comes to the first unit.
        """
        if index == 0:
            return 0
        boundary = self.boundaries[index - 1]
        return boundary.spanned_bytes + self._left_bytes(boundary)

    def _left_bytes(self, boundary: BoundaryLog) -> int:
        """Size of all gradients and the loss when the backward of a tail is over."""
        changes = self.changes[boundary.forward_end : self.backward_end]
        births = self.births[boundary.forward_end : self.backward_end]
        mine = (births >= boundary.forward_end) & (births < boundary.backward_start)
        goes_back = np.isin(births, list(boundary.gradients))
        is_over = (
            np.arange(births.size) >= boundary.backward_start - boundary.forward_end
        )
        return int(changes[mine & ~(goes_back & is_over)].sum())

    def head_bytes(self, index: int, optimizer_temporary_bytes: int) -> int:
        """Find the peak of a device that ends with a unit.

        Without parameters, buffers, optimizer state and batch.
        """
        boundary = self.boundaries[index]
        forward = slice(self.start, boundary.forward_end)
        births, from_forward = self.births, self.born_in(forward)
        made = self.changes[forward][births[forward] >= self.start]
        going = max(highest(made), int(made.sum()) + boundary.packing_bytes)
        if not boundary.gradients:
            return going
        held = self.waiting_bytes(index)
        backward = slice(boundary.backward_start, self.backward_end)
        from_backward = births >= boundary.backward_start
        changes, is_gradient = as_arrived(
            boundary.gradients, self.changes[backward], births[backward]
        )
        changes = changes[(from_forward | from_backward)[backward] | is_gradient]
        arrived = held + boundary.gradient_bytes
        left = arrived + int(changes.sum())
        return max(
            going,
            arrived + boundary.unpacking_bytes,
            arrived + highest(changes),
            left + optimizer_temporary_bytes,
        )


def as_arrived(
    gradients: Mapping[int, int],
    changes: npt.NDArray[np.int64],
    births: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Give gradients their arrived sizes; mark the changes that are theirs."""
    changes = changes.copy()
    for birth, size in gradients.items():
        changes[births == birth] = -size
    return changes, np.isin(births, list(gradients))


def highest(changes: npt.NDArray[np.int64]) -> int:
    """Find the highest running sum, at least 0."""
    return max(0, int(np.cumsum(changes).max(initial=0)))
