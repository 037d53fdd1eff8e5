"""Label coverage: divergences worked out by hand."""

import numpy as np
import pytest

from flwr_smartsplit.plan.selection.label_coverage import coverage_gains, divergence

EVEN = np.array([0.5, 0.5])


def test_divergences_are_those_worked_out_by_hand() -> None:
    """One of two even classes: (log 4/3 + (log 2/3 + log 2)/2) / 2."""
    by_hand = (np.log(4 / 3) + (np.log(2 / 3) + np.log(2)) / 2) / 2
    assert divergence(np.array([7.0, 0.0]), EVEN) == pytest.approx(by_hand)
    assert divergence(np.array([3.0, 3.0]), EVEN) == pytest.approx(0.0)
    nothing_in_common = divergence(np.array([5.0, 0.0]), np.array([0.0, 1.0]))
    assert nothing_in_common == pytest.approx(np.log(2))
    assert divergence(np.zeros(2), EVEN) == pytest.approx(np.log(2))


def test_sizes_do_not_count_but_shares_do() -> None:
    """Ten times the examples are the same distribution."""
    counts = np.array([[1.0, 2.0], [10.0, 20.0], [2.0, 1.0]])
    found = divergence(counts, np.array([0.3, 0.7]))
    assert found[0] == pytest.approx(found[1])
    assert found[0] < found[2]


def test_what_is_missing_gains_most() -> None:
    """With class 0 there, more of it makes it worse, class 1 better."""
    counts = np.array([[4.0, 0.0], [0.0, 4.0], [2.0, 2.0]])
    gains = coverage_gains(np.array([4.0, 0.0]), counts, EVEN)
    assert gains.argmax() == 1
    assert gains[1] == pytest.approx(divergence(np.array([4.0, 0.0]), EVEN))
    assert gains[0] == pytest.approx(0.0)
    assert 0 < gains[2] < gains[1]
