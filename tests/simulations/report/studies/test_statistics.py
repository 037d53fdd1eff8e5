"""Statistics, against numbers worked out by hand and from a printed table of t."""

import pytest

from simulations.report.studies.cells import (
    Estimate,
    estimate,
    geometric_mean_ratio,
    paired_difference,
)


def test_the_interval_is_that_of_the_t_table():
    """Mean 3, deviation sqrt(2.5); t of 4 degrees at 97.5 % is 2.776."""
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])

    assert found.mean == 3.0
    assert found.half_width == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=1e-3)
    assert found.num == 5


def test_a_pair_is_one_seed_of_both():
    found = paired_difference({0: 0.5, 1: 0.6, 2: 0.9}, {2: 0.8, 1: 0.7, 3: 0.0})

    assert found.num == 2
    assert found.mean == pytest.approx(0.0)


def test_pairs_are_sharper_than_the_spread_of_the_seeds():
    """Else seeds that are hard for everybody would hide a difference."""
    first = {0: 0.1, 1: 0.5, 2: 0.9}
    second = {seed: value - 0.02 for seed, value in first.items()}

    paired = paired_difference(first, second)
    unpaired = estimate([0.1 - 0.88, 0.5 - 0.48, 0.9 - 0.08])

    assert paired.mean == pytest.approx(unpaired.mean) == pytest.approx(0.02)
    assert paired.half_width < 0.02 < unpaired.half_width


def test_one_seed_has_a_mean_and_no_interval():
    found = estimate([0.5])

    assert found == Estimate(mean=0.5, half_width=None, num=1)
    assert found.text() == "+50.0"


def test_nothing_gives_nothing():
    assert estimate([]) is None
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert geometric_mean_ratio({0: 1.0}, {1: 1.0}) is None


def test_ratios_are_averaged_so_that_twice_and_half_cancel():
    assert geometric_mean_ratio({0: 2.0, 1: 1.0}, {0: 1.0, 1: 2.0}) == pytest.approx(1)
    assert geometric_mean_ratio({0: 2.0}, {0: 1.0}) == pytest.approx(2)
