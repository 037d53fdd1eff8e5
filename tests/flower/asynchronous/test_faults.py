"""What goes wrong in an asynchronous run costs its own reply and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr_smartsplit import PolynomialStaleness, deepest_split
from flwr_smartsplit.edge.protocol import Commit, HoldState, Release
from flwr_smartsplit.errors import EdgeUnreachable, SmartSplitError
from flwr_smartsplit.server.aggregation import Replace
from tests.faults import MortalEdge
from tests.flower.apps import apps, budgets_of, failing_app, message_app, smart_split
from tests.flower.asynchronous.runs import async_split, rows_of, state_after, timed
from tests.in_process_grid import InProcessGrid
from tests.tasks import differences

FEDASYNC = {"clients_at_once": 3, "mixing": PolynomialStaleness()}
EVEN = (1.0, 1.0, 1.0, 1.0)


def kinds(strategy: Any) -> list[tuple[str, str]]:
    """Say who failed how."""
    return [(failure.client_key, failure.kind) for failure in strategy.failures]


def test_a_second_reply_changes_nothing() -> None:
    """It is a failure of its own, and the bits are those of a run without it."""
    grid = InProcessGrid(apps([None] * 3))
    grid.duplicate(0, nth=1)
    strategy = async_split(**FEDASYNC)
    made = state_after(timed(grid), strategy)
    assert [kind for _, kind in kinds(strategy)] == ["duplicate"]
    plain = state_after(timed(apps([None] * 3)), async_split(**FEDASYNC))
    assert differences(made, plain) == []


@pytest.mark.parametrize("value", [np.nan, 1.0])
def test_an_altered_reply_is_left_out(value: float) -> None:
    """Not finite, or merely not what the client sent."""

    def alter(content: Any) -> None:
        (record,) = content.array_records.values()
        name = next(iter(record))
        changed = record[name].numpy().copy()
        changed.flat[0] = value
        record[name] = type(record[name])(changed)

    grid = InProcessGrid(apps([None] * 3))
    for nth in range(1, 9):
        grid.alter(1, alter, nth=nth)
    strategy = async_split(**FEDASYNC)
    made = state_after(timed(grid, (1.0, 1.5, 2.0)), strategy)
    assert set(kinds(strategy)) == {("c1", "refused")}
    assert all(np.isfinite(array).all() for array in made.values())


def test_a_lost_reply_frees_its_place_after_the_timeout() -> None:
    """The others go on; its client is asked again with the next state."""
    grid = InProcessGrid(apps([None] * 3))
    grid.lose(1, nth=1)
    asked = {"clients_at_once": 2, "mixing": PolynomialStaleness()}
    _, rows = rows_of(async_split, timed(grid, EVEN), timeout=4.0, **asked)
    lost = [row for row in rows if row.get("status") == "lost"]
    assert [row["client_key"] for row in lost] == ["c1"]
    assert "no reply before the timeout" in str(lost[0]["cause"])


def test_a_client_that_cannot_train_stops_nobody() -> None:
    """Nobody waits for it, although all are to be merged at once."""
    clients = [*apps([None] * 3), failing_app(3)]
    strategy = async_split(clients_at_once=4, merge_every=4)
    state_after(timed(clients, EVEN), strategy)
    assert kinds(strategy) == [("c3", "failed")] * 2
    wanted = smart_split(())
    alike = state_after(InProcessGrid(clients), wanted)
    again = async_split(clients_at_once=4, merge_every=4, mixing=Replace())
    assert differences(state_after(timed(clients, EVEN), again), alike) == []


def test_if_nobody_can_train_the_run_ends_with_the_reason() -> None:
    """A merge without replies counts, so that the run ends."""
    strategy = async_split(clients_at_once=2)
    with pytest.raises(SmartSplitError, match="disk on fire"):
        state_after(timed([failing_app(0), failing_app(1)]), strategy)


def test_a_node_that_leaves_loses_its_flight_and_one_that_joins_is_asked() -> None:
    """At once, without a timeout."""
    grid = InProcessGrid(apps([None] * 4))
    late, leaver = grid.node_ids[3], grid.node_ids[1]
    grid.hidden.add(late)
    virtual = timed(grid, (1.0, 50.0, 2.0, 1.0))

    def change(number: int, state: Any, summary: Any) -> None:
        if number == 2:
            grid.hidden = {leaver}

    strategy = async_split(between_rounds=change, **FEDASYNC)
    state_after(virtual, strategy, num_rounds=3)
    assert kinds(strategy) == [("c1", "lost")]
    assert "has left" in strategy.failures[0].cause
    chosen = [a.client_key for p in strategy.round_plans for a in p.assignments]
    assert "c3" in chosen
    assert virtual.seconds() < 50


def test_a_reply_that_is_too_old_is_left_out() -> None:
    """With the number of merges, and what to do."""
    strategy = async_split(**FEDASYNC, max_staleness=2)
    state_after(timed(apps([None] * 3), (1.0, 1.0, 4.5)), strategy, num_rounds=4)
    assert set(kinds(strategy)) == {("c2", "late")}
    assert "max_staleness is 2" in strategy.failures[0].cause
    lenient = async_split(**FEDASYNC, max_staleness=99)
    state_after(timed(apps([None] * 3), (1.0, 1.0, 4.5)), lenient, num_rounds=4)
    assert kinds(lenient) == []


def test_a_fast_client_gives_no_more_than_its_share() -> None:
    """Half of any thirty replies; without a limit, it gives nearly all."""

    def most_of_thirty(**changes: Any) -> int:
        grid = timed(apps([None] * 3), (0.1, 2.0, 2.0))
        _, rows = rows_of(async_split, grid, num_rounds=12, **FEDASYNC, **changes)
        keys = [row["client_key"] for row in rows if row.get("status") == "accepted"]
        assert len(keys) == 36
        return max(keys[at : at + 30].count("c0") for at in range(7))

    assert most_of_thirty() > 24
    assert most_of_thirty(max_share=0.5) == 15


# --- edges ----------------------------------------------------------------------------

SPLIT = budgets_of(4, 4, 4)


def split_run(edge: MortalEdge, **changes: Any) -> Any:
    """Make the strategy that sends everybody over one edge."""
    return async_split([edge], choose_route=deepest_split, **FEDASYNC, **changes)


def test_an_edge_holds_no_more_than_what_is_in_flight(tmp_path: Path) -> None:
    """States and tails of three clients, however many merges there are."""
    edge = MortalEdge(tmp_path / "edge")
    most: list[int] = []
    clients = [message_app(i, b, edges=[edge]) for i, b in enumerate(SPLIT)]

    def look(number: int, state: Any, summary: Any) -> None:
        most.append(len(list((tmp_path / "edge").rglob("*.safetensors"))))

    strategy = split_run(edge, between_rounds=look)
    state_after(timed(clients, (1.0, 9.0, 2.0)), strategy, num_rounds=8)
    assert kinds(strategy) == []
    assert sum(isinstance(r, HoldState) for r in edge.requests) > 8
    assert max(most[4:]) <= 2 * 3 + 1
    assert any(r.keep_more for r in edge.requests if isinstance(r, Release))


def test_a_dead_edge_costs_what_is_in_flight_there(tmp_path: Path) -> None:
    """Its clients fail, each for itself; then it is started again, and all go on."""
    edge = MortalEdge(tmp_path / "edge")
    clients = [message_app(i, b, edges=[edge]) for i, b in enumerate(SPLIT)]
    num_commits = 0

    def hook(request: Any, deliver: Any) -> Any:
        nonlocal num_commits
        if isinstance(request, Commit):
            num_commits += 1
            if num_commits == 2:
                raise EdgeUnreachable("the edge has died")
        return deliver(request)

    edge.hook = hook
    strategy = split_run(edge)
    state_after(timed(clients), strategy, num_rounds=3)
    assert [kind for _, kind in kinds(strategy)] == ["edge_failed"]
    assert num_commits > 5
