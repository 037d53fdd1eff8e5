"""Slices: the device's side of steps whose boundary crosses a few samples at a time."""

from collections.abc import Mapping

from torch import Tensor

from flwr_smartsplit.edge.client import EdgeLink, packed
from flwr_smartsplit.edge.part_messages import PartsStepped
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.split.segment import Batch, Boundary
from flwr_smartsplit.train.slicing import SlicedRunner


class Slices:
    """Do the steps of a route's front in slices, where a batch is more than one.

    Parameters
    ----------
    runner : SlicedRunner
        Runs the front.
    link : EdgeLink
        Leads to the rest of the route.
    """

    def __init__(self, runner: SlicedRunner, link: EdgeLink) -> None:
        self._runner = runner
        self._link = link
        self._num_evaluated = 0

    def covers(self, targets: Tensor) -> bool:
        """Say whether a batch is more than one slice; else a plain step does it."""
        return self._runner.covers(targets)

    def train(
        self,
        inputs: Batch,
        targets: Tensor,
        *,
        step: int,
        norm: float | None,
        step_seconds: float | None = None,
    ) -> PartsStepped:
        """Do one training step; the front's update may have to wait for its norm."""
        link, num_examples = self._link, int(targets.shape[0])

        def send(start: int, boundary: Boundary) -> None:
            link.put_part(
                step, packed(boundary), start=start, num_examples=num_examples
            )

        def receive(start: int, stop: int) -> Tensor:
            return link.gradient_part(step, start, stop).unpack()

        self._runner.forward(inputs, step=step, send=send)
        labels = WireTensor.pack(targets)
        stepped = link.train_parts(step, labels, norm, step_seconds=step_seconds)
        self._runner.backward(inputs, step=step, receive=receive)
        return stepped

    def evaluate(self, inputs: Batch, targets: Tensor) -> Mapping[str, float]:
        """Return loss and metrics of one batch."""
        link, step, num_examples = self._link, self._num_evaluated, len(targets)

        def send(start: int, boundary: Boundary) -> None:
            link.put_part(
                step, packed(boundary), start=start, num_examples=num_examples
            )

        self._runner.evaluate(inputs, send=send)
        self._num_evaluated += 1
        return link.evaluate_parts(step, WireTensor.pack(targets))
