"""Runs that are killed at random moments, and runs that are long."""

from pathlib import Path

import pytest

from simulations.faults.killed import kills
from simulations.faults.run import APIS
from simulations.faults.soak import EVERY, PICTURE, problems_of, soak


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_twenty_kills_change_no_bit(api: str) -> None:
    """FedAdam, half of the clients by their speed, an edge process."""
    found = kills(api, num_moments=20, num_rounds=10, seed=0, on_kill=lambda each: None)
    assert [each for each in found if each.problems or not each.is_same] == []
    assert len({each.resumed_after for each in found}) > 3


@pytest.mark.slow
def test_nothing_grows(tmp_path: Path) -> None:
    """Over three lives of the edge."""
    samples, problems = soak(tmp_path, num_rounds=3 * EVERY, num_clients=6)
    assert problems == []
    assert len(samples) == 3 * EVERY
    assert (tmp_path / PICTURE).read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("edge rss_mib", 1.0, "edge rss_mib grows from"),
        ("strategy files", 1.0, "strategy files grows from"),
        ("strategy threads", 0.5, "strategy threads grows from"),
        ("edge disk_kib", 5.0, "edge disk_kib grows from"),
        ("edge sessions", 1.0, "sessions at the edge after rounds"),
    ],
)
def test_what_grows_is_named(name: str, value: float, words: str) -> None:
    """A planted leak of each kind, in each round; without it, nothing is."""
    names = [f"{place} {what}" for place in ("edge", "strategy") for what in LEAKS]
    calm = {**dict.fromkeys(names, 10.0), "edge sessions": 0.0}
    flat = [
        {**calm, "edge reserved_bytes": 0.0, "round": number, "accepted": 20.0}
        for number in range(1, 10 * EVERY + 1)
    ]
    assert problems_of(flat) == []
    leaking = [{**each, name: each[name] + value * each["round"]} for each in flat]
    (problem,) = problems_of(leaking)
    assert words in problem


LEAKS = ("rss_mib", "files", "threads", "disk_kib")
