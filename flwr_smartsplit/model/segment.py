"""Segment and SegmentRunner: some units of a chain, and their part of a step.

One runner serves every place: the head on a device, a tail on an edge, the whole
model. It lives beside the cost model because a prediction is a dry run of it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flwr_smartsplit.model.clipping import clip_gradients, gradient_norms
from flwr_smartsplit.model.lean import (
    GradientEntry,
    GradientExit,
    steps_one_by_one,
    update_early,
)
from flwr_smartsplit.model.memory import phase
from flwr_smartsplit.model.recompute import (
    Observer,
    Passage,
    observe_nothing,
    run_units,
)
from flwr_smartsplit.model.schedule import scheduler_of
from flwr_smartsplit.model.sharing import share
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import KEEP_ALL, RecomputePlan

Streams = Callable[[int, int], AbstractContextManager[None]]
"""``streams(step, unit)`` opens the random stream that unit runs under."""

Boundary = tuple[Tensor, ...]
"""The tensor that a gradient comes back for, then its context: tensors that travel
along and need no gradient, such as an attention mask."""

Batch = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def no_streams(step: int, unit: int) -> AbstractContextManager[None]:
    """Leave torch's generator as it is."""
    del step, unit
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of a model that is not cut.

    Parameters
    ----------
    name : str
        Its name in the chain: the model's own name of its last module or operation.
    forward : Callable
        ``forward(root, *values)``: ``root`` has the modules of ``reads`` under the
        model's own names; the values are the batch (by keyword if it is a mapping),
        or what the unit before returned: one tensor, or a tuple of one tensor that
        needs a gradient and others that do not.
    reads : tuple[str, ...]
        Dotted names of the modules, parameters and constants it uses.
    eval_forward : Callable, optional
        What it does in evaluation mode, if that is other code.
    is_random : bool
        Whether it draws random numbers in training.
    light_forward : Callable, optional
        What it does in training if its cheap operators run twice: the same values,
        gradients and buffers, with less kept for backward.

    Examples
    --------
    >>> unit = Unit("embed", lambda root, tokens: root.table(tokens), ("table",))
    >>> unit.name
    'embed'
    """

    name: str
    forward: Callable[..., Any]
    reads: tuple[str, ...]
    eval_forward: Callable[..., Any] | None = None
    is_random: bool = False
    light_forward: Callable[..., Any] | None = None

    def forward_in(
        self, training: bool, *, is_light: bool = False
    ) -> Callable[..., Any]:
        """Return what it does in one mode."""
        if not training:
            return self.eval_forward or self.forward
        return (self.light_forward if is_light else None) or self.forward


class Segment(nn.Module):
    """Units ``[start, stop)`` of a chain, as a module with the model's own names.

    Parameters
    ----------
    units : Sequence[Unit]
        The units, in order.
    start : int
        Index of the first of them in the chain.
    source : nn.Module
        The model whose modules and parameters the segment shares.
    odd_modes : Mapping[bool, frozenset[str]]
        For ``train(mode)``, the modules that the model leaves in the other mode.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        start: int,
        source: nn.Module,
        odd_modes: Mapping[bool, frozenset[str]] | None = None,
    ) -> None:
        super().__init__()
        # Mangled names, because the model's own children stand beside them.
        self.__units = tuple(units)
        self.__start = start
        for target in sorted({name for unit in units for name in unit.reads}):
            share(source, self, target.split("."))
        mine = {name for name, _ in self.named_modules()}
        self.__odd_modes = {
            mode: names & mine for mode, names in (odd_modes or {}).items()
        }

    def train(self, mode: bool = True) -> Self:
        """Switch as the model does, which may keep some modules in the other mode."""
        super().train(mode)
        for name in self.__odd_modes.get(mode, ()):
            self.get_submodule(name).training = not mode
        return self

    def forward(
        self,
        inputs: Batch,
        *,
        streams: Streams = no_streams,
        step: int = 0,
        observe: Observer = observe_nothing,
        recompute: RecomputePlan = KEEP_ALL,
    ) -> Any:
        """Run the units in order, each random one under its own stream.

        Parameters
        ----------
        inputs : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
            The batch, or the boundary that enters the segment.
        streams : Streams
            Opens the random stream of a unit.
        step : int
            Number of the training step, from 0.
        observe : Observer
            Is told the value of each unit.
        recompute : RecomputePlan
            What keeps nothing, or less, and runs again in backward.
        """
        training, first = self.training, self.__start
        plan = recompute.within(first, first + len(self.__units))

        def run(index: int, value: Any) -> Any:
            unit = self.__units[index - first]
            do = unit.forward_in(training, is_light=index in plan.light)
            if training and unit.is_random:
                with streams(step, index):
                    return run_unit(do, self, value)
            return run_unit(do, self, value)

        units = range(first, first + len(self.__units))
        reruns = plan.reruns if training else ()
        passage = Passage(run, self, observe, preserves_chance=streams is no_streams)
        return run_units(inputs, units, reruns, passage)


