"""The guard's cost is measured beside a step of the stock model."""

from simulations.benchmarks.guard_cost import measure
from tests.tasks import TASK


def test_the_guard_costs_more_than_the_stock_steps_and_at_most_ten():
    cost = measure(TASK)
    assert 6 < cost.num_steps <= 10
    assert cost.seconds > cost.step_seconds > 0
