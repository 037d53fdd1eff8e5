"""The ratios of deployed rounds; the copied app is the example, with an edge."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from simulations.benchmarks.rounds.deployed_rounds import (
    AFTER,
    BEFORE,
    Deployment,
    RunCost,
    copy_apps,
    ratios,
)


def cost(app: str, *rounds: float, cpu: float = 10.0) -> RunCost:
    """Describe a run of ten messages."""
    return RunCost(
        app=app, round_seconds=rounds, num_messages=10, client_cpu_seconds=cpu
    )


def test_ratios_are_of_medians() -> None:
    """The first round apart; CPU for each message."""
    found = ratios(
        [
            cost(BEFORE, 10.0, 20.0, 40.0),
            cost(BEFORE, 30.0, 30.0, 100.0),
            cost(AFTER, 40.0, 42.0, 49.0, cpu=15.0),
        ]
    )
    assert found["round 1"] == 2.0
    assert found["later rounds"] == pytest.approx(45.5 / 35.0)
    assert found["CPU a message"] == 1.5
    assert found["messages"] == 1.0


def test_the_copies_differ_from_the_examples_in_edge_and_clock_only(
    tmp_path: Path,
) -> None:
    """A changed example is noticed, not silently run without an edge."""
    copy_apps(tmp_path)
    started = SimpleNamespace(edge=1, folder=tmp_path)
    Deployment(started, tmp_path)
    server, client = (
        (tmp_path / AFTER / "fedavg_app" / f"{name}_app.py").read_text()
        for name in ("server", "client")
    )
    assert "RayEdge" not in server + client
    assert 'edges=(GrpcEdge("127.0.0.1:1", insecure=True' in server
    assert "edges" not in client
    with pytest.raises(RuntimeError, match="change this file"):
        Deployment(started, tmp_path)
