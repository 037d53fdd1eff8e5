"""What rounds teach: cohorts by whole rounds, observations by what was said."""

from flwr_smartsplit.flower.observing import cohort_in
from flwr_smartsplit.policy.history import NO_HISTORY
from flwr_smartsplit.types import Assignment, Cohort, DeviceProfile, Route
from tests.policy.fleets import seen


def assigned(key: str, seconds: float | None) -> Assignment:
    """Choose a client whose round should take so long."""
    return Assignment(
        client_key=key,
        route=Route.whole(),
        budget_bytes=None,
        predicted_peak_bytes=1,
        predicted_seconds=seconds,
    )


def test_a_cohort_is_of_rounds_and_each_client_is_told_it_for_its_steps() -> None:
    """Rounds of 6, 30 and 5 steps of 2 s; who has 5 steps has 6 / 5 s for each."""
    devices = {
        key: DeviceProfile(
            client_key=key, budget_bytes=None, num_examples=20, batch_size=4
        )
        for key in "abc"
    }
    history = NO_HISTORY.after(
        [seen("a", num_examples=10), seen("c", num_examples=30, step_seconds=2.0)]
    )
    chosen = [assigned("a", 6.0), assigned("b", 30.0), assigned("c", None)]
    found = cohort_in(chosen, devices, history)
    assert found == Cohort(
        median_step_seconds=10.0, median_importance=20.0, low_importance=15.0
    )
    assert found is not None
    assert found.for_steps(5).median_step_seconds == 2.0
    assert found.for_steps(5).low_importance == 15.0


def test_without_any_speed_there_is_no_cohort() -> None:
    """So edges advise nobody."""
    assert cohort_in([assigned("a", None)], {}, NO_HISTORY) is None
