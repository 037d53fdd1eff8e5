"""Fleets: from hopeless to ample, for any model."""

import pytest

from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import Iid
from simulations.experiments.runner import prepared_fleet
from simulations.fleets.devices import Needs
from simulations.fleets.presets import half_weak, unlimited, weak_clients

PEAKS = [(1_000_000, 100_000), (1_328_896, 269_824), (134_455_840, 256_384)]


def budgets_of(fleet, whole, smallest, num_clients):
    needs = Needs(whole_peak_bytes=whole, smallest_peak_bytes=smallest)
    return [device.budget_bytes for device in fleet(needs, num_clients, 0)]


def fleet_problems(budgets, whole, smallest):
    """List what is wrong with a fleet of which half is weak, one of them hopeless."""
    weak = weak_clients(len(budgets))
    problems = []
    if list(budgets) != sorted(budgets):
        problems.append("not in rising order")
    if sum(budget < smallest for budget in budgets) != 1:
        problems.append("not exactly one fits nothing")
    if [client for client, b in enumerate(budgets) if b < whole] != list(weak):
        problems.append("the weak are not those below the whole model")
    if not any(b < 1.1 * smallest for b in budgets[1:]):
        problems.append("nobody is tight")
    if budgets[-1] < 2 * whole:
        problems.append("nobody has plenty")
    return problems


@pytest.mark.parametrize(("whole", "smallest"), PEAKS)
@pytest.mark.parametrize("num_clients", [4, 6, 20, 101])
def test_half_of_the_fleet_is_weak_and_one_client_fits_nothing(
    whole, smallest, num_clients
):
    budgets = budgets_of(half_weak, whole, smallest, num_clients)

    assert len(budgets) == num_clients
    assert fleet_problems(budgets, whole, smallest) == []


@pytest.mark.parametrize(
    ("client", "budget", "words"),
    [
        (0, 100_001, "not exactly one fits nothing"),
        (1, 99_999, "not exactly one fits nothing"),
        (9, 1_000_001, "the weak are not those below the whole model"),
        (10, 999_999, "the weak are not those below the whole model"),
        (19, 1_900_000, "nobody has plenty"),
        (3, 5, "not in rising order"),
    ],
)
def test_a_wrong_budget_would_be_noticed(client, budget, words):
    budgets = budgets_of(half_weak, 1_000_000, 100_000, 20)
    budgets[client] = budget

    assert words in fleet_problems(budgets, 1_000_000, 100_000)


def test_two_clients_are_one_hopeless_and_one_strong():
    assert budgets_of(half_weak, 1000, 100, 2) == [50, 1020]


def test_an_unlimited_fleet_has_no_budgets():
    assert budgets_of(unlimited, 1000, 100, 3) == [None, None, None]


def test_budgets_follow_the_predicted_peaks_of_the_model_at_hand():
    experiment = Experiment(
        name="test", methods=("smartsplit",), fleet=half_weak, partition=Iid()
    )

    prepared = prepared_fleet(experiment)

    assert prepared.needs.smallest_peak_bytes < prepared.needs.whole_peak_bytes
    assert prepared.devices == half_weak(prepared.needs, 20)
    assert prepared.clock.devices == prepared.devices
