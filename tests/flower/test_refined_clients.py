"""Clients that edges advise: both APIs merge moved ones, and count released ones less.

The cohort is put into the plans here; who works it out is the strategy.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context
from flwr.clientapp import ClientApp

from flwr_smartsplit import RecomputePlan, Route, SmartSplitNumPyClient
from flwr_smartsplit.flower.rounds.planner import PhasePlanner
from flwr_smartsplit.types import ClientPlan, Cohort
from tests.flower.apps import make_client
from tests.flower.test_moved_clients import (
    EDGES,
    KINDS,
    ROUTES,
    SIDES,
    Kind,
    clients,
    message_run,
)
from tests.tasks import differences, loader

IMPORTANT = Cohort(median_step_seconds=1.0, median_importance=0.0, low_importance=0.0)
UNIMPORTANT = replace(IMPORTANT, median_importance=1e9, low_importance=1e9)


def paced(plan: ClientPlan, route: Route, recompute: RecomputePlan) -> float:
    """Be slow on a late cut, and fast on an early one."""
    del plan, recompute
    return 2.0 + route.cuts[0] if route.cuts else 9.0


def advised_apps(kind: Kind) -> list[ClientApp]:
    """Make four clients that say how long their steps take."""

    def app(index: int) -> ClientApp:
        def client_fn(context: Context) -> SmartSplitNumPyClient:
            return make_client(
                index,
                edges=EDGES,
                context=context,
                step_seconds=paced,
                local_epochs=2,
            )

        return kind(client_fn)

    return [app(index) for index in range(len(ROUTES))]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cohort], None]:
    """Give every client a cohort."""
    plan_of = PhasePlanner.client_plan

    def planned(self: PhasePlanner, *args: Any, **more: Any) -> ClientPlan:
        return replace(plan_of(self, *args, **more), num_examples=9)

    def compare(cohort: Cohort) -> None:
        for_all = SimpleNamespace(for_steps=lambda _: cohort)
        monkeypatch.setattr(PhasePlanner, "client_plan", planned)
        monkeypatch.setattr(PhasePlanner, "cohort", lambda *_, **__: for_all)

    return compare


@pytest.mark.parametrize(("run_with", "kind"), SIDES)
def test_clients_that_are_advised_to_move_are_merged_bit_for_bit(
    run_with: Any, kind: Kind, compared: Callable[[Cohort], None]
) -> None:
    """As if no cut had moved."""
    plain = message_run(clients(KINDS[0], None, local_epochs=2), num_rounds=1)
    compared(IMPORTANT)
    rows: list[Any] = []
    moved = run_with(advised_apps(kind), num_rounds=1, on_row=(rows.append,))
    assert moved.kinds() == []
    assert differences(moved.state, plain.state) == []
    written = {row["client_key"]: row["moves"] for row in rows if row.get("moves")}
    assert set(written) == {"c1", "c3"}
    assert all("the edge finds" in move["reason"] for move in written["c1"])


@pytest.mark.parametrize(("run_with", "kind"), SIDES)
@pytest.mark.parametrize("keeps_all", [True, False])
def test_no_cut_moves_before_the_units_that_devices_keep(
    run_with: Any, kind: Kind, compared: Callable[[Cohort], None], *, keeps_all: bool
) -> None:
    """c1 begins with its cut at the last unit that it has to keep, or behind it."""
    compared(IMPORTANT)
    rows: list[Any] = []
    least = ROUTES["c1"].cuts[0] - (not keeps_all)
    run_with(
        advised_apps(kind), num_rounds=1, on_row=(rows.append,), min_device_units=least
    )
    found = {row.get("client_key"): row.get("moves", []) for row in rows}["c1"]
    assert [move["after"] for move in found] == ([] if keeps_all else [least])


@pytest.mark.parametrize(("run_with", "kind"), SIDES)
def test_clients_that_are_released_count_with_what_they_trained_on(
    run_with: Any, kind: Kind, compared: Callable[[Cohort], None]
) -> None:
    """Two batches of four; the others have their whole weight."""
    compared(UNIMPORTANT)
    rows: list[Any] = []
    run = run_with(advised_apps(kind), num_rounds=1, on_row=(rows.append,))
    assert run.kinds() == []
    trained = {row["client_key"]: row for row in rows if row["kind"] == "client"}
    assert {key: row["num_examples"] for key, row in trained.items()} == {
        "c0": len(loader(0).dataset),
        "c1": 8,
        "c2": len(loader(2).dataset),
        "c3": 8,
    }
    released = {key for key, row in trained.items() if "released" in row}
    assert released == {"c1", "c3"}
    assert trained["c1"]["released"].startswith("the edge finds it slow")
