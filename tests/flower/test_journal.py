"""The journal: one row per client and round, whatever happens, and on disk at once."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from flwr_smartsplit import Route
from flwr_smartsplit.errors import bytes_text
from flwr_smartsplit.flower.journal import Journal
from flwr_smartsplit.runtime import transport as wire
from flwr_smartsplit.runtime.wire import state_bytes
from tests.faults import Deliver, MortalEdge
from tests.flower.apps import (
    apps,
    budgets_of,
    failing_app,
    legacy_app,
    message_app,
    overweight_app,
    peak_of,
    run,
    smart_split,
)
from tests.in_process_grid import InProcessGrid
from tests.tasks import initial_state

MIXED = budgets_of(1, 4, None, 8)
STRAY = {"late", "duplicate"}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read a journal."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def statuses(rows: list[dict[str, Any]], number: int, phase: str) -> dict[str, str]:
    """Say how each client's part of a round ended; stray replies apart."""
    found = [
        (row["client_key"], row["status"])
        for row in rows
        if row["kind"] == "client" and row["round"] == number and row["phase"] == phase
        if row["status"] not in STRAY
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_every_client_has_one_row_in_every_round_whatever_happens(
    tmp_path: Path,
) -> None:
    """Merged, over its cap, failed, lost, refused, late, too small, not drawn."""
    grid = InProcessGrid(
        [
            *apps(MIXED),
            overweight_app(4, message_app),
            overweight_app(5, legacy_app),
            failing_app(6),
            message_app(7, 10),
            *(message_app(client) for client in (8, 9)),
        ]
    )
    grid.lose(0, nth=2)
    grid.alter(1, RecordDict.clear, nth=1)
    grid.delay(2, nth=1)
    grid.duplicate(3, nth=1)
    grid.lose(3, nth=1, kind="evaluate")
    path = tmp_path / "rows" / "journal.jsonl"
    made = run(grid, smart_split(journal=path, fraction_evaluate=1.0), num_rounds=3)
    rows = rows_of(path)
    always = {
        "c4": "out_of_memory",
        "c5": "out_of_memory",
        "c6": "failed",
        "c7": "sat_out",
    }
    well = dict.fromkeys(["c0", "c1", "c2", "c3", "c8", "c9"], "accepted")
    expected = {
        1: {**well, **always, "c1": "refused", "c2": "lost"},
        2: {**well, **always, "c0": "lost"},
        3: {**well, **always},
    }
    for number in (1, 2, 3):
        assert statuses(rows, number, "train") == expected[number]
        assert len(statuses(rows, number, "evaluate")) == 10
    assert statuses(rows, 1, "evaluate")["c3"] == "lost"
    strays = Counter(
        (r["round"], r["client_key"], r["status"])
        for r in rows
        if r.get("status") in STRAY
    )
    assert strays == {(1, "c3", "duplicate"): 1, (2, "c2", "late"): 1}
    rounds = [row for row in rows if row["kind"] == "round"]
    assert [(r["selected"], r["accepted"]) for r in rounds] == [(9, 4), (9, 5), (9, 6)]
    assert all(
        row.get("cause") or row["status"] == "accepted"
        for row in rows
        if row["kind"] == "client"
    )
    assert len(made.strategy.failures) == sum(
        row["kind"] == "client" and row["status"] not in ("accepted", "sat_out")
        for row in rows
    )


def test_who_was_not_drawn_has_a_row_too(tmp_path: Path) -> None:
    """With that reason, and the budget all the same."""
    path = tmp_path / "journal.jsonl"
    half = smart_split(journal=path, fraction_train=0.5, min_train_nodes=1)
    run(apps(MIXED), half, num_rounds=2)
    for number in (1, 2):
        counts = Counter(statuses(rows_of(path), number, "train").values())
        assert counts == {"accepted": 2, "not_sampled": 2}


def test_a_row_holds_plan_and_measurement_side_by_side(tmp_path: Path) -> None:
    """Predicted and reached bytes, route, traffic, time, loss."""
    path = tmp_path / "journal.jsonl"
    run(apps(MIXED), smart_split(journal=path), num_rounds=1)
    row = next(r for r in rows_of(path) if r.get("client_key") == "c1")
    peak = peak_of(Route.split(4))
    assert row["route"] == "device[:4] > edge[4:]"
    assert row["predicted_peak_bytes"] == row["peak_bytes"] == peak
    assert row["budget_bytes"] == peak
    assert (row["num_examples"], row["num_steps"], row["num_threads"]) == (10, 3, 1)
    assert row["edge_bytes_up"] == 10 * (4 * 36 * 4 + 8)
    assert row["edge_bytes_down"] == 10 * 4 * 36 * 4
    assert 0 < row["bytes_down"] < state_bytes(initial_state())
    assert row["bytes_up"] > 0
    assert row["loss"] > 0
    assert row["seconds"] > 0


def test_the_numbers_of_a_failure_are_in_its_cause(tmp_path: Path) -> None:
    """And what was predicted stands beside them."""
    path = tmp_path / "journal.jsonl"
    clients = [*apps(MIXED), overweight_app(4, message_app)]
    run(clients, smart_split(journal=path), num_rounds=1)
    row = next(r for r in rows_of(path) if r.get("client_key") == "c4")
    assert row["status"] == "out_of_memory"
    assert f"cap of {bytes_text(row['budget_bytes'])}" in row["cause"]
    assert row["predicted_peak_bytes"] <= row["budget_bytes"] < row["peak_bytes"]


def test_a_node_without_a_profile_has_a_row(tmp_path: Path) -> None:
    """Under its node id, since that is all that is known."""
    path = tmp_path / "journal.jsonl"
    grid = InProcessGrid([*apps(MIXED), message_app(4)])
    for kind in ("query.smartsplit_profile", "get_properties"):
        grid.lose(4, nth=1, kind=kind)
    run(grid, smart_split(journal=path, fraction_evaluate=1.0), num_rounds=2)
    (row,) = [r for r in rows_of(path) if r.get("phase") == "profile"]
    assert row["client_key"] == f"node {grid.node_ids[4]}"
    assert (row["round"], row["status"]) == (1, "failed")
    assert statuses(rows_of(path), 2, "train")["c4"] == "accepted"


def test_time_comes_from_the_clock_that_was_given(tmp_path: Path) -> None:
    """Rounds and settling are measured by it."""
    path = tmp_path / "journal.jsonl"
    ticks = itertools.count(0.0, 10.0)
    clock = smart_split(journal=path, clock=lambda: next(ticks))
    run(apps(MIXED), clock, num_rounds=2)
    rounds = [row for row in rows_of(path) if row["kind"] == "round"]
    assert [row["round_wall_clock_sec"] for row in rounds] == [20.0, 20.0]
    assert [row["server_aggregation_time_sec"] for row in rounds] == [10.0, 10.0]


def test_a_rounds_bytes_are_the_sum_of_its_rows(tmp_path: Path) -> None:
    """Messages, boundaries, and what the strategy exchanged with its edges."""
    path = tmp_path / "journal.jsonl"
    run(apps(MIXED), smart_split(journal=path), num_rounds=1)
    *clients, total = rows_of(path)
    keys = ("bytes_down", "bytes_up", "edge_bytes_up", "edge_bytes_down")
    added = sum(row[key] for row in clients for key in keys)
    assert total["comm_bytes_total"] == added + total["edge_state_bytes"]
    assert total["edge_state_bytes"] >= state_bytes(initial_state())


def test_bytes_are_never_less_than_none(tmp_path: Path) -> None:
    """Also in the round in which an edge was started again."""
    path, edge = tmp_path / "journal.jsonl", MortalEdge(tmp_path / "edge")
    seen: list[Any] = []

    def die_in_round_2(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.HoldState) and len(seen) < 2:
            seen.append(request)
            if len(seen) == 2:
                edge.kill()
        return deliver(request)

    edge.hook = die_in_round_2
    run(apps(MIXED, edges=(edge,)), smart_split([edge], journal=path), num_rounds=2)
    assert edge.num_starts == 2
    rounds = [row for row in rows_of(path) if row["kind"] == "round"]
    assert all(row["edge_state_bytes"] > 0 for row in rounds)


# --- the file -------------------------------------------------------------------------


def test_rows_are_added_at_the_end(tmp_path: Path) -> None:
    """Folders are made, the file is there from the start, and nothing is lost."""
    path = tmp_path / "a" / "b.jsonl"
    Journal(path)
    assert path.read_text() == ""
    Journal(path).write({"x": 1})
    Journal(str(path)).write({"x": [None, "é", 0.1]})
    assert rows_of(path) == [{"x": 1}, {"x": [None, "é", 0.1]}]


def test_no_path_writes_nothing(tmp_path: Path) -> None:
    """And is no error."""
    Journal(None).write({"x": 1})
    assert list(tmp_path.iterdir()) == []
