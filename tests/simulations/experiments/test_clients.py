"""Clients: the budgets and the traits of their devices."""

from collections import Counter
from dataclasses import replace

import pytest

from flwr_smartsplit.types import DeviceTraits
from simulations.experiments.clients import budget_of, traits_of
from simulations.experiments.data import client_indices, load_images
from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import OwnLabels
from simulations.fleets.devices import FleetDevice
from simulations.fleets.presets import half_weak

DIGITS = Experiment(
    name="test",
    methods=("fedavg",),
    fleet=half_weak,
    partition=OwnLabels(),
    num_clients=4,
)
DEVICE = FleetDevice(
    name="phone", budget_bytes=1000, traits=DeviceTraits(flops_per_second=7.0)
)


@pytest.mark.parametrize("budget_bytes", [1000, None])
def test_a_budget_that_stays_is_a_number(budget_bytes):
    assert budget_of(replace(DEVICE, budget_bytes=budget_bytes)) == budget_bytes


def test_free_memory_is_a_trace_that_begins_anew_when_it_ends():
    budget = budget_of(replace(DEVICE, free_memory=(1.0, 0.9, 0.8)))

    found = [budget.read(step=step, live_bytes=5) for step in range(5)]
    assert found == [1000, 900, 800, 1000, 900]


def test_labels_stay_at_home_unless_the_experiment_shares_them():
    assert traits_of(DIGITS, 3, DEVICE) is DEVICE.traits


def test_shared_labels_are_counted_by_class():
    sharing = replace(DIGITS, share_labels=True)

    traits = traits_of(sharing, 3, DEVICE)

    held = Counter(load_images(sharing).y_train[client_indices(sharing)[3]].tolist())
    assert traits.label_counts == tuple(held[label] for label in range(10))
    assert traits.label_counts[:5] == (0,) * 5  # only the weak half has these
    assert traits.flops_per_second == 7.0
