"""What an edge knows of the others when it judges a client, and what it then says."""

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
    """An action, and why, for the journal."""

    action: Action
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """What is usual among the clients of a round.

    Parameters
    ----------
    median_step_seconds : float
        What a training step takes. In a client's plan: what one of its steps may take
        for its round to be as long as the median one; who has fewer steps has more
        time for each.
    median_importance : float
        Half of the clients are at least as important (see ``importance_of``).
    low_importance : float
        A quarter of them are at most as important.
    relieves_edge : bool
        Whether fast devices should take work off the edge.
    slow_factor, fast_factor : float
        A device is slow above, and fast below, so many times the median step.
    patience_steps : int
        So many steps in a row must speak for the same change.
    spacing_steps : int
        At least so many steps lie between two changes.

    Raises
    ------
    ValueError
        If a number means nothing.
    """

    median_step_seconds: float
    median_importance: float
    low_importance: float
    relieves_edge: bool = True
    slow_factor: float = 1.5
    fast_factor: float = 0.7
    patience_steps: int = 2
    spacing_steps: int = 4

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
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
        """Say the same to a client, if this was said of whole rounds.

        Parameters
        ----------
        num_steps : int
            How many steps its round has.
        """
        return replace(
            self, median_step_seconds=self.median_step_seconds / max(num_steps, 1)
        )
