"""Costs: found once in a process, and the same wherever the caller stands."""

from dataclasses import replace

from flwr_smartsplit import profile_chain
from flwr_smartsplit.memory.meter import MemoryMeter, unmetered
from flwr_smartsplit.profile import task_profiles as profiles
from flwr_smartsplit.profile.task_profiles import profile_of
from tests.tasks import TASK, tiny_chain


def test_costs_are_found_once_in_a_process(monkeypatch):
    """Also where every message brings its own copy of the task."""
    calls = []
    monkeypatch.setattr(
        profiles,
        "profile_chain",
        lambda *args, **kwargs: calls.append(1) or profile_chain(*args, **kwargs),
    )
    monkeypatch.setattr(profiles, "_profiles", {})
    copies = [replace(TASK), replace(TASK)]
    assert profile_of(copies[0], batch_size=3) == profile_of(copies[1], batch_size=3)
    assert calls == [1]


def test_a_paused_meter_does_not_empty_them(monkeypatch):
    """An edge in the device's process is asked in the middle of a metered step."""
    monkeypatch.setattr(profiles, "_profiles", {})
    with MemoryMeter() as meter, unmetered():
        found = profile_of(TASK, batch_size=3)
    assert found == profile_chain(tiny_chain(), batch_size=3, task=TASK)
    assert meter.peak_bytes == 0
