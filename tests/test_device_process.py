"""A device never holds a tail: measured on a process of its own."""

import json
import subprocess
import sys
from typing import Any

import pytest

_SHARE = 0.25


def measured(*flags: str) -> dict[str, Any]:
    """Run the measurement in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.device_process", *flags],
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_device_process_grows_by_its_front_and_not_by_the_model() -> None:
    """One VGG-16 step grows the resident set by a small share of the model's bytes."""
    result = measured()
    assert all(name.startswith("features.") for name in result["device_names"])
    assert result["device_state_bytes"] < 0.01 * result["whole_model_bytes"]
    assert result["resident_growth_bytes"] < _SHARE * result["whole_model_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measurement_sees_a_device_that_holds_the_whole_model() -> None:
    """The planted error, a device that builds the model, fails the same bound."""
    result = measured("--hold-whole-model")
    assert result["resident_growth_bytes"] > _SHARE * result["whole_model_bytes"]
