"""The table of asynchronous runs: what it reads off, and that it runs twice alike."""

from dataclasses import replace

import pytest

from simulations.benchmarks import asynchronous
from simulations.benchmarks.asynchronous import EXPERIMENT, RULES, Point, at, reached

POINTS = [Point(0.0, 0.1), Point(2.0, 0.6), Point(3.0, 0.5), Point(9.0, 0.7)]


def test_accuracy_at_a_time_and_time_of_an_accuracy() -> None:
    """The newest model counts; the first that is as good."""
    assert [at(POINTS, seconds) for seconds in (0.0, 2.9, 3.0, 99.0)] == [
        0.1,
        0.6,
        0.5,
        0.7,
    ]
    assert [reached(POINTS, each) for each in (0.1, 0.5, 0.7, 0.8)] == [0, 2, 9, None]


@pytest.mark.slow
def test_a_phone_fleet_runs_twice_alike() -> None:
    """On the fleet's clock; each rule is another run."""
    small = replace(EXPERIMENT, max_train_examples=200, max_test_examples=64)
    runs = [
        asynchronous.measured(small, RULES[name], num_rounds=2)
        for name in ("FedAsync", "FedAsync", asynchronous.SYNCHRONOUS)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][-1].seconds < runs[2][-1].seconds
