"""The time of a run: a grid's own, if it simulates one, or that of the clock."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Time(Protocol):
    """What time it is, and how to let it pass; a grid that simulates time has both."""

    def seconds(self) -> float:
        """Return seconds that only move forward."""

    def wait(self, most_seconds: float) -> None:
        """Return when a reply may have come, or after so many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockTime:
    """The time of a real grid, which is asked again and again."""

    clock: Callable[[], float]
    poll_seconds: float

    def seconds(self) -> float:
        """Return the clock's seconds."""
        return self.clock()

    def wait(self, most_seconds: float) -> None:
        """Sleep until the grid is to be asked again."""
        time.sleep(max(min(self.poll_seconds, most_seconds), 0.0))
