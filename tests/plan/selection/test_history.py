"""History: the last of each client, and a smoothed importance."""

from flwr_smartsplit.plan.selection.history import NO_HISTORY
from tests.plan.fleets import seen


def test_importance_is_examples_times_loss_smoothed() -> None:
    """10 x 1, then 0.7 x 10 + 0.3 x 10 x 3."""
    once = NO_HISTORY.after([seen("a", loss_rms=1.0)])
    twice = once.after([seen("a", round_number=2, loss_rms=3.0)])
    assert once.importance == {"a": 10.0}
    assert twice.importance["a"] == 0.7 * 10 + (1 - 0.7) * 30
    assert twice.latest["a"].round_number == 2
    assert NO_HISTORY.latest == {}
