"""The journal: one row per client and round, whatever happens, and on disk at once."""

import contextlib
import itertools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from flwr_smartsplit import Route
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.errors import bytes_text
from flwr_smartsplit.flower.journal.journal import Journal
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
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.in_process_grid import InProcessGrid
from tests.tasks import initial_state, state_bytes

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
    opening_bytes = 1500  # Signed, in text
    assert 0 < row["bytes_down"] < state_bytes(initial_state()) + opening_bytes
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
    with contextlib.chdir(tmp_path):
        Journal(None).write({"x": 1})
        run(apps(MIXED), smart_split(journal=None), num_rounds=1)
        run_legacy(apps(MIXED), legacy_smart_split(journal=None), num_rounds=1)
    assert list(tmp_path.iterdir()) == []


def test_each_run_that_names_none_has_a_journal_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both strategies; it is made with the first row, and named once in the log."""
    with contextlib.chdir(tmp_path):
        strategy, legacy = smart_split(), legacy_smart_split()
        assert list(tmp_path.iterdir()) == []
        run(apps(MIXED), strategy, num_rounds=2)
        run_legacy(apps(MIXED), legacy, num_rounds=2)
    first, second = (tmp_path / f"smartsplit-{number}.jsonl" for number in (1, 2))
    assert sorted(tmp_path.iterdir()) == [first, second]
    assert [r["accepted"] for r in rows_of(first) if r["kind"] == "round"] == [4, 4]
    keys = ("kind", "round", "client_key", "status", "loss", "route")
    one, other = (
        [[row.get(key) for key in keys] for row in rows_of(path)]
        for path in (first, second)
    )
    assert one == other
    named = [m for m in caplog.messages if m.startswith("The journal is")]
    assert named == [f"The journal is smartsplit-{number}.jsonl" for number in (1, 2)]


def test_journals_that_start_at_once_share_no_file(tmp_path: Path) -> None:
    """The first free number goes to one of them."""
    pattern = tmp_path / "runs" / "mine-{number}.jsonl"
    journals = [Journal(pattern) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda pair: pair[1].write({"x": pair[0]}), enumerate(journals)))
    for journal in journals:
        journal.write({"x": -1})
    found = [rows_of(path) for path in (tmp_path / "runs").iterdir()]
    assert sorted(rows[0]["x"] for rows in found) == list(range(20))
    assert all(rows[1:] == [{"x": -1}] for rows in found)


def refuse(self: Path, mode: str = "r") -> Any:
    """Open no file."""
    raise PermissionError(f"not allowed: {self}")


def test_a_folder_that_cannot_be_written_to_ends_no_run_that_named_no_journal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is warned of once. Who names one is told by the error."""
    monkeypatch.setattr(Path, "open", refuse)
    rows: list[Any] = []
    journal = Journal("smartsplit-{number}.jsonl", [rows.append])
    for _ in range(2):
        journal.write({"x": 1})
    assert rows == [{"x": 1}] * 2
    (warning,) = caplog.messages
    assert "No journal is written (not allowed: smartsplit-1.jsonl)" in warning
    with pytest.raises(PermissionError):
        Journal("mine-{number}.jsonl").write({"x": 1})


def test_a_callback_that_raises_ends_nothing_and_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file and the other callbacks get every row; it is asked again, too."""
    seen: list[Any] = []
    asked: list[Any] = []

    def spoil(row: Any) -> None:
        asked.append(row)
        raise ValueError("no such board")

    path = tmp_path / "journal.jsonl"
    strategy = smart_split(journal=path, on_row=[spoil, seen.append])
    run(apps(MIXED), strategy, num_rounds=2)
    assert seen == asked == rows_of(path)
    assert len(seen) == 2 * (len(MIXED) + 1)
    warnings = [record for record in caplog.records if "on_row" in record.message]
    assert len(warnings) == 1
    assert "spoil fails; the run goes on" in warnings[0].message
    assert warnings[0].exc_info is not None


# --- evaluation -----------------------------------------------------------------------


def test_evaluation_has_a_row_of_its_own(tmp_path: Path) -> None:
    """Under a kind of its own; bytes are counted once, where they were sent."""
    path = tmp_path / "journal.jsonl"
    run(apps(MIXED), smart_split(journal=path, fraction_evaluate=1.0), num_rounds=2)
    rows = rows_of(path)
    kinds = [row["kind"] for row in rows if row["kind"] != "client"]
    assert kinds == ["round", "evaluation_round"] * 2
    keys = ("bytes_down", "bytes_up", "edge_bytes_up", "edge_bytes_down")
    added = sum(row[key] for row in rows if row["kind"] == "client" for key in keys)
    sums = [row for row in rows if row["kind"] != "client"]
    edge = sum(row["edge_state_bytes"] for row in sums)
    assert sum(row["comm_bytes_total"] for row in sums) == added + edge
    for row in sums:
        assert (row["selected"], row["accepted"]) == (4, 4)
        assert row["round_wall_clock_sec"] > row["server_aggregation_time_sec"] > 0
