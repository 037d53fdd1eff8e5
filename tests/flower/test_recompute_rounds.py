"""Rounds in which devices recompute, through both strategies: FedAvg, bit for bit."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from flwr_smartsplit import MemoryBudget, Route, first_that_fits, predicted_peak_bytes
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.plan.checkpointing.plan import least_bytes
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.profile.task_profiles import profile_of
from tests.flower.apps import legacy_app, message_app, run, smart_split
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import BATCH_SIZE, TASK, differences

EDGES = (LocalEdge(name="near"),)
DEEP = Route.split(7, edge="near")
PROFILE = profile_of(TASK, batch_size=BATCH_SIZE)
TIGHT, AMPLE = least_bytes(PROFILE, DEEP), predicted_peak_bytes(PROFILE, DEEP)
BUDGETS = (None, TIGHT, AMPLE, TIGHT - 1)


def deep(request: RouteRequest) -> Route:
    """Give everybody the same deep cut, if it can be had at all."""
    return first_that_fits([DEEP], request)


def clients(make: Callable[..., Any], budgets: Any = BUDGETS) -> list[Any]:
    """Make clients with budgets, which can reach the edge."""
    return [make(i, budget, edges=EDGES) for i, budget in enumerate(budgets)]


@pytest.fixture(scope="module")
def unlimited() -> Any:
    """Train those who can take part, without any budget."""
    return run(clients(message_app, [None] * 3), smart_split(EDGES, choose_route=deep))


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_devices_that_recompute_change_no_bit(
    make: Callable[..., Any], unlimited: Any, tmp_path: Path
) -> None:
    """The tight one has a plan, the ample one none, and one byte less is too little."""
    journal = tmp_path / "rows.jsonl"
    strategy = smart_split(EDGES, choose_route=deep, journal=journal)
    made = run(clients(make), strategy)
    plans = {
        a.client_key: a.option.recompute for a in strategy.round_plans[0].assignments
    }
    assert {key: plan.is_empty for key, plan in plans.items()} == {
        "c0": True,
        "c1": False,
        "c2": True,
    }
    assert "no route fits" in strategy.round_plans[0].skipped["c3"]
    assert made.kinds() == []
    assert differences(made.state, unlimited.state) == []
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    mine = [
        row for row in rows if row.get("client_key") == "c1" and "peak_bytes" in row
    ]
    assert mine
    for row in mine:
        assert row["recompute"] == str(plans["c1"])
        assert row["peak_bytes"] <= row["predicted_peak_bytes"] <= TIGHT


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_the_legacy_strategy_sends_the_same_plans(
    make: Callable[..., Any], unlimited: Any
) -> None:
    """And makes the same bits."""
    strategy = legacy_smart_split(EDGES, choose_route=deep)
    made = run_legacy(clients(make), strategy)
    assert made.kinds() == []
    assert differences(made.state, unlimited.state) == []


def test_a_strategy_can_be_told_not_to_recompute() -> None:
    """Then the tight device sits out."""
    strategy = smart_split(EDGES, choose_route=deep, recompute=False)
    run(clients(message_app), strategy, num_rounds=1)
    plan = strategy.round_plans[0]
    assert [a.client_key for a in plan.assignments] == ["c0", "c2"]
    assert sorted(plan.skipped) == ["c1", "c3"]


@dataclass(frozen=True)
class Falling(MemoryBudget):
    """Enough for the deep cut at first, and after a step for the first unit only."""

    def read(self, *, step: int, live_bytes: int) -> int:
        """Say what the tensors may take."""
        del live_bytes
        return AMPLE if step < 1 else predicted_peak_bytes(PROFILE, Route.split(1))


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_a_client_whose_budget_falls_is_merged_like_the_others(
    make: Callable[..., Any], unlimited: Any, tmp_path: Path
) -> None:
    """It moves its cut within each round, and nothing of the result changes."""
    journal = tmp_path / "rows.jsonl"
    strategy = smart_split(EDGES, choose_route=deep, journal=journal)
    made = run(clients(make, [None, Falling(), AMPLE]), strategy)
    assert made.kinds() == []
    assert differences(made.state, unlimited.state) == []
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    moves = [row["moves"] for row in rows if row.get("moves")]
    assert [(m["step"], m["before"], m["after"]) for (m,) in moves] == [(1, 7, 1)] * 2


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_who_fits_nothing_else_accumulates_within_its_budget(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    """Two micro-batches are enough for c1, four for c2; c0 has no limit."""
    halves, quarters = (
        predicted_peak_bytes(
            profile_of(replace(TASK, accumulate=parts), batch_size=BATCH_SIZE), DEEP
        )
        for parts in (2, 4)
    )
    journal = tmp_path / "rows.jsonl"
    allowed: dict[str, Any] = {"max_accumulate": 4, "recompute": False}
    strategy = smart_split(EDGES, choose_route=deep, journal=journal, **allowed)
    made = run(clients(make, (None, halves, quarters)), strategy)
    found = {a.client_key: a.option for a in strategy.round_plans[0].assignments}
    assert {k: o.accumulate for k, o in found.items()} == {"c0": 1, "c1": 2, "c2": 4}
    assert made.kinds() == []
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    trained = [r for r in rows if r.get("phase") == "train" and "peak_bytes" in r]
    for key, budget in (("c1", halves), ("c2", quarters)):
        peaks = [row["peak_bytes"] for row in trained if row["client_key"] == key]
        assert peaks
        assert max(peaks) == found[key].peak_bytes == budget
