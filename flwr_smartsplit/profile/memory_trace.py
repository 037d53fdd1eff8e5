"""What a step of a whole chain does to memory: every change, and what adds up.

A device that holds units ``[0, cut)`` makes and frees the same storages in the same
order as the whole chain does in those units: autograd runs what was recorded last
first, so all of the rest is done when a boundary's gradient is there, and
``SegmentRunner`` holds neither boundary nor gradient. So one log tells the peak of
every cut. What differs is added: how the gradient arrives, and whose optimizer runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.split.activation_checkpointing import has_statistics
from flwr_smartsplit.split.layout import is_dense, num_spanned

UNKNOWN = -1


class LoggingMeter(MemoryMeter):
    """A meter that writes down every change, and which storage changed.

    Attributes
    ----------
    forward_flops : int
        Floating-point operations so far that a graph was made of; in backward these
        are what runs again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward_flops = 0
        self.changes: list[int] = []
        self.births: list[int] = []  # The change that first saw the storage.

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator as a meter does, and count its FLOPs in forward."""
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
        """The number of the next change."""
        return len(self.changes)

    def birth_of(self, tensor: Tensor) -> int:
        """Find the change that first saw a tensor's storage."""
        known = self._storages.get(tensor.untyped_storage()._cdata)
        return UNKNOWN if known is None else known.born


@dataclass
class BoundaryLog:
    """How the value of one unit goes out, and how its gradient comes back.

    Positions are numbers of changes; bytes are what the wire adds to them.
    """

    forward_end: int
    boundary_bytes: int
    spanned_bytes: int
    packing_bytes: int
    backward_start: int = 0
    flops_before: int | None = None  # Forward's, when its gradient came.
    gradients: dict[int, int] = field(default_factory=dict)  # Bytes, by birth.
    gradient_storages: dict[int, int] = field(default_factory=dict)  # Where it stays.
    unpacking_bytes: int = 0  # On arrival; and what packing them takes:
    gradient_packing_bytes: int = 0
    crosses_alone: bool = True
    outputs: tuple[tuple[int, int], ...] = ()  # Birth and bytes of each storage.
    changes_tensors: bool = False

    @property
    def gradient_bytes(self) -> int:
        """Size of all gradients that come back."""
        return sum(self.gradients.values())


