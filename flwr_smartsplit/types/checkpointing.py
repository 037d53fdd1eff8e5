"""Recompute plans: what a device recomputes in backward to hold less in between."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from flwr_smartsplit.errors import InvalidPlan


@dataclass(frozen=True, slots=True)
class Rerun:
    """Units ``[start, stop)`` that keep only their input and run again in backward.

    When their gradient arrives, they run forward once more and keep what backward
    needs, except for the units of ``inner``, which run a third time in turn.
    """

    start: int
    stop: int
    inner: tuple["Rerun", ...] = ()

    def __str__(self) -> str:
        inside = "".join(f" {each}" for each in self.inner)
        return f"[{self.start}:{self.stop}{inside}]"


@dataclass(frozen=True, slots=True)
class RecomputePlan:
    """What a device recomputes instead of keeping; nothing by default.

    Parameters
    ----------
    reruns : tuple[Rerun, ...]
        In order, without overlap.
    selective : tuple[int, ...]
        Units under selective checkpointing: they keep the results of costly operators,
        and recompute the cheap ones between them, such as BatchNorm and ReLU.

    Raises
    ------
    InvalidPlan
        If the parts overlap or are empty.

    Examples
    --------
    >>> plan = RecomputePlan((Rerun(0, 3), Rerun(4, 9, (Rerun(6, 8),))))
    >>> str(plan), plan.num_runs(7)
    ('[0:3] [4:9 [6:8]]', 3)
    >>> RecomputePlan.from_lists(plan.to_lists()) == plan
    True
    """

    reruns: tuple[Rerun, ...] = ()
    selective: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self.reruns, None)
        if list(self.selective) != sorted(set(self.selective)):
            raise InvalidPlan(
                f"selective units {self.selective} must be in order, each once."
            )

    @property
    def is_empty(self) -> bool:
        """Whether nothing is recomputed."""
        return not self.reruns and not self.selective

    def num_runs(self, unit: int) -> int:
        """Count how often a unit's forward runs in one step."""
        depth, parts = 1, self.reruns
        while found := [part for part in parts if part.start <= unit < part.stop]:
            depth, parts = depth + 1, found[0].inner
        return depth

    def within(self, start: int, stop: int) -> "RecomputePlan":
        """Return the part of the plan that lies in units ``[start, stop)``.

        Raises
        ------
        InvalidPlan
            If a part crosses one of the two ends.
        """
        if self.is_empty:
            return self
        for part in self.reruns:
            if any(part.start < end < part.stop for end in (start, stop)):
                raise InvalidPlan(
                    f"{part} lies across an end of the units [{start}, {stop}), which "
                    "run in one place: plan for this route."
                )
        return RecomputePlan(
            tuple(p for p in self.reruns if start <= p.start and p.stop <= stop),
            tuple(unit for unit in self.selective if start <= unit < stop),
        )

    def to_lists(self) -> list[Any]:
        """Write the plan as nested lists of numbers, for JSON."""
        return [[_to_list(part) for part in self.reruns], list(self.selective)]

    @classmethod
    def from_lists(cls, values: Any) -> Self:
        """Read what ``to_lists`` wrote.

        Raises
        ------
        InvalidPlan
            If it is not a plan.
        """
        try:
            reruns, selective = values
            return cls(tuple(map(_from_list, reruns)), tuple(map(int, selective)))
        except (TypeError, ValueError) as error:
            raise InvalidPlan(f"{values!r:.80} is not a recompute plan.") from error

    def __str__(self) -> str:
        parts = [str(part) for part in self.reruns]
        if self.selective:
            parts.append(f"selective {' '.join(map(str, self.selective))}")
        return " ".join(parts) or "none"


def _check(parts: Sequence[Rerun], outer: Rerun | None) -> None:
    low, high = (0, None) if outer is None else (outer.start, outer.stop)
    for part in parts:
        is_outside = part.start < low or (high is not None and part.stop > high)
        if is_outside or part.start >= part.stop or part == outer:
            inside = "" if outer is None else f" inside {outer}"
            raise InvalidPlan(f"{part} is not a range of units{inside}.")
        _check(part.inner, part)
    for first, second in pairwise(parts):
        if second.start < first.stop:
            raise InvalidPlan(f"{first} and {second} overlap or are out of order.")


def _to_list(part: Rerun) -> list[Any]:
    return [part.start, part.stop, [_to_list(each) for each in part.inner]]


def _from_list(values: Any) -> Rerun:
    start, stop, inner = values
    return Rerun(int(start), int(stop), tuple(map(_from_list, inner)))


KEEP_ALL = RecomputePlan()
