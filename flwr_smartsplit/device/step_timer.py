"""StepTimer: seconds per training step, which the device reports to its edge."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from flwr_smartsplit.types import ClientPlan, RecomputePlan, Route

StepSeconds = Callable[[ClientPlan, Route, RecomputePlan], float]
"""Predicts the seconds of a step, instead of a clock."""

_WARM_UP_STEPS = 2
"""The first steps on a route are slower: they allocate, and are metered."""


class StepTimer:
    """Measure a client's steps by a clock, or take their seconds from ``given``."""

    def __init__(
        self,
        plan: ClientPlan,
        *,
        clock: Callable[[], float],
        given: StepSeconds | None = None,
    ) -> None:
        self.given = None if given is None else partial(given, plan)
        self._clock = clock
        self._measured: list[float] = []
        self._measured_at: tuple[Route, RecomputePlan] | None = None

    @contextmanager
    def step(self, route: Route, recompute: RecomputePlan) -> Iterator[None]:
        """Measure a step; another route or plan starts over."""
        if self._measured_at != (route, recompute):
            self._measured_at, self._measured = (route, recompute), []
        start = self._clock()
        yield
        self._measured.append(self._clock() - start)

    def latest(self, route: Route, recompute: RecomputePlan) -> float | None:
        """Return the last step's seconds; None if none counts yet."""
        if self.given is not None:
            return self.given(route, recompute)
        steps = self._steps(route, recompute)
        return steps[-1] if steps else None

    def mean(self, route: Route, recompute: RecomputePlan) -> float | None:
        """Return a step's mean seconds; None if none counts yet."""
        if self.given is not None:
            return self.given(route, recompute)
        steps = self._steps(route, recompute)
        return sum(steps) / len(steps) if steps else None

    def _steps(self, route: Route, recompute: RecomputePlan) -> list[float]:
        """List the steps that count: those after the warm-up."""
        if self._measured_at != (route, recompute):
            return []
        return self._measured[_WARM_UP_STEPS:]
