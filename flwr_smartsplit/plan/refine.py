"""How an edge judges its clients step by step: by their speed and their importance.

SmartSplit's MEC manager fine-tunes split points by statistical importance and avoids
the delay of slow devices. What counts as slow and as important is our reconstruction.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt
from statistics import median

import numpy as np

from flwr_smartsplit.types import Advice, Cohort, Wish

KEPT_FRACTION = 0.7
"""What a moving average keeps of what it was."""

_LOW_QUANTILE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineRules:
    """When an edge wishes for a change.

    Parameters
    ----------
    slow_factor, fast_factor : float
        A device is slow above, and fast below, so many times the median step.
    patience_steps : int
        For so many steps in a row the same must be wished for.
    spacing_steps : int
        At least so many steps lie between two changes.
    """

    slow_factor: float = 1.5
    fast_factor: float = 0.7
    patience_steps: int = 2
    spacing_steps: int = 4


RULES = RefineRules()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What an edge knows of one client after some steps of a round.

    Parameters
    ----------
    num_examples : int
        The client's examples.
    importance_before : float
        Its importance when the round began; 0 if that is not known.
    num_seen : int
        Examples of the steps so far.
    squared_loss : float
        Sum over them of their batch's loss, squared.
    step_seconds : float or None
        Moving average since the last change; None if there is no number yet.
    wish : Wish or None
        What the last step spoke for, and
    held_steps : int
        for how many steps in a row it did.
    quiet_steps : float
        Steps since the last change; infinite if there was none.
    """

    num_examples: int
    importance_before: float = 0.0
    num_seen: int = 0
    squared_loss: float = 0.0
    step_seconds: float | None = None
    wish: Wish | None = None
    held_steps: int = 0
    quiet_steps: float = inf

    @property
    def importance(self) -> float:
        """The client's importance, this round's losses so far included."""
        if self.num_seen == 0:
            return self.importance_before
        loss_rms = sqrt(self.squared_loss / self.num_seen)
        return _averaged(self.importance_before, self.num_examples * loss_rms)


def importance_of(num_examples: int, loss_rms: float, *, before: float = 0.0) -> float:
    """Say how important a client is: many examples, and losses that are still high.

    Parameters
    ----------
    num_examples : int
        The client's examples.
    loss_rms : float
        Root of the mean of its squared losses in a round; if that is not finite, all
        stays as it was.
    before : float
        Its importance before that round; 0 if that is not known.

    Examples
    --------
    >>> importance_of(10, 2.0)
    20.0
    >>> importance_of(10, 2.0, before=30.0)
    27.0
    """
    now = num_examples * loss_rms
    return _averaged(before, now) if isfinite(now) else before


def cohort_of(pairs: Iterable[tuple[float | None, float | None]]) -> Cohort | None:
    """Sum up the clients of a round.

    Parameters
    ----------
    pairs : Iterable[(step_seconds, importance)]
        Two numbers for each client; None, or a number that means nothing, where one
        is not known.

    Returns
    -------
    Cohort or None
        None if nobody's time, or nobody's importance, is known.

    Examples
    --------
    >>> found = cohort_of([(1.0, 10.0), (2.0, 30.0), (9.0, 50.0)])
    >>> found.median_step_seconds, found.median_importance, found.low_importance
    (2.0, 30.0, 20.0)
    """
    known = list(pairs)
    seconds = [s for s, _ in known if s is not None and 0 < s < inf]
    importances = [i for _, i in known if i is not None and 0 <= i < inf]
    if not seconds or not importances:
        return None
    return Cohort(
        median_step_seconds=median(seconds),
        median_importance=median(importances),
        low_importance=float(np.quantile(importances, _LOW_QUANTILE)),
    )


def updated(
    progress: Progress,
    cohort: Cohort,
    *,
    loss: float,
    num_examples: int,
    step_seconds: float | None,
    rules: RefineRules = RULES,
) -> Progress:
    """Take in one step.

    Parameters
    ----------
    progress : Progress
        What was known before.
    cohort : Cohort
        What the client is compared with.
    loss : float
        The step's mean loss.
    num_examples : int
        Its examples.
    step_seconds : float or None
        What a step takes as the route is now; None if the device does not know.
    rules : RefineRules
        What is slow, and what fast.
    """
    seconds = progress.step_seconds
    if step_seconds is not None and 0 < step_seconds < inf:
        seconds = _averaged(seconds or 0.0, step_seconds)
    after = replace(
        progress,
        num_seen=progress.num_seen + num_examples,
        squared_loss=progress.squared_loss + num_examples * loss * loss,
        step_seconds=seconds,
        quiet_steps=progress.quiet_steps + 1,
    )
    wish = _wish(after, cohort, rules)
    held_steps = progress.held_steps + 1 if wish is progress.wish else 1
    return replace(after, wish=wish, held_steps=held_steps)


def advised(
    progress: Progress, cohort: Cohort, rules: RefineRules = RULES
) -> Advice | None:
    """Say what the device should change now; None if all stays.

    Parameters
    ----------
    progress : Progress
        What is known of the client after its last step.
    cohort : Cohort
        What it is compared with, for the reason.
    rules : RefineRules
        How long a wish must hold, and how far apart changes are.
    """
    is_due = (
        progress.held_steps >= rules.patience_steps
        and progress.quiet_steps >= rules.spacing_steps
    )
    if progress.wish is None or not is_due:
        return None
    pace = "fast" if progress.wish is Wish.LATER else "slow"
    return Advice(
        progress.wish,
        f"the edge finds it {pace}: {progress.step_seconds:.3g} s a step, the median "
        f"is {cohort.median_step_seconds:.3g} s; its importance is "
        f"{progress.importance:.3g}, the median is {cohort.median_importance:.3g}",
    )


def changed(progress: Progress) -> Progress:
    """Begin to look anew: the cut has moved, or it was advised to."""
    return replace(progress, step_seconds=None, wish=None, held_steps=0, quiet_steps=0)


def _wish(progress: Progress, cohort: Cohort, rules: RefineRules) -> Wish | None:
    seconds, usual = progress.step_seconds, cohort.median_step_seconds
    if seconds is None:
        return None
    if seconds < rules.fast_factor * usual:
        return Wish.LATER if cohort.relieves_edge else None
    if not seconds > rules.slow_factor * usual:
        return None
    importance = progress.importance
    if importance >= cohort.median_importance:
        return Wish.EARLIER
    return Wish.RELEASE if importance <= cohort.low_importance else None


def _averaged(before: float, now: float) -> float:
    """Go on with a moving average; from 0 on it begins."""
    if before == 0:
        return now
    return KEPT_FRACTION * before + (1 - KEPT_FRACTION) * now
