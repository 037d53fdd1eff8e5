"""What the server's data count, against values worked out by hand."""

from math import log, log2

import pytest

from flwr_smartsplit.plan.divergence import (
    Holding,
    divergence_bits,
    pooled,
    server_weight,
)


def test_counts_are_pooled_class_by_class() -> None:
    """Whoever names fewer classes has none of the others."""
    assert pooled([(1, 0, 2), (3,), (0, 5)]) == (4, 5, 2)
    assert pooled([]) == ()


def test_the_divergence_is_in_bits() -> None:
    """p = (1, 0), q = (1/2, 1/2): mean (3/4, 1/4); the natural logarithm is seen."""
    half = (log2(1 / 0.75) + 0.5 * log2(0.5 / 0.75) + 0.5 * log2(0.5 / 0.25)) / 2
    found = divergence_bits((7,), (4, 4))
    assert found == pytest.approx(half, abs=1e-12)
    assert found != pytest.approx(half * log(2), abs=1e-3)  # Planted


@pytest.mark.parametrize(
    ("one", "other"), [((3, 1, 0), (0, 2, 9)), ((5,), (1, 1, 1)), ((0, 1), (9, 0))]
)
def test_the_divergence_is_symmetric_and_at_most_one(
    one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    """And 0 of anything with itself, however large."""
    assert divergence_bits(one, other) == divergence_bits(other, one)
    assert 0 < divergence_bits(one, other) <= 1
    assert divergence_bits(one, tuple(7 * n for n in one)) == 0
    assert divergence_bits((4, 0), (0, 9)) == 1


def weight(accuracy: float, n0: int, d0: float, n1: int, d1: float) -> float:
    """Write it in the order of the formula."""
    server = Holding(num_examples=n0, noniid=d0)
    clients = Holding(num_examples=n1, noniid=d1)
    return server_weight(accuracy, server=server, clients=clients)


def test_the_weight_against_values_by_hand() -> None:
    """(1 - 0.4) * 200 * 0.5 / (200 * 0.5 + 300 * 0.1) = 60 / 130."""
    assert weight(0.4, 200, 0.1, 300, 0.5) == pytest.approx(60 / 130)
    assert weight(0.4, 200, 0.5, 300, 0.1) == pytest.approx(0.6 * 20 / 170)  # Swapped
    assert weight(1.0, 200, 0.1, 300, 0.5) == 0
    assert weight(0.4, 200, 0.1, 300, 0.0) == 0  # The round is as all clients are
    assert weight(0.4, 200, 0.0, 300, 0.5) == pytest.approx(0.6)


def test_where_nobody_differs_the_numbers_of_examples_are_left() -> None:
    """0/0 has no value in the paper: n0 / (n0 + n')."""
    assert weight(0.5, 100, 0.0, 300, 0.0) == pytest.approx(0.5 * 0.25)
