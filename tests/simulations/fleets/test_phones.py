"""Phones: what is measured is kept, and the rest is drawn from the seed."""

from dataclasses import replace

import numpy as np
import pytest

from flwr_smartsplit.types import Link
from simulations.experiments.errors import ExperimentError
from simulations.fleets.clock import NOMINAL_FLOPS_PER_SECOND, NOMINAL_LINK
from simulations.fleets.devices import Needs, is_weak
from simulations.fleets.phone_tables import measured_links, phone_groups
from simulations.fleets.phones import (
    FLOPS_PER_SECOND_PER_POINT,
    GIGABYTE,
    Phones,
    link_rates,
)
from simulations.fleets.presets import phones, phones_near_edge, weak_clients

NEEDS = Needs(whole_peak_bytes=1_000_000, smallest_peak_bytes=100_000)


def fleet_problems(devices, needs):
    """List what is wrong with a fleet of which the first half is weak."""
    budgets = [device.budget_bytes for device in devices]
    weak = [number for number, device in enumerate(devices) if is_weak(device, needs)]
    problems = []
    if budgets != sorted(budgets):
        problems.append("not in rising order")
    if weak != list(weak_clients(len(devices))):
        problems.append("not the first half is weak")
    return problems


@pytest.mark.parametrize("num_clients", [2, 3, 20, 101])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_half_cannot_hold_the_model(num_clients, seed):
    devices = phones(NEEDS, num_clients, seed)

    assert len(devices) == num_clients
    assert fleet_problems(devices, NEEDS) == []


def test_a_strong_phone_among_the_weak_would_be_noticed():
    first, *others = phones(NEEDS, 6, 0)
    planted = replace(first, budget_bytes=2_000_000)

    assert fleet_problems([planted, *others], NEEDS) == [
        "not in rising order",
        "not the first half is weak",
    ]


def test_another_share_can_be_weak():
    devices = Phones(weak_fraction=0.25)(NEEDS, 40, 0)

    assert sum(is_weak(device, NEEDS) for device in devices) == 10


@pytest.mark.parametrize("weak_fraction", [0.0, 1.0, 2.0])
def test_a_share_that_is_none_is_refused(weak_fraction):
    with pytest.raises(ExperimentError, match="a share between 0 and 1"):
        Phones(weak_fraction=weak_fraction)


def test_scaled_budgets_keep_the_ratios_of_the_phones_own_memory():
    own = Phones(weak_fraction=None)(NEEDS, 50, 3)
    scaled = phones(NEEDS, 50, 3)

    ratios = [a.budget_bytes / b.budget_bytes for a, b in zip(own, scaled, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 50, rel=1e-3)
    assert [device.name for device in own] == [device.name for device in scaled]


def test_an_app_may_take_a_quarter_to_half_of_a_phone():
    for device in Phones(weak_fraction=None)(NEEDS, 100, 0):
        ram_bytes = float(device.name.split()[2]) * GIGABYTE
        assert 0.25 * ram_bytes - 1 <= device.budget_bytes <= 0.5 * ram_bytes


def test_phones_are_drawn_as_often_as_they_are_listed():
    devices = phones(NEEDS, 5000, 0)
    listed = sum(group.num_phones for group in phone_groups())

    for ram_gb in (1.0, 4.0, 8.0):
        share = sum(g.num_phones for g in phone_groups() if g.ram_gb == ram_gb) / listed
        drawn = sum(d.name == f"phone with {ram_gb:g} GB" for d in devices) / 5000
        assert drawn == pytest.approx(share, abs=0.025)
    speeds = {d.traits.flops_per_second / FLOPS_PER_SECOND_PER_POINT for d in devices}
    assert {round(speed, 1) for speed in speeds} == {
        group.float_score for group in phone_groups()
    }


def test_the_nominal_device_is_about_the_median_phone():
    devices = phones(NEEDS, 5000, 0)
    speeds = [device.traits.flops_per_second for device in devices]
    rates = np.array([(link.up_mean, link.down_mean) for link in measured_links()])

    assert np.median(speeds) == pytest.approx(NOMINAL_FLOPS_PER_SECOND, rel=0.05)
    assert np.median(rates, axis=0) * 125 == pytest.approx(
        [NOMINAL_LINK.up_bytes_per_second, NOMINAL_LINK.down_bytes_per_second], rel=0.01
    )


def test_links_have_the_means_that_were_measured():
    down, up = link_rates(np.random.default_rng(0), 40_000)

    links = measured_links()
    assert down.mean() == pytest.approx(
        125 * np.mean([link.down_mean for link in links]), rel=0.03
    )
    assert up.mean() == pytest.approx(
        125 * np.mean([link.up_mean for link in links]), rel=0.03
    )
    assert min(down.min(), up.min()) > 0


def test_one_seed_is_one_fleet_whatever_the_model():
    larger = replace(NEEDS, whole_peak_bytes=5_000_000)
    one, again, other = phones(NEEDS, 9, 4), phones(NEEDS, 9, 4), phones(NEEDS, 9, 5)

    assert one == again
    assert one != other
    assert [d.traits for d in phones(larger, 9, 4)] == [d.traits for d in one]


def test_free_memory_begins_at_the_budget_and_never_exceeds_it():
    for device in phones(NEEDS, 30, 0):
        assert device.free_memory[0] == 1.0
        assert 0.85 <= min(device.free_memory) < 1.0 == max(device.free_memory)
        assert len(set(device.speed)) > 1
        assert min(device.speed) > 0


def test_a_steady_fleet_is_the_same_without_traces():
    steady = Phones(is_steady=True)(NEEDS, 9, 4)
    moving = phones(NEEDS, 9, 4)

    assert steady == tuple(replace(d, free_memory=(), speed=()) for d in moving)


def test_links_that_change_leave_the_rest_of_a_fleet():
    moving = Phones(link_deviation=0.4)(NEEDS, 200, 4)

    assert tuple(replace(d, link_speed=()) for d in moving) == phones(NEEDS, 200, 4)
    rates = np.log([device.link_speed for device in moving])
    assert rates.std() == pytest.approx(0.4, rel=0.05)
    assert abs(np.median(rates)) < 0.05
    assert len({device.link_speed for device in moving}) == 200
    with pytest.raises(ExperimentError, match="link_deviation is -1"):
        Phones(link_deviation=-1)


def test_a_near_edge_has_a_link_of_its_own_under_each_name():
    needs = replace(NEEDS, edges=("edge-1", "edge-2"))

    for device in phones_near_edge(needs, 3, 0):
        assert device.traits.link_to("edge-2") == phones_near_edge.edge_link
        assert isinstance(device.traits.link, Link)
        assert device.traits.link != phones_near_edge.edge_link
    assert phones(needs, 3, 0)[0].traits.edge_links == {}
