"""Timelines: the rounds of a journal, laid along a clock."""

import pytest

from flwr_smartsplit.types import DeviceTraits, Link
from simulations.experiments.rows import MethodRun
from simulations.fleets.clock import Clock
from simulations.fleets.devices import FleetDevice, Watts
from simulations.report.summary import common_accuracy, timeline_of
from tests.simulations.fleets.test_clock import PROFILE
from tests.simulations.journals import client_row, evaluation_row, round_row


def device(flops_per_second):
    """Whole steps take it 1,800 FLOPs; messages take no time."""
    return FleetDevice(
        name="device",
        budget_bytes=None,
        traits=DeviceTraits(flops_per_second=flops_per_second, link=Link()),
        watts=Watts(compute=2.0, radio=1.0),
    )


CLOCK = Clock(profile=PROFILE, devices=(device(1800), device(3600)))
ROWS = [
    evaluation_row(0, 0.1, []),
    client_row(1, "0", route="whole", num_steps=2),
    client_row(1, "1", route="whole", num_steps=8),
    round_row(1, 9.0, 0),
    evaluation_row(1, 0.5, []),
    client_row(2, "0", route="whole", num_steps=3),
    client_row(2, "1", "not_sampled"),
    round_row(2, 9.0, 0),
    evaluation_row(2, 0.4, []),
    client_row(3, "1", "out_of_memory", route="whole", num_steps=2),
    round_row(3, 9.0, 0),
    evaluation_row(3, 0.7, []),
    client_row(4, "0", route="whole", num_steps=100),  # cut short: no round's row
]


def run_of(rows):
    return MethodRun.from_rows("method", rows)


def test_a_round_lasts_as_long_as_its_slowest_client():
    timeline = timeline_of(run_of(ROWS), CLOCK)

    assert timeline.seconds_by_round == {1: 4.0, 2: 3.0, 3: 1.0}
    assert timeline.seconds == 8.0
    assert timeline.accuracies == ((0.0, 0.1), (4.0, 0.5), (7.0, 0.4), (8.0, 0.7))


def test_energy_is_everybodys_not_the_slowest_ones():
    timeline = timeline_of(run_of(ROWS), CLOCK)

    assert timeline.device_joules == pytest.approx(2.0 * (2 + 4 + 3 + 1))
    assert timeline.edge_joules == 0.0


@pytest.mark.parametrize(
    ("accuracy", "seconds"), [(0.1, 0.0), (0.45, 4.0), (0.5, 4.0), (0.6, 8.0)]
)
def test_the_time_to_an_accuracy_is_when_it_is_first_reached(accuracy, seconds):
    assert timeline_of(run_of(ROWS), CLOCK).seconds_to(accuracy) == seconds


def test_an_accuracy_that_is_never_reached_has_no_time():
    assert timeline_of(run_of(ROWS), CLOCK).seconds_to(0.71) is None


def test_the_common_accuracy_is_the_worst_of_the_bests():
    other = run_of([evaluation_row(1, 0.65, []), evaluation_row(2, 0.3, [])])

    assert common_accuracy([run_of(ROWS), other]) == 0.65
    assert common_accuracy([run_of(ROWS), run_of([])]) is None
    assert common_accuracy([]) is None
