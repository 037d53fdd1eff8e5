"""Runs that are killed at random moments, and runs that are long."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from simulations.faults import killed as killed_runs
from simulations.faults.killed import Kill, kills
from simulations.faults.run import APIS, RunOptions
from simulations.faults.soak import EVERY, PICTURE, problems_of, soak
from simulations.faults.stage import Ended, Stage


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_twenty_kills_change_no_bit(api: str) -> None:
    """FedAdam, half of the clients by their speed, an edge process."""
    found = kills(api, num_moments=20, num_rounds=10, seed=0, on_kill=lambda each: None)
    assert [each for each in found if each.problems or not each.is_same] == []
    assert len({each.resumed_after for each in found}) > 3


@pytest.mark.parametrize("num_late", [0, 2, 9])
def test_a_kill_that_comes_too_late_is_tried_earlier(
    monkeypatch: pytest.MonkeyPatch, num_late: int
) -> None:
    """At half of the time, and not for ever."""
    tried: list[float] = []

    def killed(options: RunOptions, moment: tuple[int, float], whole: Ended) -> Kill:
        tried.append(moment[1])
        is_late = len(tried) <= num_late
        return Kill(
            api=options.api,
            in_round=moment[0],
            after_seconds=moment[1],
            resumed_after=0,
            is_same=whole.state is not None,
            problems=["it was over before"] if is_late else [],
        )

    whole = SimpleNamespace(state={}, left_out=[], log="")
    monkeypatch.setattr(killed_runs, "_killed", killed)
    monkeypatch.setattr(killed_runs, "_seconds_of_a_round", lambda _: 8.0)
    monkeypatch.setattr(Stage, "play", lambda self, **how: whole)
    found = kills(APIS[0], num_moments=1, num_rounds=2, seed=0, on_kill=tried.count)
    assert tried == [tried[0] / 2**i for i in range(min(num_late, 4) + 1)]
    assert bool(found[0].problems) == (num_late > 4)


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
