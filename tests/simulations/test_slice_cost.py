"""The cost of slices: every size is measured, and the numbers are laid out."""

from functools import partial

import pytest
from rich.console import Console
from torch import nn

from flwr_smartsplit.errors import InvalidRoute
from simulations.slice_cost import SliceCost, cost_table, measure, task_of


def small_network() -> nn.Sequential:
    """Build two convolutions and an end."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=4),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@pytest.fixture(scope="module")
def costs() -> list[SliceCost]:
    """Measure a small network."""
    return measure(task_of(small_network), 3, batch_size=6)


def test_whole_and_sliced_steps_are_measured(costs):
    """Predictions hold, the peak falls, and numbers differ in their last bits only."""
    whole, *sliced = costs
    assert [cost.slice_size for cost in costs] == [None, 1, 4]
    assert all(cost.predicted_bytes == cost.measured_bytes for cost in costs)
    assert sliced[0].measured_bytes < sliced[1].measured_bytes < whole.measured_bytes
    assert whole.distance_fraction == whole.differing_fraction == 0.0
    assert all(0 < cost.distance_fraction < 1e-3 for cost in sliced)
    assert all(cost.front_seconds > 0 for cost in costs)


def test_a_failure_is_not_a_measurement():
    """A front that mixes samples is refused."""
    with pytest.raises(InvalidRoute, match="not known to treat samples one by one"):
        measure(task_of(partial(small_network)), 4, batch_size=3)


def test_the_table_shows_every_step(costs):
    """One row for each size."""
    console = Console(width=120)
    with console.capture() as captured:
        console.print(cost_table("small", costs))
    rows = captured.get().splitlines()
    assert [row.split()[1] for row in rows[-3:]] == ["whole", "1", "4"]
