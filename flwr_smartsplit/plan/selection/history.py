"""History: what earlier rounds brought, for the rounds to come."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Self

from flwr_smartsplit.plan.selection.speed_estimates import Speeds, learned
from flwr_smartsplit.types import Work

KEPT_FRACTION = 0.7
"""What a moving average keeps of what it was."""


def averaged(before: float, now: float) -> float:
    """Go on with a moving average; from 0 on it begins."""
    return now if before == 0 else KEPT_FRACTION * before + (1 - KEPT_FRACTION) * now


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
    return averaged(before, now) if isfinite(now) else before


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one client's part of a round brought.

    Parameters
    ----------
    client_key : str
        The client.
    round_number : int
        The round, counted from 1.
    num_examples : int
        Examples it trained on.
    loss_rms : float
        Root of the mean squared loss during the round.
    seconds : float or None
        How long it took; None if nobody says so.
    step_seconds : float or None
        How long one of its steps took at the end; None if nobody says so.
    work : Work or None
        What such a step asked for; None if that is not known.
    edge : str or None
        The first edge on its route.
    """

    client_key: str
    round_number: int
    num_examples: int
    loss_rms: float
    seconds: float | None = None
    step_seconds: float | None = None
    work: Work | None = None
    edge: str | None = None

    @property
    def importance(self) -> float:
        """Statistical importance: examples times the root of the mean squared loss.

        As Oort's statistical utility (Lai et al., OSDI 2021).
        """
        return self.num_examples * self.loss_rms


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a strategy remembers; frozen, so that a plan can be made again from it.

    Parameters
    ----------
    latest : Mapping[str, Observation]
        Each client's last one, by client_key.
    importance : Mapping[str, float]
        Each client's importance, smoothed over its rounds.
    speeds : Mapping[str, Speeds]
        How fast each client seems to be, where somebody says what its steps took.
    """

    latest: Mapping[str, Observation] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)
    speeds: Mapping[str, Speeds] = field(default_factory=dict)

    def after(self, observations: Iterable[Observation]) -> Self:
        """Add what a round brought.

        Examples
        --------
        >>> seen = Observation(client_key="a", round_number=1, num_examples=10,
        ...                    loss_rms=2.0)
        >>> History().after([seen]).importance
        {'a': 20.0}
        """
        seen = list(observations)
        importance, speeds = dict(self.importance), dict(self.speeds)
        for each in seen:
            now = learned(speeds.get(each.client_key), each.work, each.step_seconds)
            if now is not None:
                speeds[each.client_key] = now
            importance[each.client_key] = importance_of(
                each.num_examples,
                each.loss_rms,
                before=importance.get(each.client_key, 0.0),
            )
        return type(self)(
            latest={**self.latest, **{each.client_key: each for each in seen}},
            importance=importance,
            speeds=speeds,
        )


NO_HISTORY = History()
