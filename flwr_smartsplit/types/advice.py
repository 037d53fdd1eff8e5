"""What an edge knows of a round's clients, and its advice to one of them."""

from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf


class Action(StrEnum):
    """What an edge advises a device to do from its next step on."""

    EARLIER = "earlier"
    LATER = "later"
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class Advice:
    """An action, and the reason for the journal."""

    action: Action
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """What is usual among the clients of a round, to find stragglers.

    In a client's plan, ``median_step_seconds`` is the step time that makes its round as
    long as the median round: a client with fewer steps has more time for each. A device
    is slow above ``slow_factor`` times that, and fast below ``fast_factor`` times.
    Importance is that of ``importance_of``.
    """

    median_step_seconds: float
    median_importance: float
    low_importance: float  # the lower quartile
    relieves_edge: bool = True  # whether fast devices take work off the edge
    slow_factor: float = 1.5
    fast_factor: float = 0.7
    patience_steps: int = 2  # so many steps in a row must call for the same change
    spacing_steps: int = 4  # at least so many steps lie between two changes

    def __post_init__(self) -> None:
        if not 0 < self.median_step_seconds < inf:
            raise ValueError(
                f"median_step_seconds is {self.median_step_seconds}: give a time "
                "above 0."
            )
        if not 0 <= self.low_importance <= self.median_importance < inf:
            raise ValueError(
                f"low_importance is {self.low_importance}, median_importance "
                f"{self.median_importance}: give finite numbers of at least 0, the "
                "low one not above the median."
            )

    def for_steps(self, num_steps: int) -> "Cohort":
        """Turn the cohort of whole rounds into that of one client's steps."""
        seconds = self.median_step_seconds / max(num_steps, 1)
        return replace(self, median_step_seconds=seconds)
