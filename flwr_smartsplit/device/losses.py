"""Losses: what a client's steps tell about its data."""

import math


class Losses:
    """The losses of one round's steps, in their order."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, int]] = []

    def add(self, loss: float, num_examples: int) -> None:
        """Count a step in, with its mean loss."""
        self._steps.append((loss, num_examples))

    @property
    def rms(self) -> float:
        """Root of the mean over the examples of their batch's loss, squared."""
        return math.sqrt(_mean([(loss**2, count) for loss, count in self._steps]))

    @property
    def drop(self) -> float:
        """Mean loss of the first half of the steps, less that of the second half.

        Examples
        --------
        >>> losses = Losses()
        >>> for loss in (3.0, 2.0, 1.0):
        ...     losses.add(loss, 8)
        >>> losses.drop
        2.0
        """
        half = max(len(self._steps) // 2, 1)
        return _mean(self._steps[:half]) - _mean(self._steps[-half:])


def _mean(weighted: list[tuple[float, int]]) -> float:
    total = sum(count for _, count in weighted)
    return sum(value * count for value, count in weighted) / max(total, 1)
