"""What a step takes: measured after a warm-up on each way, or given."""

from collections.abc import Iterator

from flwr_smartsplit import RecomputePlan, Route
from flwr_smartsplit.device.step_timer import StepTimer
from flwr_smartsplit.types import KEEP_ALL, Rerun
from tests.tasks import client_plan, initial_state

PLAN = client_plan(0, Route.split(3), initial_state(), addresses={"edge": "e"})
WAY = (Route.split(3), KEEP_ALL)
OTHER = (Route.split(2), KEEP_ALL)


def measured(*seconds: float, way: tuple[Route, RecomputePlan] = WAY) -> StepTimer:
    """Do steps that take so long by a clock of our own."""

    def times() -> Iterator[float]:
        now = 100.0
        for each in seconds:
            yield now
            now += each
            yield now

    clock = times()
    timer = StepTimer(PLAN, clock=lambda: next(clock))
    for _ in seconds:
        with timer.step(*way):
            pass
    return timer


def test_the_first_two_steps_do_not_count() -> None:
    """They allocate what later ones find, and the cap looks at them."""
    assert measured(9.0, 9.0).latest(*WAY) is None
    timer = measured(9.0, 9.0, 1.0, 2.0)
    assert (timer.latest(*WAY), timer.mean(*WAY)) == (2.0, 1.5)


def test_another_way_begins_anew() -> None:
    """Another route, or another plan; times of the way before say nothing."""
    timer = measured(1.0, 1.0, 1.0)
    again = (WAY[0], RecomputePlan((Rerun(0, 2),)))
    assert timer.latest(*OTHER) is timer.latest(*again) is timer.mean(*OTHER) is None
    timer._clock = lambda: 0.0
    with timer.step(*OTHER):
        pass
    assert timer.latest(*WAY) is timer.latest(*OTHER) is None


def test_seconds_that_are_given_are_not_measured() -> None:
    """They are known before the first step, and for every way."""
    timer = StepTimer(
        PLAN,
        clock=lambda: 0.0,
        given=lambda plan, route, recompute: route.cuts[0] + plan.round_number / 2,
    )
    assert (timer.latest(*WAY), timer.mean(*OTHER)) == (3.5, 2.5)
