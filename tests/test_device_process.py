"""A device never holds a tail: measured on a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

_SHARE = 0.25
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Malloc then does not keep what was freed, and the process holds what it uses."""
MIB = 2**20


def measured(*flags: str) -> dict[str, Any]:
    """Run the measurement in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.device_process", *flags],
        check=True,
        env={**os.environ, **GIVING_BACK},
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_device_process_grows_by_its_front_and_not_by_the_model() -> None:
    """One step grows the resident set by a small share of the model's bytes."""
    result = measured()
    assert all(name.startswith("features.") for name in result["device_names"])
    assert result["device_state_bytes"] < 0.01 * result["whole_model_bytes"]
    assert result["resident_growth_bytes"] < _SHARE * result["whole_model_bytes"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measurement_sees_a_device_that_holds_the_whole_model() -> None:
    """The planted error, a device that builds the model, fails the same bound."""
    result = measured("--hold-whole-model")
    assert result["resident_growth_bytes"] > _SHARE * result["whole_model_bytes"]


@pytest.fixture(scope="module")
def fenced() -> dict[str, Any]:
    """Measure a client that is alone in its process, and fence it."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    return measured("--fence")


@pytest.mark.slow
def test_the_resident_set_grows_by_what_the_meter_counts(
    fenced: dict[str, Any],
) -> None:
    """Both truths of steps of 160 MiB: they differ by less than 64 MiB."""
    peak_bytes = fenced["metered_peak_bytes"]
    assert peak_bytes > 150 * MIB
    assert -16 * MIB < fenced["resident_growth_bytes"] - peak_bytes < 64 * MIB


def test_the_system_refuses_what_goes_over_the_fence(fenced: dict[str, Any]) -> None:
    """A budget of the peak is enough; half of it is not, though no cap looks."""
    statuses = fenced["statuses"]
    assert statuses["enough"] == "ok"
    assert statuses["too_little"] == "out_of_memory"
    assert fenced["message"].startswith("client 0: the system's allocator refuses ")
    fence_bytes = fenced["metered_peak_bytes"] // 2 + 32 * MIB
    assert fenced["growths"]["too_little"] < fence_bytes + 32 * MIB
    # The planted error, a client without a fence, is not refused.
    assert statuses["too_little_unfenced"] == "ok"
    assert fenced["growths"]["too_little_unfenced"] is None


def test_a_refused_process_does_a_smaller_step(fenced: dict[str, Any]) -> None:
    """Fewer examples, under the fence that the others did not fit."""
    assert fenced["statuses"]["fewer_examples"] == "ok"
    growth_bytes = fenced["growths"]["fewer_examples"]
    assert 0 < growth_bytes < fenced["metered_peak_bytes"] // 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_do_not_end_a_fenced_process() -> None:
    """OpenMP would, if it had to start them where there is no room for their stacks."""
    assert measured("--threads")["sum"] == 2 * 2**22
