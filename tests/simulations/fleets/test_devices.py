"""Simulated devices: they come back from JSON as they were."""

import json
from dataclasses import asdict, replace

import pytest

from flwr_smartsplit.types import DeviceTraits
from simulations.fleets.devices import Needs, device_from, is_weak
from simulations.fleets.presets import FLEETS

NEEDS = Needs(whole_peak_bytes=1000, smallest_peak_bytes=100, edges=("near", "far"))


@pytest.mark.parametrize("name", FLEETS)
def test_a_device_comes_back_from_json(name):
    for device in FLEETS[name](NEEDS, 4, 1):
        assert device_from(json.loads(json.dumps(asdict(device)))) == device


def test_label_counts_come_back_too():
    (device, *_) = FLEETS["half_weak"](NEEDS, 4, 0)
    device = replace(device, traits=DeviceTraits(label_counts=(3, 0, 2)))

    assert device_from(json.loads(json.dumps(asdict(device)))) == device


@pytest.mark.parametrize(
    ("budget_bytes", "expected"), [(999, True), (1000, False), (None, False)]
)
def test_a_device_is_weak_if_the_whole_model_is_too_much(budget_bytes, expected):
    (device, *_) = FLEETS["unlimited"](NEEDS, 2, 0)

    assert is_weak(replace(device, budget_bytes=budget_bytes), NEEDS) is expected
