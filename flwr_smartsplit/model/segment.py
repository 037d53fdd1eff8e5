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

from flwr_smartsplit.model.clipping import clip_gradients, gradient_norms
from flwr_smartsplit.model.memory import phase
from flwr_smartsplit.model.schedule import scheduler_of
from flwr_smartsplit.task import Task

Streams = Callable[[int, int], AbstractContextManager[None]]
"""``streams(step, unit)`` opens the random stream that unit runs under."""

Observer = Callable[[int, Any], None]
"""``observe(unit, value)`` is told the value of each unit that has run."""

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
    is_samplewise : bool
        Whether it treats samples one by one and writes nothing; dimension 0 of all it
        takes and returns is the samples. Found out for a traced model.

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
    is_samplewise: bool = False

    def forward_in(self, training: bool) -> Callable[..., Any]:
        """Return what it does in one mode."""
        return self.forward if training else self.eval_forward or self.forward


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
            _share(source, self, target.split("."))
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
        observe: Observer | None = None,
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
        observe : Observer, optional
            Is told the value of each unit.
        """
        value: Any = inputs
        training = self.training
        for index, unit in enumerate(self.__units, start=self.__start):
            run = unit.forward_in(training)
            if training and unit.is_random:
                with streams(step, index):
                    value = run_unit(run, self, value)
            else:
                value = run_unit(run, self, value)
            if observe is not None:
                observe(index, value)
        return value


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


def _share(source: nn.Module, target: nn.Module, path: list[str]) -> None:
    """Register ``source``'s object at ``path`` under the same path of ``target``."""
    *parents, last = path
    for name in parents:
        source = source.get_submodule(name)
        if not hasattr(target, name):
            target.add_module(name, nn.Module())
        target = target.get_submodule(name)
    if last in source._modules:
        target.add_module(last, source._modules[last])
    elif last in source._parameters:
        target.register_parameter(last, source._parameters[last])
    elif last in source._buffers:
        persistent = last not in source._non_persistent_buffers_set
        target.register_buffer(last, source._buffers[last], persistent=persistent)
    else:
        setattr(target, last, getattr(source, last))


class _Entry(torch.autograd.Function):
    """End a graph with nothing where a gradient will come in later.

    Neither the boundary nor its gradient is held by anyone but the graph and the
    engine: the boundary goes once it is sent, the gradient once it is used.
    """

    @staticmethod
    def forward(
        ctx: Any, boundary: Tensor, receive: list[Callable[[], Tensor]]
    ) -> Tensor:
        ctx.receive = receive
        return boundary.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.receive.pop()(), None


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
    ) -> None:
        self.segment = segment
        self.task = task
        self._streams = streams
        parameters = [p for p in segment.parameters() if p.requires_grad]
        needs_one = is_trained and bool(parameters)
        self.optimizer = task.optimizer_fn(parameters) if needs_one else None
        self._scheduler = scheduler_of(self.optimizer, task, config or {})
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
        self._entry = _Entry.apply(boundary[0], self._receive)
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
        with phase("loss"), self._autocast():
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
        with phase("forward"), self._autocast():
            return self.segment(inputs)

    @torch.no_grad()
    def assess(self, outputs: Any, targets: Tensor) -> dict[str, float]:
        """Return loss and metrics of the outputs, in evaluation."""
        with self._autocast():
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
        with phase("forward"), self._autocast():
            return self.segment(inputs, streams=self._streams, step=step)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.task.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def _leaf(self, inputs: Batch) -> Batch:
        """Catch the boundary's gradient by a hook: ``.grad`` would re-lay it out."""
        if isinstance(inputs, dict):
            raise TypeError("a boundary is a tensor or a tuple, not a mapping.")
        boundary, *context = inputs if isinstance(inputs, tuple) else (inputs,)
        leaf = boundary.detach().requires_grad_()
        leaf.register_hook(self._input_gradients.append)
        return (leaf, *context) if context else leaf

    def _end(self) -> Tensor | None:
        """Update, unless that has to wait; return the incoming boundary's gradient."""
        if self.task.max_gradient_norm is None:
            self.update()
        return self._input_gradients.pop() if self._input_gradients else None