def as_boundary(outputs: Any) -> Boundary:
    """Take what a segment returns as a boundary, with its context if it has one."""
    return outputs if type(outputs) is tuple else (outputs,)


def run_unit(run: Callable[..., Any], root: nn.Module, value: Any) -> Any:
    """Hand a unit a batch or a boundary as arguments."""
    if type(value) is dict:
        return run(root, **value)
    if type(value) is tuple:
        return run(root, *value)
    return run(root, value)


class SegmentRunner:
    """Train or evaluate one segment at one place.

    Parameters
    ----------
    segment : Segment
        What runs here; its parameters are updated in place.
    task : Task
        Supplies the loss and the optimizer.
    streams : Streams
        Opens the random stream of a unit.
    config : Mapping[str, Any], optional
        What the task's ``schedule_fn`` is told.
    is_trained : bool
        Whether it needs an optimizer; evaluation does not.
    is_lean : bool
        Whether large parameters are stepped inside backward, which frees their
        gradients at once and costs a little time. Only done where it is exact.

    Attributes
    ----------
    recompute : RecomputePlan
        What runs twice in a training step; may be set anew between two steps.

    Notes
    -----
    A step ends with an update. If the task clips gradients by their common norm, the
    update waits for ``update(norm)``, since part of that norm may lie elsewhere.
    """

    def __init__(
        self,
        segment: nn.Module,
        task: Task,
        *,
        streams: Streams = no_streams,
        config: Mapping[str, Any] | None = None,
        is_trained: bool = True,
        is_lean: bool = False,
    ) -> None:
        self.segment = segment
        self.task = task
        self.recompute = KEEP_ALL
        self._streams = streams
        parameters = [p for p in segment.parameters() if p.requires_grad]
        needs_one = is_trained and bool(parameters)
        self.optimizer = task.optimizer_fn(parameters) if needs_one else None
        self._scheduler = scheduler_of(self.optimizer, task, config or {})
        self.is_early = is_lean and _can_be_early(self.optimizer, task)
        if self.is_early and self.optimizer is not None:
            update_early(self.optimizer)
        self._entry: Tensor | None = None
        self._receive: list[Callable[[], Tensor]] = []
        self._input_gradients: list[Tensor] = []

    def forward(
        self, inputs: Batch, *, step: int, inputs_are_boundary: bool
    ) -> Boundary:
        """Start a step: run the segment forward and keep its graph.

        Parameters
        ----------
        inputs : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
            The batch, or the boundary that entered.
        step : int
            Number of the step, from 0.
        inputs_are_boundary : bool
            Whether a gradient has to go back to where the inputs came from.

        Returns
        -------
        Boundary
            The outgoing boundary, detached; the runner does not hold it.
        """
        outputs = self._run(inputs, step, inputs_are_boundary)
        boundary = as_boundary(outputs)
        self._entry = GradientEntry.apply(boundary[0], self._receive)
        return tuple(tensor.detach() for tensor in boundary)

    def backward(self, receive: Callable[[], Tensor]) -> Tensor | None:
        """End a step from the gradient of its outgoing boundary, and update.

        Parameters
        ----------
        receive : Callable[[], Tensor]
            Makes the gradient, when the engine needs it and for the engine alone.

        Returns
        -------
        Tensor or None
            The gradient of the incoming boundary, if there is one.
        """
        entry, self._entry = self._entry, None
        if entry is None:
            raise RuntimeError("backward without forward: the step has no graph.")
        self._receive[:] = [receive]
        with phase("backward"):
            entry.backward(torch.empty_like(entry))
        del entry
        return self._end()

    def finish(
        self, inputs: Batch, targets: Tensor, *, step: int, inputs_are_boundary: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Do a whole step where the route ends: forward, loss, backward, update.

        Returns
        -------
        loss : Tensor
            The detached mean loss of the batch.
        gradient : Tensor or None
            The gradient of the incoming boundary, if there is one.
        """
        outputs = self._run(inputs, step, inputs_are_boundary)
        with phase("loss"), autocast_of(self.task):
            loss = self.task.loss_fn(outputs, targets)
            if loss.untyped_storage().nbytes() > loss.nbytes:
                # Some losses leave their mean where all of their terms were.
                loss = loss.clone()
        del outputs  # What backward needs of them, the graph holds.
        with phase("backward"):
            loss.backward()
        loss = loss.detach()  # And with it the graph goes.
        return loss, self._end()

    def gradient_norms(self) -> dict[str, float]:
        """Take the norm of each gradient, where an update waits for all of them."""
        waits = self.task.max_gradient_norm is not None
        return gradient_norms(self.segment) if waits else {}

    def update(self, norm: float | None = None) -> None:
        """Do the optimizer's step; it comes by itself if the task clips nothing.

        Parameters
        ----------
        norm : float, optional
            The norm of all gradients of the model, to clip these by.
        """
        if self.optimizer is None:
            return
        with phase("optimizer"):
            if norm is not None and self.task.max_gradient_norm is not None:
                max_norm = self.task.max_gradient_norm
                clip_gradients(self.segment, max_norm=max_norm, norm=norm)
            self.optimizer.step()
            if self._scheduler is not None:
                self._scheduler.step()

    def release_gradients(self) -> None:
        """Free the gradients, where other work comes before the next step."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, inputs: Batch) -> Any:
        """Run the segment forward in evaluation mode, without a graph."""
        self.segment.eval()
        with phase("forward"), autocast_of(self.task):
            return self.segment(inputs)

    @torch.no_grad()
    def assess(self, outputs: Any, targets: Tensor) -> dict[str, float]:
        """Return loss and metrics of the outputs, in evaluation."""
        with autocast_of(self.task):
            values = {"loss": float(self.task.loss_fn(outputs, targets))}
            if self.task.metrics_fn is not None:
                # First, so that none of them takes the place of the loss.
                values = {**self.task.metrics_fn(outputs, targets), **values}
        return values

    def _run(self, inputs: Batch, step: int, inputs_are_boundary: bool) -> Any:
        self.segment.train()
        self._entry = None
        self.release_gradients()
        self._input_gradients.clear()
        if inputs_are_boundary:
            inputs = self._leaf(inputs)
        with phase("forward"), autocast_of(self.task):
            return self.segment(
                inputs, streams=self._streams, step=step, recompute=self.recompute
            )

    def _leaf(self, inputs: Batch) -> Batch:
        """Let a boundary in, and have its gradient put aside."""
        if isinstance(inputs, dict):
            raise TypeError("a boundary is a tensor or a tuple, not a mapping.")
        boundary, *context = inputs if isinstance(inputs, tuple) else (inputs,)
        trigger = torch.empty(0, requires_grad=True)
        leaf = GradientExit.apply(trigger, boundary, self._input_gradients)
        return (leaf, *context) if context else leaf

    def _end(self) -> Tensor | None:
        """Update, unless that has to wait; return the incoming boundary's gradient."""
        if self.task.max_gradient_norm is None:
            self.update()
        return self._input_gradients.pop() if self._input_gradients else None


def _can_be_early(optimizer: Optimizer | None, task: Task) -> bool:
    """Say whether parameters may be stepped before all gradients are there."""
    waits = task.max_gradient_norm is not None
    return optimizer is not None and not waits and steps_one_by_one(optimizer)


def autocast_of(task: Task) -> AbstractContextManager[Any]:
    """Switch mixed precision on, if the task says so."""
    dtype = task.autocast_dtype
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)
