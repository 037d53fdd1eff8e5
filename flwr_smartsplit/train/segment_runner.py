"""SegmentRunner: a segment's part of each training step, and its evaluation.

One class serves every place: the head on a device, a tail on an edge, the whole model,
and the dry run that predicts their memory.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flwr_smartsplit.memory.meter import phase
from flwr_smartsplit.split.segment import (
    Batch,
    Boundary,
    Streams,
    as_boundary,
    no_streams,
)
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.grad_clipping import (
    NormsInBackward,
    clip_gradients,
    gradient_norms,
)
from flwr_smartsplit.train.lr_schedule import scheduler_of
from flwr_smartsplit.train.metric_names import metric_values
from flwr_smartsplit.train.optimizer_in_backward import (
    GradientEntry,
    GradientExit,
    bare_step,
    free_gradients,
    stepping_in_backward,
    steps_one_by_one,
)
from flwr_smartsplit.train.torch_device import CPU, function_on, in_this_thread
from flwr_smartsplit.types import KEEP_ALL, WHOLE_BATCH, MicroBatch

Gradients = tuple[Tensor, ...]


class SegmentRunner:
    """Train or evaluate one segment at one place.

    The segment's parameters are updated in place; ``config`` goes to the task's
    ``schedule_fn``. ``steps_in_backward`` updates large parameters inside backward,
    which frees their gradients early, where that is exact. ``recompute`` may change
    between two steps. ``notes_norms`` keeps the norm of each gradient of a step, which
    ``gradient_norms`` then returns.

    A step ends with an update, after the last micro-batch if the task accumulates. If
    the task clips by the common norm, the caller calls ``update(norm)``, since part of
    that norm may come from elsewhere.
    """

    def __init__(  # noqa: PLR0913 - what runs, and how
        self,
        segment: nn.Module,
        task: Task,
        *,
        streams: Streams = no_streams,
        config: Mapping[str, Any] | None = None,
        is_trained: bool = True,
        steps_in_backward: bool = False,
        notes_norms: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.segment = segment if device == CPU else segment.to(device)
        self._loss_fn = function_on(task.loss_fn, device)
        self._metrics_fn = function_on(task.metrics_fn, device)
        self.device = device
        self.task = task
        self.recompute = KEEP_ALL
        self._streams = streams
        parameters = [p for p in segment.parameters() if p.requires_grad]
        needs_one = is_trained and bool(parameters)
        self.optimizer = optimizer_of(task, parameters) if needs_one else None
        self._scheduler = scheduler_of(self.optimizer, task, config or {})
        self.steps_in_backward = (
            steps_in_backward
            and self.optimizer is not None
            and task.max_gradient_norm is None  # Clipping needs all gradients first.
            and steps_one_by_one(self.optimizer)
        )
        self._norms = NormsInBackward(segment) if notes_norms else None
        self._reread = reread_ones(segment)
        self._is_in_training = False  # The segment's mode, as it was set here
        self._part = WHOLE_BATCH
        self._num_evaluated = 0
        self._entry: GradientEntry | None = None
        self._input_gradients: list[Tensor] = []
        # For each tensor of the last outgoing boundary
        self.blocks: tuple[bool, ...] = ()

    @property
    def entering(self) -> tuple[bool, ...]:
        """Say for each incoming tensor whether it needs a gradient."""
        return cast(tuple[bool, ...], self.segment.entering_gradients)

    @property
    def leaving(self) -> tuple[bool, ...]:
        """Say for each outgoing tensor whether it needs a gradient."""
        return cast(tuple[bool, ...], self.segment.leaving_gradients)

    def forward(
        self,
        inputs: Batch,
        *,
        step: int,
        inputs_are_boundary: bool,
        part: MicroBatch = WHOLE_BATCH,
    ) -> Boundary:
        """Start a step: run forward, keep the graph, return the detached boundary.

        ``inputs_are_boundary`` says whether gradients go back to where the inputs came
        from. ``blocks`` then says of what the outgoing tensors let no gradient through.
        """
        outputs = self._run(inputs, step, inputs_are_boundary, part)
        boundary = as_boundary(outputs)
        self.blocks = tuple(map(blocks_gradient, boundary))
        trained = [tensor for tensor in boundary if tensor.requires_grad]
        self._entry = GradientEntry(trained)
        return tuple(tensor.detach() for tensor in boundary)

    def backward(self, receive: Callable[[], Gradients]) -> Gradients:
        """End a step from the gradients of its outgoing boundary, and update.

        ``receive`` returns the gradients of those outgoing tensors that need one, in
        order; an empty tensor stands for none. The engine calls it when it needs them,
        if at all. Returns the same for the incoming tensors; ``()`` where nothing goes
        back.
        """
        entry, self._entry = self._entry, None
        if entry is None:
            raise RuntimeError("backward without forward: the step has no graph.")
        with phase("backward"), in_this_thread(), self._stepping_in_backward():
            entry.backward(receive)
        del entry
        return self._end()

    def finish(
        self,
        inputs: Batch,
        targets: Any,
        *,
        step: int,
        inputs_are_boundary: bool,
        part: MicroBatch = WHOLE_BATCH,
    ) -> tuple[Tensor, Gradients]:
        """Run a whole step where the route ends: forward, loss, backward, update.

        Returns the detached mean loss, and gradients as ``backward`` does.
        """
        outputs = self._run(inputs, step, inputs_are_boundary, part)
        with phase("loss"), autocast_of(self.task, self.device):
            loss = self._loss_fn(outputs, targets)
            if loss.untyped_storage().nbytes() > loss.nbytes:
                # Some losses return a view of the storage of all their terms.
                loss = loss.clone()
            scaled = loss if part.count == 1 else loss / part.loss_divisor
        del outputs  # The graph holds what backward needs.
        with phase("backward"), in_this_thread(), self._stepping_in_backward():
            scaled.backward()
        del scaled
        loss = loss.detach()  # This frees the graph.
        return loss, self._end()

    def guard_loss(self, check: Callable[[Any, Any], None]) -> None:
        """Have ``check(outputs, targets)`` called before each loss."""
        loss_fn = self._loss_fn

        def guarded(outputs: Any, targets: Any) -> Tensor:
            check(outputs, targets)
            loss: Tensor = loss_fn(outputs, targets)
            return loss

        self._loss_fn = guarded

    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of each gradient of a step, before they are clipped.

        Only if the update waits for them, or if they are to be noted.
        """
        if not self._part.is_last:
            return {}
        if self.task.max_gradient_norm is not None:
            return gradient_norms(self.segment)
        return {} if self._norms is None else self._norms.taken()

    def update(self, norm: float | None = None) -> None:
        """Step the optimizer and its schedule; automatic unless the task clips.

        ``norm`` is that of all gradients of the model, to clip these by.
        """
        if self.optimizer is None:
            return
        with phase("optimizer"):
            if norm is not None and self.task.max_gradient_norm is not None:
                max_norm = self.task.max_gradient_norm
                clip_gradients(self.segment, max_norm=max_norm, norm=norm)
            bare_step(self.optimizer)()
            if self._scheduler is not None:
                self._scheduler.step()

    def release_gradients(self) -> None:
        """Free the gradients when other work comes before the next step."""
        if self.optimizer is not None:
            free_gradients(self.optimizer)

    @torch.no_grad()
    def evaluate(self, inputs: Batch) -> Any:
        """Run the segment forward in evaluation mode, without a graph."""
        self.segment.eval()
        self._is_in_training = False
        self.blocks = ()
        with phase("forward"), autocast_of(self.task, self.device):
            self._num_evaluated += 1
            step = f"evaluate {self._num_evaluated}"
            return self.segment(inputs, streams=self._streams, step=step)

    @torch.no_grad()
    def assess(self, outputs: Any, targets: Any) -> dict[str, float]:
        """Compute loss and metrics of the outputs."""
        with autocast_of(self.task, self.device):
            values = {"loss": float(self._loss_fn(outputs, targets))}
            if self._metrics_fn is not None:
                values |= metric_values(self._metrics_fn(outputs, targets))
        return values

    def _run(
        self, inputs: Batch, step: int, inputs_are_boundary: bool, part: MicroBatch
    ) -> Any:
        if not self._is_in_training:
            self.segment.train()
            self._is_in_training = True
        self._entry, self._part = None, part
        if part.is_first:
            self.release_gradients()
        self._input_gradients.clear()
        if inputs_are_boundary:
            inputs = self._leaf(inputs)
        with phase("forward"), autocast_of(self.task, self.device):
            return self.segment(
                inputs,
                streams=self._streams,
                step=part.in_step(step),
                recompute=self.recompute,
                loss_divisor=part.loss_divisor,
            )

    def _stepping_in_backward(self) -> AbstractContextManager[None]:
        # Accumulated gradients live until the last micro-batch anyway.
        is_part = self._part.count > 1
        if self.optimizer is None or not self.steps_in_backward or is_part:
            return nullcontext()
        # Backward may still read these after their gradient has arrived.
        return stepping_in_backward(self.optimizer, self._reread, see=self._norms)

    def _leaf(self, inputs: Batch) -> Batch:
        """Start the graph at a boundary, and collect its gradients."""
        if isinstance(inputs, dict):
            raise TypeError("a boundary is a tensor or a tuple, not a mapping.")
        boundary = inputs if isinstance(inputs, tuple) else (inputs,)
        flags = self.entering
        if any(flags):
            trained = itertools.compress(boundary, flags)
            trigger = torch.empty(0, requires_grad=True)
            leaves = iter(GradientExit.apply(trigger, self._input_gradients, *trained))
            boundary = tuple(
                next(leaves) if flag else tensor
                for tensor, flag in itertools.zip_longest(boundary, flags)
            )
        return boundary if len(boundary) > 1 else boundary[0]

    def _end(self) -> Gradients:
        """Update unless the task clips; return the gradients that go back."""
        if self.task.max_gradient_norm is None and self._part.is_last:
            if self._norms is not None:
                self._norms.rest()
            self.update()
        gradients = tuple(self._input_gradients)
        self._input_gradients.clear()
        return gradients


