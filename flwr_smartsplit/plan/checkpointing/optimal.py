"""The least extra work under a budget: a dynamic programme over the stages.

The recurrence is Rotor's, for chains of unequal stages and nested reruns [1]_ [2]_.
Ours are the gradients that pile up during backward, several ways to keep a stage
[3]_, and that a rerun ends at the last tensor that it saves.

References
----------
.. [1] Herrmann et al., "Optimal checkpointing for heterogeneous chains: how to train
   deep neural networks with limited memory", 2019, arXiv:1911.13214, section 4.
.. [2] Beaumont et al., "Efficient Combination of Rematerialization and Offloading for
   Training DNNs", NeurIPS 2021.
.. [3] Zhao et al., "Rockmate: an Efficient, Fast, Automatic and Generic Tool for
   Re-materialization in PyTorch", ICML 2023.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.plan.checkpointing.stages import (
    Stage,
    StageRun,
    left_from,
    passing_peaks,
)
from flwr_smartsplit.plan.checkpointing.step_memory import held_by
from flwr_smartsplit.types import RecomputePlan, Rerun

_NEVER = float("inf")
_Costs = npt.NDArray[np.float64]


class Rotor:
    """Optimal plans of a segment for every budget up to one, in slots.

    Sizes are rounded up to slots, into which the budget (bytes besides what always
    stays) is divided. With ``is_rerun``, the whole segment runs again when its gradient
    arrives.

    Column ``t`` of a table is for stages that end with stage ``t`` inside a rerun; the
    last column is for those that end the segment and run for the first time.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        budget_bytes: int,
        *,
        slots: int = 500,
        is_rerun: bool = False,
    ) -> None:
        self._stages = stages
        self._top = len(stages)
        self._is_rerun = is_rerun
        self._column = self._top - 1 if is_rerun else self._top
        self.slot_bytes = max(1, -(-budget_bytes // slots))
        self._slots = max(0, budget_bytes // self.slot_bytes)
        self._all_slots = self._slots + len(stages) + 1
        self._left = left_from(stages)
        self._costs_before = [0.0, *accumulate(_weighed(stages))]
        self._fill()

    def plan_of_least_memory(self) -> RecomputePlan | None:
        """Return the best plan in the fewest slots; None if no plan fits."""
        feasible = np.flatnonzero(np.isfinite(self._best[0, self._column]))
        return self.plan(int(feasible[0])) if feasible.size else None

    def best_within(self, budget_bytes: int) -> RecomputePlan | None:
        """Return the best plan whose exact peak is within the budget.

        Rounding may add up to a slot for each stage, so plans that seem to take a
        little too much are tried as well.
        """
        for slots in range(self._all_slots, self._slots - 1, -1):
            plan = self.plan(slots)
            if plan and held_by(self._stages, plan).peak_bytes <= budget_bytes:
                return plan
        return None

    def plan(self, slots: int | None = None) -> RecomputePlan | None:
        """Return the plan of least extra cost in some or all slots, if any fits."""
        slots = self._slots if slots is None else slots
        if not np.isfinite(self._best[0, self._column, slots]):
            return None
        selective: list[int] = []
        reruns = self._read(0, self._column, slots, selective)
        if self._is_rerun:
            start, stop = self._stages[0].start, self._stages[-1].stop
            reruns = [Rerun(start, stop, tuple(reruns))]
        return RecomputePlan(tuple(reruns), tuple(sorted(selective)))

    # --- the recurrence -------------------------------------------------------------

    def _fill(self) -> None:
        size, slots = len(self._stages), self._all_slots
        shape = (size, size + 1, slots + 1)
        self._best: _Costs = np.full(shape, _NEVER)
        self._shifted: _Costs = np.full(shape, _NEVER)
        self._choice = np.zeros(shape, dtype=np.int16)
        self._range = np.arange(slots + 1)
        for length in range(size):
            for start in range(size - length):
                self._fill_one(start, start + length)
        for start in reversed(range(size)):
            self._fill_one(start, self._top)

    def _fill_one(self, start: int, last: int) -> None:
        """Find the best of keeping the first stage, and of rerunning up to each."""
        keep = [self._kept(start, last, run) for run in self._stages[start].runs]
        rows = [np.stack(keep), self._rerun(start, last)]
        table = np.concatenate([row for row in rows if row.size])
        choice = table.argmin(axis=0)
        best = np.take_along_axis(table, choice[None], axis=0)[0]
        # First the ways to keep it, as -1, -2; then where a rerun stops.
        offset = len(keep)
        self._choice[start, last] = np.where(
            choice < offset, -1 - choice, start + 1 + choice - offset
        )
        self._best[start, last] = best
        if start:
            held = self._slots_of(self._stages[start - 1].output_bytes)
            self._shifted[start, last] = _shifted(best, held)

    def _kept(self, start: int, last: int, run: StageRun) -> _Costs:
        """Cost of keeping the first stage after one run, and the best of the rest."""
        stage = self._stages[start]
        arriving = self._arriving(last)
        is_last = start == min(last, self._top - 1)
        ends = is_last and last < self._top
        forward = run.rerun_peak_bytes if ends else run.forward_peak_bytes
        needed = max(
            self._slots_of(arriving + forward),
            self._slots_of(self._left[start + 1] + run.backward_peak_bytes),
        )
        if not is_last:
            after = _shifted(
                self._best[start + 1, last], self._slots_of(run.saved_bytes)
            )
            cost = self._cost(start, start + 1)
        else:
            after = np.zeros(self._all_slots + 1)
            share = stage.rerun_cost / stage.cost if stage.cost else 1.0
            cost = self._cost(start, start + 1) * share
        cost = run.extra_cost + (cost if last < self._top else 0.0)
        costs: _Costs = np.where(self._range >= needed, after + cost, _NEVER)
        return costs

    def _rerun(self, start: int, last: int) -> _Costs:
        """Costs of running stages up to each later one again, a row for each."""
        rows = self._rerunnable(start, last)
        if not rows:
            return np.empty((0, self._all_slots + 1))
        arriving = self._arriving(last)
        peaks = passing_peaks(self._stages[start : start + rows])
        needed = [self._slots_of(arriving + peak) for peak in peaks]
        after = self._shifted[start + 1 : start + rows + 1, last]
        if start + rows == self._top:  # Nothing comes after the last of them.
            after = np.concatenate([after, np.zeros((1, self._all_slots + 1))])
        costs = self._best[start, start : start + rows] + after
        if last < self._top:
            passing = [self._cost(start, start + i + 1) for i in range(rows)]
            costs = costs + np.array(passing)[:, None]
        fits = self._range >= np.array(needed)[:, None]
        masked: _Costs = np.where(fits, costs, _NEVER)
        return masked

    def _rerunnable(self, start: int, last: int) -> int:
        """Count how many stages from one on may run twice.

        Inside a rerun not the last: it would only be run once more.
        """
        count = 0
        while start + count < last and self._stages[start + count].can_rerun:
            count += 1
        return count

    def _arriving(self, last: int) -> int:
        """Return the size of the gradients that are there during forward."""
        if last == self._top:
            return 0
        return self._left[last + 1] + self._stages[last].arriving_bytes

    def _cost(self, start: int, stop: int) -> float:
        return self._costs_before[stop] - self._costs_before[start]

    def _slots_of(self, num_bytes: int) -> int:
        return -(-num_bytes // self.slot_bytes)

    def _read(
        self, start: int, last: int, slots: int, selective: list[int]
    ) -> list[Rerun]:
        reruns: list[Rerun] = []
        while start < min(last + 1, self._top):
            choice = int(self._choice[start, last, slots])
            stage = self._stages[start]
            if choice < 0:
                run = stage.runs[-1 - choice]
                selective += run.selective
                slots -= self._slots_of(run.saved_bytes)
                start += 1
                continue
            inner = self._read(start, choice - 1, slots, selective)
            before = self._stages[choice - 1]
            reruns.append(Rerun(stage.start, before.stop, tuple(inner)))
            slots -= self._slots_of(before.output_bytes)
            start = choice
        return reruns


def _shifted(costs: _Costs, slots: int) -> _Costs:
    result = np.full_like(costs, _NEVER)
    if slots < costs.size:
        result[slots:] = costs[: costs.size - slots]
    return result


def _weighed(stages: Sequence[Stage]) -> list[float]:
    """Add to each cost what decides between equal ones: the bytes made again.

    Operators without FLOPs are not free, so the plan that makes fewer bytes is better.
    All of these weights together are less than the smallest cost.
    """
    total = sum(stage.passing_peak_bytes for stage in stages)
    least = min((s.cost for s in stages if s.cost), default=1.0)
    weight = least * 1e-3 / (len(stages) * total) if total else 0.0
    return [stage.cost + weight * stage.passing_peak_bytes for stage in stages]
