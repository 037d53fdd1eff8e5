"""Asynchronous runs under Flower's simulation engine, over Ray edges, in real time."""

from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import AsyncSmartSplit, Planning, SmartSplit
from flwr_smartsplit.flower.serde.records import from_array_record
from flwr_smartsplit.server.aggregation import Replace
from tests.simulated_app import EDGES, TASK, all_kinds, run_here, simulate
from tests.tasks import differences

NUM_CLIENTS = 6
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def simulated(rows: list[Any], **asked: Any) -> Any:
    """Run on all kinds of route, with two workers; return strategy and state."""
    strategy = AsyncSmartSplit(
        TASK,
        EDGES,
        seed=7,
        strategy=FedAvg(fraction_evaluate=0.0, min_available_nodes=NUM_CLIENTS),
        planning=Planning(choose_route=all_kinds),
        journal=None,
        on_row=(rows.append,),
        **asked,
    )
    budgets = [None] * NUM_CLIENTS
    result = simulate(strategy, budgets, num_rounds=2, num_workers=2)
    assert strategy.failures == []
    return strategy, from_array_record(result.arrays)


def test_all_at_once_is_smartsplit_in_the_engine_too() -> None:
    """Six kinds of route, in processes of their own, are rounds of whole models."""
    inner = FedAvg(fraction_evaluate=0.0, min_available_nodes=NUM_CLIENTS)
    whole = SmartSplit(TASK, seed=7, strategy=inner, journal=None)
    truth = run_here(whole, num_clients=NUM_CLIENTS, num_rounds=2)
    _, made = simulated([], clients_at_once=6, merge_every=6, mixing=Replace())
    assert differences(made, from_array_record(truth.arrays)) == []


def test_replies_are_merged_one_by_one_in_the_engine() -> None:
    """Four in flight on two workers: stale replies from edges, and nobody fails."""
    rows: list[Any] = []
    _, made = simulated(rows, clients_at_once=4)
    merged = [row for row in rows if row.get("status") == "accepted"]
    assert [row["merge"] for row in merged] == list(range(1, 9))
    assert max(row["staleness"] for row in merged) > 0
    assert any("edge" in row["route"] for row in merged)
    assert all(np.isfinite(array).all() for array in made.values())
