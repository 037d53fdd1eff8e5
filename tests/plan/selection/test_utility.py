"""Factors of the utility, worked out by hand."""

from math import log

import numpy as np
import pytest

from flwr_smartsplit.plan.selection.history import NO_HISTORY
from flwr_smartsplit.plan.selection.utility import factors_of, normalised
from tests.plan.fleets import candidate, seen


def test_factors_are_those_worked_out_by_hand() -> None:
    """Examples x loss; budget over 40 bytes; one over the seconds; rounds to wait."""
    fleet = [
        candidate("a", seconds=(8.0, 2.0), num_examples=10, budget_bytes=10),
        candidate("b", num_examples=20, budget_bytes=400),
        candidate("c", num_examples=30),
    ]
    history = NO_HISTORY.after(
        [seen("a", round_number=2, loss_rms=3.0), seen("b", round_number=4, loss_rms=1)]
    )
    found = factors_of(fleet, history, round_number=5, num_clients=2)
    # c was never seen: the median loss of the others, 2.
    assert np.exp(found.loss) == pytest.approx([30.0, 20.0, 60.0])
    assert found.memory == pytest.approx([log(0.25), 0.0, 0.0])
    assert found.speed[0] == pytest.approx(-log(2.0))
    assert np.isnan(found.speed[1:]).all()
    # Two of three each round: 2, 0 and 4 rounds are 4/3, 0 and 8/3 turns.
    assert found.waiting == pytest.approx([4 / 3, 0.0, 8 / 3])


def test_normalising_ignores_what_is_unknown() -> None:
    """It counts as average, and does not move the average."""
    found = normalised(np.array([2.0, np.nan, 4.0]))
    assert found.tolist() == [-1.0, 0.0, 1.0]


def test_normalising_what_does_not_differ_gives_zeros() -> None:
    """Not rounding errors blown up."""
    assert normalised(np.array([0.1 + 0.2, 0.3, 0.3])).tolist() == [0, 0, 0]
    assert normalised(np.array([])).tolist() == []
    assert normalised(np.array([np.nan])).tolist() == [0]


def test_outliers_are_cut_off() -> None:
    """At three deviations."""
    found = normalised(np.array([0.0] * 99 + [1e9]))
    assert found.max() == 3.0
