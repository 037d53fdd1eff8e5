"""Segment and SegmentRunner: some units of a chain, and their part of a step.

One runner serves every place: the head on a device, a tail on an edge, the whole
model. It lives beside the cost model because a prediction is a dry run of it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flwr_smartsplit.task import Task

Streams = Callable[[int, int], AbstractContextManager[None]]
"""``streams(step, unit)`` opens the random stream that unit runs under."""

Batch = Tensor | tuple[Tensor, ...]


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
        The model's own name of the unit's last module or operation.
    train_forward, eval_forward : Callable
        ``forward(root, *inputs)``; ``root`` is any module that holds ``targets``.
    targets : tuple[str, ...]
        Dotted names of the modules, parameters and constants it reads.
    is_random : bool
        Whether it draws random numbers in training.
    """

    name: str
    train_forward: Callable[..., Any]
    eval_forward: Callable[..., Any]
    targets: tuple[str, ...]
    is_random: bool


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
    """

    def __init__(self, units: Sequence[Unit], start: int, source: nn.Module) -> None:
        super().__init__()
        # Mangled names, because the model's own children stand beside them.
        self.__units = tuple(units)
        self.__start = start
        for target in sorted({name for unit in units for name in unit.targets}):
            _share(source, self, target.split("."))

    def forward(
        self, inputs: Batch, *, streams: Streams = no_streams, step: int = 0
    ) -> Any:
        """Run the units in order, each random one under its own stream.

        Parameters
        ----------
        inputs : Tensor or tuple[Tensor, ...]
            The batch, or the boundary that enters the segment.
        streams : Streams
            Opens the random stream of a unit.
        step : int
            Number of the training step, from 0.
        """
        values = inputs if isinstance(inputs, tuple) else (inputs,)
        training = self.training
        for index, unit in enumerate(self.__units, start=self.__start):
            run = unit.train_forward if training else unit.eval_forward
            if training and unit.is_random:
                with streams(step, index):
                    values = (run(self, *values),)
            else:
                values = (run(self, *values),)
        return values[0]


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
    """

    def __init__(
        self, segment: nn.Module, task: Task, *, streams: Streams = no_streams
    ) -> None:
        self.segment = segment
        self.task = task
        self._streams = streams
        parameters = [p for p in segment.parameters() if p.requires_grad]
        self.optimizer = task.optimizer_fn(parameters) if parameters else None
        self._output: Tensor | None = None
        self._input_gradients: list[Tensor] = []

    def forward(self, inputs: Batch, *, step: int, inputs_are_boundary: bool) -> Any:
        """Start a step: run the segment forward and keep its graph.

        Parameters
        ----------
        inputs : Tensor or tuple[Tensor, ...]
            The batch, or the boundary that entered.
        step : int
            Number of the step, from 0.
        inputs_are_boundary : bool
            Whether a gradient has to go back to where the inputs came from.

        Returns
        -------
        Tensor
            The outgoing boundary or the outputs, still attached to the graph.
        """
        self.segment.train()
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self._input_gradients.clear()
        if inputs_are_boundary:
            inputs = self._leaf(inputs)
        self._output = self.segment(inputs, streams=self._streams, step=step)
        return self._output

    def backward(self, gradient: Tensor) -> Tensor | None:
        """End a step from the gradient of its outgoing boundary, and update.

        Returns
        -------
        Tensor or None
            The gradient of the incoming boundary, if there is one.
        """
        output, self._output = self._output, None
        if output is None:
            raise RuntimeError("backward without forward: the step has no graph.")
        output.backward(gradient)
        del output, gradient
        return self._update()

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
        outputs = self.forward(
            inputs, step=step, inputs_are_boundary=inputs_are_boundary
        )
        self._output = None
        loss = self.task.loss_fn(outputs, targets)
        loss.backward()
        return loss.detach(), self._update()

    @torch.no_grad()
    def evaluate(self, inputs: Batch) -> Any:
        """Run the segment forward in evaluation mode, without a graph."""
        self.segment.eval()
        return self.segment(inputs)

    def _leaf(self, boundary: Batch) -> Tensor:
        """Catch the boundary's gradient by a hook: ``.grad`` would re-lay it out."""
        if isinstance(boundary, tuple):
            (boundary,) = boundary
        leaf = boundary.detach().requires_grad_()
        leaf.register_hook(self._input_gradients.append)
        return leaf

    def _update(self) -> Tensor | None:
        if self.optimizer is not None:
            self.optimizer.step()
        return self._input_gradients.pop() if self._input_gradients else None
