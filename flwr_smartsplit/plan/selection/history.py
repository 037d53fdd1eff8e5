"""History: what earlier rounds brought, for the rounds to come."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Self

from flwr_smartsplit.plan.selection.speed_estimates import Steps, learned
from flwr_smartsplit.types import Work

KEPT_FRACTION = 0.7  # What a moving average keeps of what it was


def averaged(before: float, now: float) -> float:
    """Update a moving average; one of 0 has not begun."""
    return now if before == 0 else KEPT_FRACTION * before + (1 - KEPT_FRACTION) * now


def importance_of(num_examples: int, loss_rms: float, *, before: float = 0.0) -> float:
    """Say how important a client is: many examples, and losses that are still high.

    ``loss_rms`` is the root of the mean of its squared losses in a round; if that is
    not finite, all stays as it was ``before``, which is 0 if unknown.
    """
    now = num_examples * loss_rms
    return averaged(before, now) if isfinite(now) else before


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one client's part of a round brought; None where nobody says."""

    client_key: str
    round_number: int  # Counted from 1
    num_examples: int
    loss_rms: float  # Root of the mean squared loss during the round
    seconds: float | None = None  # What the round took
    step_seconds: float | None = None  # What one of its steps took at the end
    work: Work | None = None  # What such a step asked for
    edge: str | None = None  # The first edge on its route
    beyond: tuple[str, ...] = ()  # The others

    @property
    def importance(self) -> float:
        """Examples times the root mean squared loss, the statistical importance.

        As Oort's statistical utility (Lai et al., OSDI 2021).
        """
        return self.num_examples * self.loss_rms


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a strategy remembers, by client_key: last rounds, importance, steps.

    It is frozen, so that a plan can be made again from it.
    """

    latest: Mapping[str, Observation] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, Steps] = field(default_factory=dict)  # Speeds are in them

    def after(self, observations: Iterable[Observation]) -> Self:
        """Add what a round brought."""
        seen = list(observations)
        importance, steps = dict(self.importance), dict(self.steps)
        for each in seen:
            before = steps.get(each.client_key, ())
            edges = () if each.edge is None else (each.edge, *each.beyond)
            now = learned(before, each.work, each.step_seconds, *edges)
            if now:
                steps[each.client_key] = now
            importance[each.client_key] = importance_of(
                each.num_examples,
                each.loss_rms,
                before=importance.get(each.client_key, 0.0),
            )
        return type(self)(
            latest={**self.latest, **{each.client_key: each for each in seen}},
            importance=importance,
            steps=steps,
        )


NO_HISTORY = History()
