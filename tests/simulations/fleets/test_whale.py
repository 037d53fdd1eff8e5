"""WHALE-FL's devices: the authors' times, by width."""

import json
from dataclasses import asdict

import pytest

from flwr_smartsplit import DeadlineWidths, VariantRequest
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import DeviceProfile
from simulations.experiments.clients import build_task
from simulations.experiments.errors import ExperimentError
from simulations.experiments.runner import prepared_fleet
from simulations.fleets.devices import Needs, device_from
from simulations.fleets.whale import TRANSFER_SECONDS, times_of, whale_devices
from simulations.methods.widths.whale import Timed
from simulations.studies.widths import DIGITS

NEEDS = Needs(whole_peak_bytes=2, smallest_peak_bytes=1)


def test_five_kinds_take_turns_and_survive_json() -> None:
    """Each with its times, which a journal's reader gets back."""
    devices = whale_devices(NEEDS, 7)
    assert [each.name for each in devices] == [*TRANSFER_SECONDS, *TRANSFER_SECONDS][:7]
    for device in devices:
        assert device_from(json.loads(json.dumps(asdict(device)))) == device


def test_a_round_takes_what_the_table_says() -> None:
    """Ten steps of 16 on the second kind: the half, and a quarter of its transfer."""
    clock = prepared_fleet(DIGITS).clock
    expected = 160 * 0.0127832 + 0.3088 / 4
    assert clock.round_seconds(1, "width 0.5", 160) == pytest.approx(expected)
    assert clock.round_seconds(1, "whole", 160) > 2 * expected
    with pytest.raises(ExperimentError, match=r"Xavier takes for 'width 0\.3'"):
        clock.round_seconds(1, "width 0.3", 160)


def test_narrower_is_faster_on_every_kind() -> None:
    """A planted slip in the table would break the order."""
    for kind in TRANSFER_SECONDS:
        each = [*times_of(kind).example_seconds.values()]
        assert len(each) == 5
        assert each == sorted(each, reverse=True)


def test_a_rule_is_told_the_tables_times() -> None:
    """Of all passes over a client's examples."""
    clock = prepared_fleet(DIGITS).clock
    groups = build_chain(build_task(DIGITS)).channels.groups
    device = DeviceProfile(
        client_key="1", budget_bytes=None, num_examples=80, batch_size=16
    )
    request = VariantRequest(device=device, round_number=1, groups=groups)
    half = clock.round_seconds(1, "width 0.5", 160)

    def widest(seconds: float) -> str:
        rule = Timed(DeadlineWidths(seconds), 2, clock.round_seconds)
        return rule.offered(request)[0].name

    assert (widest(half), widest(half - 1e-6)) == ("width 0.5", "width 0.25")
