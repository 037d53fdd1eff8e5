"""What an edge advises its clients step by step: by their speed and their importance.

SmartSplit's MEC manager fine-tunes split points by statistical importance and avoids
the delay of slow devices. What counts as slow and as important is our reconstruction.
It is off by default: ``docs/results.md`` says what it was measured to bring.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import inf, sqrt
from statistics import median
from typing import Protocol

import numpy as np

from flwr_smartsplit.plan.selection.history import averaged
from flwr_smartsplit.types import Action, Advice, Cohort
from flwr_smartsplit.types.sizes import own_numbers

_LOW_QUANTILE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What an edge knows of one client after some steps of a round."""

    num_examples: int
    importance_before: float = 0.0  # When the round began; 0 if unknown
    num_seen: int = 0  # Examples of the steps so far
    squared_loss: float = 0.0  # Sum over them of their batch's loss, squared
    step_seconds: float | None = None  # Moving average since the last change
    action: Action | None = None  # What the last step called for
    held_steps: int = 0  # For how many steps in a row
    quiet_steps: float = inf  # Steps since the last change

    @property
    def importance(self) -> float:
        """The client's importance, this round's losses so far included."""
        if self.num_seen == 0:
            return self.importance_before
        loss_rms = sqrt(self.squared_loss / self.num_seen)
        return averaged(self.importance_before, self.num_examples * loss_rms)

    def restarted(self) -> "Progress":
        """Begin anew: the cut has moved, or was advised to."""
        return replace(
            self, step_seconds=None, action=None, held_steps=0, quiet_steps=0
        )


def judged(
    progress: Progress,
    cohort: Cohort,
    *,
    loss: float,
    num_examples: int,
    step_seconds: float | None,
) -> tuple[Progress, Advice | None]:
    """Take in one step; return what is known now, and what the device should change.

    A slow and important client's cut moves earlier; a slow and unimportant one may stop
    early; a fast one's cut moves later where the edge needs relief. ``loss`` is the
    step's mean; ``step_seconds`` is None if the device does not know it.
    """
    seconds = progress.step_seconds
    if step_seconds is not None and 0 < step_seconds < inf:
        seconds = averaged(seconds or 0.0, step_seconds)
    after = replace(
        progress,
        num_seen=progress.num_seen + num_examples,
        squared_loss=progress.squared_loss + num_examples * loss * loss,
        step_seconds=seconds,
        quiet_steps=progress.quiet_steps + 1,
    )
    action = _action(after, cohort)
    held_steps = progress.held_steps + 1 if action is progress.action else 1
    after = replace(after, action=action, held_steps=held_steps)
    is_due = (
        held_steps >= cohort.patience_steps
        and after.quiet_steps >= cohort.spacing_steps
    )
    if action is None or not is_due:
        return after, None
    return after.restarted(), Advice(action, _reason(after, action, cohort))


def _action(progress: Progress, cohort: Cohort) -> Action | None:
    seconds, usual = progress.step_seconds, cohort.median_step_seconds
    if seconds is None:
        return None
    if seconds < cohort.fast_factor * usual:
        return Action.LATER if cohort.relieves_edge else None
    if not seconds > cohort.slow_factor * usual:
        return None
    importance = progress.importance
    if importance >= cohort.median_importance:
        return Action.EARLIER
    return Action.RELEASE if importance <= cohort.low_importance else None


def _reason(progress: Progress, action: Action, cohort: Cohort) -> str:
    speed = "fast" if action is Action.LATER else "slow"
    return (
        f"the edge finds it {speed}: {progress.step_seconds:.3g} s a step, the median "
        f"is {cohort.median_step_seconds:.3g} s; its importance is "
        f"{progress.importance:.3g}, the median is {cohort.median_importance:.3g}"
    )


class Advisor(Protocol):
    """Says what edges compare their clients with."""

    def cohort(
        self, pairs: Iterable[tuple[float | None, float | None]]
    ) -> Cohort | None:
        """Sum up a round's clients; None if nobody is to be advised.

        Each pair is what a client's round takes, in seconds, and its importance; None,
        or a number that means nothing, where one is not known.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerAdvisor:
    """Compare clients with the median time, and with median and quartile importance.

    Parameters
    ----------
    slow_factor : float
        A device is slow above this multiple of the median step time.
    fast_factor : float
        It is fast below this one.
    patience_steps : int
        So many steps in a row must call for the same change.
    spacing_steps : int
        At least so many steps lie between two changes.

    Examples
    --------
    >>> found = StragglerAdvisor().cohort([(1.0, 10.0), (2.0, 30.0), (9.0, 50.0)])
    >>> found.median_step_seconds, found.median_importance, found.low_importance
    (2.0, 30.0, 20.0)
    """

    slow_factor: float = 1.5
    fast_factor: float = 0.7
    patience_steps: int = 2
    spacing_steps: int = 4

    def __post_init__(self) -> None:
        own_numbers(self)

    def cohort(
        self, pairs: Iterable[tuple[float | None, float | None]]
    ) -> Cohort | None:
        """Sum up the clients of a round; None if no time or no importance is known."""
        known = list(pairs)
        seconds = [s for s, _ in known if s is not None and 0 < s < inf]
        importances = [i for _, i in known if i is not None and 0 <= i < inf]
        if not seconds or not importances:
            return None
        return Cohort(
            median_step_seconds=median(seconds),
            median_importance=median(importances),
            low_importance=float(np.quantile(importances, _LOW_QUANTILE)),
            **asdict(self),
        )
