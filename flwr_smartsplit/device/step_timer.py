"""StepTimer: what a training step takes, as its edge is told."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from flwr_smartsplit.types import ClientPlan, RecomputePlan, Route

StepSeconds = Callable[[ClientPlan, Route, RecomputePlan], float]
"""Says what a step takes, in place of a clock."""

_WARM_UP_STEPS = 2
"""The first steps on a route allocate, and are metered."""


class StepTimer:
    """Measure a client's steps, or have somebody say what they take.

    Parameters
    ----------
    plan : ClientPlan
        Whose steps they are.
    clock : Callable[[], float]
        Seconds that only move forward.
    given : Callable[[ClientPlan, Route, RecomputePlan], float], optional
        Says what a step takes, on any route; then nothing is measured.
    """

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
        """Measure a step; another route or plan begins anew."""
        if self._measured_at != (route, recompute):
            self._measured_at, self._measured = (route, recompute), []
        start = self._clock()
        yield
        self._measured.append(self._clock() - start)

    def latest(self, route: Route, recompute: RecomputePlan) -> float | None:
        """Return the seconds of the last step here; None if none counts yet."""
        if self.given is not None:
            return self.given(route, recompute)
        steps = self._steps(route, recompute)
        return steps[-1] if steps else None

    def mean(self, route: Route, recompute: RecomputePlan) -> float | None:
        """Return the mean seconds of a step here; None if none counts yet."""
        if self.given is not None:
            return self.given(route, recompute)
        steps = self._steps(route, recompute)
        return sum(steps) / len(steps) if steps else None

    def _steps(self, route: Route, recompute: RecomputePlan) -> list[float]:
        """List the steps that count."""
        if self._measured_at != (route, recompute):
            return []
        return self._measured[_WARM_UP_STEPS:]