_RELUS = frozenset({"ReluBackward0", "HardtanhBackward0"})
# They pass each gradient on to one value, which is the one that crosses.
_PASSING = frozenset(
    {
        *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"),
        *("MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0"),
    }
)


def blocks_gradient(tensor: Tensor) -> bool:
    """Say whether no gradient passes a tensor where it is +0, as behind a ReLU.

    It is read off the graph: the tensor is the result of a ReLU or ReLU6, or a max-pool
    of one.
    """
    node: Any = tensor.grad_fn
    if node is None or tensor.retains_grad or tensor._backward_hooks:
        return False
    while node is not None and node.name() in _PASSING:
        node = node.next_functions[0][0]
    if node is None or node.name() not in _RELUS:
        return False
    least = getattr(node, "_saved_min_val", 0)  # Of a hardtanh, which ReLU6 is.
    return bool(least == 0)


def reread_ones(segment: nn.Module) -> list[nn.Parameter]:
    """List the parameters whose values a segment also reads without a gradient."""
    names = cast(frozenset[str], getattr(segment, "rereads", frozenset()))
    known = dict(segment.named_parameters(remove_duplicate=False))
    return [
        parameter
        for name, parameter in known.items()
        if name in names or name.removeprefix("segment.") in names
    ]


def optimizer_of(task: Task, parameters: Sequence[nn.Parameter]) -> Optimizer | None:
    """Build the task's optimizer; None if it takes none of the parameters.

    An ``optimizer_fn`` may choose, for instance matrices only.
    """
    try:
        return task.optimizer_fn(parameters)
    except ValueError as error:
        if "empty parameter list" not in str(error):
            raise
        return None


def autocast_of(task: Task, device: torch.device = CPU) -> AbstractContextManager[Any]:
    """Enable mixed precision if the task asks for it."""
    dtype = task.autocast_dtype
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