class _Watched(torch.autograd.Function):
    """Let a boundary pass, and tell of its gradients when all of them are there."""

    @staticmethod
    def forward(
        ctx: Any, came: Callable[..., None], *boundary: Tensor
    ) -> tuple[Tensor, ...]:
        """Hand the boundary on."""
        ctx.set_materialize_grads(False)
        ctx.came = came
        return tuple(tensor.detach() for tensor in boundary)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Tell of the gradients, and hand them on."""
        ctx.came(*gradients)
        return None, *gradients


class Observed(nn.Module):
    """A segment that tells a log of its units' values while it trains."""

    def __init__(
        self, segment: nn.Module, meter: LoggingMeter, *, num_units: int
    ) -> None:
        super().__init__()
        self.segment = segment
        self.meter = meter
        self._last = num_units - 1
        self.boundaries: list[BoundaryLog] = []
        self._changeable = _changeable(segment)
        self._versions: list[tuple[int, int]] = []

    def forward(self, inputs: Any, **how: Any) -> Any:
        """Run the segment."""
        self.boundaries.clear()
        self._versions = _versions(self._changeable)
        return self.segment(inputs, observe=self._observe, **how)

    def _observe(self, index: int, value: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        boundary = BoundaryLog(
            forward_end=self.meter.position,
            boundary_bytes=sum(t.numel() * t.element_size() for t in tensors),
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
        versions = _versions(self._changeable)
        boundary.changes_tensors = versions != self._versions
        self._versions = versions
        boundary.outputs = tuple(
            {t.untyped_storage()._cdata: self._storage(t) for t in tensors}.values()
        )
        self.boundaries.append(boundary)
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        came = partial(self._gradients_came, boundary)
        if type(value) is tuple and len(trained) > 1 and index < self._last:
            boundary.crosses_alone = False
            watched = iter(_Watched.apply(came, *trained))
            return tuple(next(watched) if t.requires_grad else t for t in tensors)
        if trained:
            trained[0].register_hook(came)
        return value

    def _storage(self, tensor: Tensor) -> tuple[int, int]:
        return self.meter.birth_of(tensor), tensor.untyped_storage().nbytes()

    def _gradients_came(self, boundary: BoundaryLog, *gradients: Tensor | None) -> None:
        boundary.backward_start = self.meter.position
        boundary.flops_before = self.meter.forward_flops
        most = 0
        for gradient in gradients:
            if gradient is None:
                continue
            shape, strides = tuple(gradient.shape), gradient.stride()
            size, birth = gradient.element_size(), self.meter.birth_of(gradient)
            # Those that share memory do not where they arrive: at most, this is it.
            spanned = (
                boundary.gradients.get(birth, 0) + num_spanned(shape, strides) * size
            )
            boundary.gradients[birth] = spanned
            in_place = max(spanned, gradient.untyped_storage().nbytes())
            boundary.gradient_storages[birth] = in_place
            packed = 0 if is_dense(shape, strides) else gradient.numel() * size
            boundary.gradient_packing_bytes += packed
            most = max(most, boundary.gradient_bytes + packed)
        boundary.unpacking_bytes = most - boundary.gradient_bytes


_Place = tuple[dict[str, Any], str]


def _changeable(segment: nn.Module) -> list[_Place]:
    """Find where the tensors are that a forward may change, or put others in place.

    Running statistics are left out: a unit that runs twice does not update them twice.
    """
    return [
        (values, name)
        for module in segment.modules()
        for values in (module._buffers, vars(module))
        if values is not module._buffers or not has_statistics(module)
        for name, value in values.items()
        if isinstance(value, Tensor)
    ]


def _versions(places: list[_Place]) -> list[tuple[int, int]]:
    """Take which tensor each is, and how often it was changed."""
    tensors = [values.get(name) for values, name in places]
    return [(id(tensor), getattr(tensor, "_version", 0)) for tensor in tensors]


@dataclass(frozen=True)
class Used:
    """Names of what a step trained and of the constants it saw, and how it updated."""

    trained: frozenset[str]
    constants: frozenset[str]
    steps_in_backward: bool


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
        What the optimizer's last step made beyond what was there before it.
    steps_in_backward : bool
        Whether large parameters were stepped inside backward.
    changes, births : ndarray
        Bytes of each change, and the change that first saw the storage.
    boundaries : list[BoundaryLog]
        How the value of each unit went out and its gradient came back.
    start, backward_end : int
        The changes where the step began and where its backward was over.
    """

    def __init__(
        self,
        meter: LoggingMeter,
        boundaries: list[BoundaryLog],
        *,
        start: int,
        backward_end: int,
        batch_bytes: int,
        used: Used,
    ) -> None:
        self.peak_bytes = meter.peak_bytes
        self.batch_bytes = batch_bytes
        self.trained, self.constants = used.trained, used.constants
        self.steps_in_backward = used.steps_in_backward
        self.changes = np.array(meter.changes, dtype=np.int64)
        self.births = np.array(meter.births, dtype=np.int64)
        self.boundaries = boundaries
        for boundary in boundaries[:-1]:
            if not boundary.gradients:  # It is frozen up to there.
                boundary.backward_start = backward_end
        self.start = start
        self.backward_end = backward_end
        self._all_flops = meter.forward_flops
        self.optimizer_temporary_bytes = highest(self.changes[backward_end:])

    @property
    def num_units(self) -> int:
        """The length of the chain."""
        return len(self.boundaries)

    def boundary_bytes(self, index: int) -> int:
        """Size of what crosses the boundary after a unit."""
        return self.boundaries[index].boundary_bytes

    def saved_bytes(self, index: int) -> int:
        """Size of what a unit's forward makes and backward finds."""
        first = self.boundaries[index - 1].forward_end if index else self.start
        last = self.boundaries[index].forward_end
        forward = slice(self.start, self.boundaries[-1].forward_end)
        births = self.births[forward]
        mine = (births >= first) & (births < last)
        return int(self.changes[forward][mine].sum())

    def waiting_bytes(self, index: int) -> int:
        """Size of the activations that wait while the units after one do their step.

        The boundary is dropped once sent; what backward needs of it is still held.
        """
        boundary = self.boundaries[index]
        if not boundary.gradients:
            return 0
        until = slice(self.start, boundary.backward_start)
        births = self.births[until]
        from_forward = (births >= self.start) & (births < boundary.forward_end)
        return int(self.changes[until][from_forward].sum())

    def rerun_flops(self, index: int) -> int:
        """Count what ran forward again in a unit's backward, in FLOPs."""
        marks = [boundary.flops_before for boundary in self.boundaries[: index + 1]]
        first, last = (
            self._all_flops if mark is None else mark
            for mark in (marks[-1], marks[-2] if index else None)
        )
        return last - first

    def return_bytes(self, index: int, optimizer_temporary_bytes: int) -> int:
        """Find the most a place holds that runs all units from one to the last.

        What stays is not counted; the boundary that comes in is held to the end. No
        route comes back for the first unit.
        """
        if index == 0:
            return 0
        boundary = self.boundaries[index - 1]
        start, end = boundary.forward_end, boundary.backward_start
        changes = self.changes[start:end][self.births[start:end] >= start]
        entered = boundary.spanned_bytes
        is_sparse = boundary.packing_bytes > 0
        left = entered + self._left_bytes(boundary)
        return max(
            entered + (boundary.boundary_bytes if is_sparse else 0),
            entered + highest(changes),
            left + optimizer_temporary_bytes,
            left + boundary.gradient_packing_bytes,
        )

    def _left_bytes(self, boundary: BoundaryLog) -> int:
        """Size of what a place that ends the route has made when its backward is over.

        That is the gradients, the boundary's with them, and the loss.
        """
        changes = self.changes[boundary.forward_end : self.backward_end]
        births = self.births[boundary.forward_end : self.backward_end]
        mine = (births >= boundary.forward_end) & (births < boundary.backward_start)
        goes_back = np.isin(births, list(boundary.gradients))
        is_over = (
            np.arange(births.size) >= boundary.backward_start - boundary.forward_end
        )
        return int(changes[mine & ~(goes_back & is_over)].sum())

    def head_bytes(self, index: int, optimizer_temporary_bytes: int) -> int:
        """Find the most a device that ends with a unit holds besides what stays.

        What stays, namely parameters, buffers, optimizer state and batch, is not
        counted.
        """
        boundary = self.boundaries[index]
        forward = slice(self.start, boundary.forward_end)
        births = self.births
        from_forward = (births >= self.start) & (births < boundary.forward_end)
        sending = int(self.changes[forward][births[forward] >= self.start].sum())
        going = max(self._forward_highest(forward), sending + boundary.packing_bytes)
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

    def _forward_highest(self, forward: slice) -> int:
        return highest(self.changes[forward][self.births[forward] >= self.start])


def as_arrived(
    gradients: Mapping[int, int],
    changes: npt.NDArray[np.int64],
    births: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Give gradients the sizes that they arrived with; say which changes are theirs."""
    changes = changes.copy()
    for birth, size in gradients.items():
        changes[births == birth] = -size
    return changes, np.isin(births, list(gradients))


def highest(changes: npt.NDArray[np.int64]) -> int:
    """Find the highest sum of the first changes, or none of them."""
    return max(0, int(np.cumsum(changes).max(initial=0)))
