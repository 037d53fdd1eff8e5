"""What a round costs at an edge: every request of a round is there, with its bytes."""

from typing import Any

import pytest
from torch import nn

from flwr_smartsplit.split.build import build_chain, state_of
from simulations.benchmarks.wires import round_commit
from simulations.experiments.models import image_task
from tests.tasks import state_bytes


def small() -> nn.Module:
    """Build three layers; the last two are at the edge."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.Linear(4, 10))


def test_every_request_of_a_round_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state goes there once, the tail comes back as it is, and is not doubled."""
    monkeypatch.setitem(round_commit.MODELS, "small", small)
    found: Any = round_commit.measured(
        "small", "in process", num_clients=2, num_rounds=2
    )
    spent = found["spent"]
    counts = {kind: each["count"] for kind, each in spent.items()}
    assert counts == {
        "HoldState": 2,
        "OpenSigned": 4,
        "Seal": 4,
        "Commit": 2,
        "merge": 2,
    }
    state, chain = state_of(small()), build_chain(image_task(small))
    tail = chain.changed_names(round_commit.CUT, len(chain))
    assert spent["HoldState"]["sent_bytes"] == 2 * state_bytes(state)
    tail_bytes = state_bytes({name: state[name] for name in tail})
    assert spent["Commit"]["received_bytes"] == 2 * tail_bytes
    assert spent["merge"]["seconds"] >= spent["Commit"]["seconds"] > 0
    assert found["peak_bytes"] > 0
    assert round_commit.table_of([{**found, "num_rounds": 2}]).row_count == 5
