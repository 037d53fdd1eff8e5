"""What a step holds under a recompute plan: a ledger of stages, forward and back."""

from collections.abc import Sequence
from dataclasses import dataclass

from flwr_smartsplit.errors import InvalidPlan
from flwr_smartsplit.plan.checkpointing.stages import (
    Stage,
    StageRun,
    left_from,
    passing_peaks,
)
from flwr_smartsplit.types import RecomputePlan, Rerun


@dataclass(frozen=True, slots=True)
class Held:
    """What the stages of one device segment hold besides what always stays."""

    peak_bytes: int  # The most, forward and backward
    waiting_bytes: int  # Left while the rest of the step runs elsewhere


Item = tuple[int, int, "tuple[Item, ...] | None"]
"""Stages ``[first, last]`` that are kept (``None``), or run again with inner items."""


def held_by(stages: Sequence[Stage], plan: RecomputePlan) -> Held:
    """Follow a step through the stages of one segment and find what it holds.

    Raises ``InvalidPlan`` if a part does not begin and end where stages do, or has a
    stage that must not run twice.
    """
    ledger = _Ledger(stages, frozenset(plan.selective))
    items = items_of(stages, plan.reruns)
    held = ledger.forward(items, 0)
    first, _, inner = items[-1]
    waiting = held[-1] + (ledger.run_of(first).kept_bytes if inner is None else 0)
    ledger.backward(items, held)
    return Held(ledger.peak_bytes, waiting)


def items_of(
    stages: Sequence[Stage], reruns: Sequence[Rerun], first: int = 0, stop: int = -1
) -> tuple[Item, ...]:
    """Write parts of a plan in stages instead of units."""
    end = len(stages) if stop < 0 else stop
    items: list[Item] = []
    index = first
    for part in reruns:
        low = _index_at(stages, part.start, part, end)
        high = _index_at(stages, part.stop, part, end)
        items += [(i, i, None) for i in range(index, low)]
        if not all(stage.can_rerun for stage in stages[low:high]):
            raise InvalidPlan(
                f"{part}: one of these units changes tensors when it runs, so it must "
                "not run twice."
            )
        items.append((low, high - 1, items_of(stages, part.inner, low, high)))
        index = high
    items += [(i, i, None) for i in range(index, end)]
    return tuple(items)


def _index_at(stages: Sequence[Stage], unit: int, part: Rerun, end: int) -> int:
    """Find the stage that begins with a unit."""
    for index, stage in enumerate(stages):
        if stage.start == unit and stage.stop > stage.start:
            return index
    if stages and unit == stages[end - 1].stop:
        is_before_loss = stages[end - 1].start == unit  # The loss has no units.
        return end - is_before_loss
    bounds = sorted({s.start for s in stages} | {s.stop for s in stages})
    raise InvalidPlan(
        f"{part} begins or ends at unit {unit}, where nothing is kept to start again "
        f"from; possible are {bounds}."
    )


class _Ledger:
    """The bytes that come and go, and the most of them."""

    def __init__(self, stages: Sequence[Stage], selective: frozenset[int]) -> None:
        self.peak_bytes = 0
        self._stages = stages
        self._selective = selective
        self._left = left_from(stages)

    def forward(
        self, items: Sequence[Item], base: int, *, is_rerun: bool = False
    ) -> list[int]:
        """Run items, from ``base`` bytes on; return what is held before each.

        A rerun ends at the last tensor that it saves, so not with another rerun.
        """
        live, held = base, []
        for number, (first, last, inner) in enumerate(items, start=1):
            held.append(live)
            ends = is_rerun and number == len(items)
            if inner is None:
                run = self.run_of(first)
                peak = run.rerun_peak_bytes if ends else run.forward_peak_bytes
                self._see(live + peak)
                live += run.saved_bytes
            elif not ends:
                stages = self._stages[first : last + 1]
                context = sum(stage.context_bytes for stage in stages)
                self._see(live + context + passing_peaks(stages)[-1])
                live += context + stages[-1].output_bytes
        return held

    def backward(self, items: Sequence[Item], held: Sequence[int]) -> None:
        """Go back over items; ``held`` is what lies before each."""
        for (first, last, inner), base in zip(
            reversed(items), reversed(held), strict=True
        ):
            if inner is None:
                run = self.run_of(first)
                self._see(base + self._left[first + 1] + run.backward_peak_bytes)
            else:
                # The gradients that are there when the rerun begins.
                arriving = self._left[last + 1] + self._stages[last].arriving_bytes
                again = self.forward(inner, base + arriving, is_rerun=True)
                self.backward(inner, [each - arriving for each in again])

    def run_of(self, index: int) -> StageRun:
        """Find how the plan runs a stage that it keeps."""
        stage = self._stages[index]
        for run in stage.runs[1:]:
            if self._selective.issuperset(run.selective):
                return run
        return stage.runs[0]

    def _see(self, num_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, num_bytes)
