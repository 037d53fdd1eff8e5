"""What a step takes: measured after a warm-up on each way, or given."""

from collections.abc import Iterator

from flwr_smartsplit import RecomputePlan, Route
from flwr_smartsplit.device.step_timer import Pace
from flwr_smartsplit.types import KEEP_ALL, Rerun
from tests.tasks import client_plan, initial_state

PLAN = client_plan(0, Route.split(3), initial_state(), addresses={"edge": "e"})
WAY = (Route.split(3), KEEP_ALL)
OTHER = (Route.split(2), KEEP_ALL)


def measured(*seconds: float, way: tuple[Route, RecomputePlan] = WAY) -> Pace:
    """Do steps that take so long by a clock of our own."""

    def times() -> Iterator[float]:
        now = 100.0
        for each in seconds:
            yield now
            now += each
            yield now

    clock = times()
    pace = Pace(PLAN, clock=lambda: next(clock))
    for _ in seconds:
        with pace.step(*way):
            pass
    return pace


def test_the_first_two_steps_do_not_count() -> None:
    """They allocate what later ones find, and the cap looks at them."""
    assert measured(9.0, 9.0).latest(*WAY) is None
    pace = measured(9.0, 9.0, 1.0, 2.0)
    assert (pace.latest(*WAY), pace.mean(*WAY)) == (2.0, 1.5)


def test_another_way_begins_anew() -> None:
    """Another route, or another plan; times of the way before say nothing."""
    pace = measured(1.0, 1.0, 1.0)
    again = (WAY[0], RecomputePlan((Rerun(0, 2),)))
    assert pace.latest(*OTHER) is pace.latest(*again) is pace.mean(*OTHER) is None
    pace._clock = lambda: 0.0
    with pace.step(*OTHER):
        pass
    assert pace.latest(*WAY) is pace.latest(*OTHER) is None


def test_seconds_that_are_given_are_not_measured() -> None:
    """They are known before the first step, and for every way."""
    pace = Pace(
        PLAN,
        clock=lambda: 0.0,
        given=lambda plan, route, recompute: route.cuts[0] + plan.round_number / 2,
    )
    assert (pace.latest(*WAY), pace.mean(*OTHER)) == (3.5, 2.5)
