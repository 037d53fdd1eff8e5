"""What adds up: means over examples, and the passes of who is released."""

import pytest

from flwr_smartsplit.device.metrics import Metrics
from flwr_smartsplit.types import Action, Advice, Move, Replan


def counted(*sizes: list[int], released: str = "") -> Metrics:
    """Go through passes with batches of these sizes; the loss is the batch's number."""
    metrics = Metrics()
    for epoch in sizes:
        metrics.begin_epoch()
        for size in epoch:
            loss = metrics.num_steps + 1.0
            metrics.count(size, {"loss": loss, "accuracy": 1 / loss})
    metrics.released = released
    return metrics


def test_means_are_over_examples() -> None:
    """Three of loss 1 and one of loss 2: mean 5/4, mean square 7/4."""
    report = counted([3, 1]).report(num_epochs=1)
    assert (report.loss, report.loss_rms) == (1.25, 1.75**0.5)
    assert report.metrics == {"accuracy": 3.5 / 4}
    assert counted([3, 1]).loss_sum == 5.0


def test_examples_are_those_of_one_pass() -> None:
    """Both are in the report."""
    report = counted([4, 3], [4, 3]).report(num_epochs=2)
    assert (report.num_examples, report.num_epochs, report.num_steps) == (7, 2, 4)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([[4, 4]], (8, 1)),
        ([[4, 3], [4]], (7, 2)),
        ([[4, 3], [4, 3], []], (7, 2)),
        ([[4, 3], [4, 3], [4]], (7, 3)),
    ],
)
def test_who_is_released_counts_what_it_trained_on(
    sizes: list[list[int]], expected: tuple[int, int]
) -> None:
    """Each example once, and the passes that it began."""
    report = counted(*sizes, released="slow").report(num_epochs=5)
    assert (report.num_examples, report.num_epochs) == expected
    assert report.released == "slow"


def test_what_changed_is_noted_with_the_step() -> None:
    """In order."""
    metrics = counted([4, 4])
    metrics.move(5, 3, "slow")
    metrics.replan("none", "[0:3]", "tight")
    report = metrics.report(num_epochs=1)
    assert report.moves == (Move(step=2, before=5, after=3, reason="slow"),)
    after = Replan(step=2, before="none", after="[0:3]", reason="tight")
    assert report.replans == (after,)


def test_only_one_kind_of_advice_is_a_release() -> None:
    """It stays one, and its reason is kept."""
    metrics = counted([4])
    assert not metrics.is_released(None)
    assert not metrics.is_released(Advice(Action.EARLIER, "slow"))
    assert metrics.is_released(Advice(Action.RELEASE, "too slow"))
    assert metrics.is_released(None)
    assert metrics.report(num_epochs=1).released == "too slow"


def test_nothing_is_no_reason_to_divide_by_it() -> None:
    """A client that failed before its first step has a report, too."""
    report = Metrics().report(num_epochs=1)
    assert (report.num_examples, report.loss, report.metrics) == (0, 0.0, {})
