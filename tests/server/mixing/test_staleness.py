"""Mixings by staleness: hand-worked weights, and what stays bit for bit."""

from typing import Any

import numpy as np
import pytest

from flwr_smartsplit import DynamicStaleness, PolynomialStaleness
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.server.aggregation import (
    Replace,
    RoundSummary,
    WeighedMixing,
)
from flwr_smartsplit.server.mixing.staleness import mixed

BEFORE = {
    "w": np.array([0.1, -0.0, 3.0, np.inf], np.float32),
    "n": np.array([4], np.int64),
    "z": np.array([1 + 2j], np.complex64),
    "d": np.array([0.1, 1 / 3]),
}
AFTER = {
    "w": np.array([0.3, -0.0, 1.0, np.inf], np.float32),
    "n": np.array([9], np.int64),
    "z": np.array([3 - 2j], np.complex64),
    "d": np.array([0.1, 2 / 3]),
}


def summary(merge: int, staleness: int) -> RoundSummary:
    """Describe a merge."""
    return RoundSummary(round_number=merge, staleness=staleness, reports={})


def bits(state: Any) -> dict[str, bytes]:
    """Return what must be alike."""
    return {name: array.tobytes() for name, array in state.items()}


@pytest.mark.parametrize(
    ("mixing", "merge", "staleness", "weight"),
    [
        (PolynomialStaleness(), 7, 0, 0.6),
        (PolynomialStaleness(), 7, 3, 0.3),
        (PolynomialStaleness(alpha=0.8, power=1), 1, 3, 0.2),
        (PolynomialStaleness(alpha=1.0, power=0), 9, 8, 1.0),
        (DynamicStaleness.as_published(), 1, 0, 0.5),
        (DynamicStaleness.as_published(), 4, 3, 0.2),
        (DynamicStaleness(), 4, 3, 0.55 / 1.55),
        (DynamicStaleness(sigma=0.0, iota=0.0, mu=3.0), 9, 5, 0.5),
        (DynamicStaleness(lambda_=2.0, sigma=2.0, iota=0.0), 4, 3, 0.2),
    ],
)
def test_weights_are_the_formulas(
    mixing: Any, merge: int, staleness: int, weight: float
) -> None:
    """Worked out by hand; planted: a staleness that is one too large is another."""
    assert mixing.weight(summary(merge, staleness)) == pytest.approx(weight, rel=1e-12)
    made = mixing.mix(BEFORE, AFTER, summary(merge, staleness))
    assert bits(made) == bits(
        mixed(BEFORE, AFTER, mixing.weight(summary(merge, staleness)))
    )
    depends = (mixing.power if hasattr(mixing, "power") else mixing.sigma) > 0
    other = mixing.weight(summary(merge, staleness + 1))
    assert (other != pytest.approx(weight)) == depends


def test_nothing_and_all_are_exact() -> None:
    """At 0 and 1 the bits of either; between, equal values keep theirs."""
    assert bits(mixed(BEFORE, AFTER, 0.0)) == bits(BEFORE)
    assert bits(mixed(BEFORE, AFTER, 1.0)) == bits(AFTER)
    assert bits(mixed(BEFORE, BEFORE, 0.3)) == bits(BEFORE)
    half = mixed(BEFORE, AFTER, 0.5)
    wide = BEFORE["w"].astype(np.float64)
    expected = wide[:1] + 0.5 * (AFTER["w"].astype(np.float64)[:1] - wide[:1])
    assert half["w"][:1].tobytes() == expected.astype(np.float32).tobytes()
    assert half["w"][3] == np.inf
    assert (half["n"], half["z"]) == (6, 2)
    assert {n: a.dtype for n, a in half.items()} == {
        n: a.dtype for n, a in BEFORE.items()
    }
    assert bits(mixed(BEFORE, AFTER, 1 - 1e-6)) != bits(AFTER)


@pytest.mark.parametrize("weight", [-0.1, 1.5, np.nan, np.inf])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    """Whose it is, and what to return."""
    with pytest.raises(SmartSplitError, match=r"mine.*return a number from 0"):
        mixed(BEFORE, AFTER, weight, maker="mine")


def test_numbers_out_of_range_are_refused() -> None:
    """When they are given."""
    for make, given in [
        (PolynomialStaleness, {"alpha": 0.0}),
        (PolynomialStaleness, {"alpha": 1.1}),
        (PolynomialStaleness, {"power": -1.0}),
        (DynamicStaleness, {"iota": np.nan}),
        (DynamicStaleness, {"mu": 0.0}),
        (DynamicStaleness, {"lambda_": 0.0, "iota": 0.0}),
    ]:
        with pytest.raises(ValueError, match=r"give a number|must be above 0"):
            make(**given)


def test_the_journal_asks_those_that_have_a_weight() -> None:
    """``Replace`` has none."""
    assert isinstance(PolynomialStaleness(), WeighedMixing)
    assert not isinstance(Replace(), WeighedMixing)
