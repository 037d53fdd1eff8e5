"""Metrics: sums over a client's batches."""

import math
from collections.abc import Mapping, Sequence

from flwr_smartsplit.profile.example_shapes import longest
from flwr_smartsplit.types import (
    FISHER,
    Action,
    Advice,
    Move,
    Replan,
    Shapes,
    StepReport,
)


class Metrics:
    """Sum up a client's steps, examples, losses and metrics."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_examples = 0
        self.released = ""
        self.example_shapes: Shapes = ()  # The largest so far
        self._moves: list[Move] = []
        self._replans: list[Replan] = []
        self._by_epoch: list[int] = []
        self._sums: dict[str, float] = {"loss": 0.0}
        self._counts: dict[str, int] = {}  # Of the examples behind each sum
        self._losses: list[tuple[float, int]] = []
        self._fisher: float | None = None  # The largest so far, if asked for

    def begin_epoch(self) -> None:
        """Begin another pass over the examples."""
        self._by_epoch.append(0)

    def count(self, num_examples: int, values: Mapping[str, float]) -> None:
        """Count one step; ``values`` are means over its examples, with the loss."""
        self.num_steps += 1
        self.num_examples += num_examples
        if self._by_epoch:
            self._by_epoch[-1] += num_examples
        self._losses.append((float(values["loss"]), num_examples))
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value) * num_examples
            self._counts[name] = self._counts.get(name, 0) + num_examples

    def learns(self, fisher: float) -> None:
        """Note how large a step's gradients were."""
        self._fisher = max(fisher, self._fisher or 0.0)

    def saw(self, shapes: Shapes) -> None:
        """Note the shapes of a batch's examples."""
        if shapes != self.example_shapes:
            self.example_shapes = longest(shapes, self.example_shapes)

    def move(self, before: int, after: int, reason: str) -> None:
        """Record a move of the cut."""
        move = Move(step=self.num_steps, before=before, after=after, reason=reason)
        self._moves.append(move)

    def replan(self, before: str, after: str, reason: str) -> None:
        """Record that other units are recomputed from now on."""
        replan = Replan(step=self.num_steps, before=before, after=after, reason=reason)
        self._replans.append(replan)

    def is_released(self, advice: Advice | None) -> bool:
        """Return whether the edge has let this client stop, and record why."""
        if advice is not None and advice.action is Action.RELEASE:
            self.released = advice.reason
        return bool(self.released)

    @property
    def loss_sum(self) -> float:
        """Sum of the losses of all examples."""
        return self._sums["loss"]

    def report(self, *, num_epochs: int) -> StepReport:
        """Report on the planned passes; on those begun if the client was released."""
        num_examples = self.num_examples // num_epochs
        if self.released:
            begun = [each for each in self._by_epoch if each]
            num_examples, num_epochs = begun[0], len(begun)
        means = {
            name: summed / max(self._counts.get(name, 0), 1)
            for name, summed in self._sums.items()
        }
        return StepReport(
            num_examples=num_examples,
            num_epochs=num_epochs,
            num_steps=self.num_steps,
            loss=means.pop("loss"),
            loss_rms=rms(self._losses),
            metrics=means if self._fisher is None else {**means, FISHER: self._fisher},
            metric_examples={
                name: self._counts[name]
                for name in means
                if self._counts[name] < self.num_examples
            },
            moves=tuple(self._moves),
            replans=tuple(self._replans),
            released=self.released,
        )


def rms(losses: Sequence[tuple[float, int]]) -> float:
    """Root mean square over examples of their batch's loss.

    ``losses`` holds each step's loss and number of examples.
    """
    total = sum(count for _, count in losses)
    return math.sqrt(sum(loss**2 * count for loss, count in losses) / max(total, 1))
