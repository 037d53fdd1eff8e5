"""Micro-batches: parts of a batch whose gradients add up to one optimizer step."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One part of a batch under gradient accumulation: number ``index`` of ``count``.

    The loss is divided by ``loss_divisor``, the batch's number of examples over this
    part's, so that the gradients add up to those of the batch's mean loss.
    """

    index: int = 0
    count: int = 1
    loss_divisor: float = 1.0

    @property
    def is_first(self) -> bool:
        """Whether gradients start from zero with it."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the optimizer steps after it."""
        return self.index == self.count - 1

    def in_step(self, step: int) -> int | str:
        """Name this part of a step, for the random streams of its units."""
        return f"{step}.{self.index}" if self.index else step


WHOLE_BATCH = MicroBatch()
