"""Clients whose cut moved during the round: both APIs merge them as if it had not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Context
from flwr.clientapp import ClientApp

from flwr_smartsplit import Route, SmartSplitNumPyClient, build_client_app
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.flower.rounds.exchange import (
    Sent,
    device_names,
    moved_plan,
    returned,
)
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.types import Move, StepReport
from tests.flower.apps import Run, make_client, run, smart_split
from tests.flower.legacy import LegacyRun, legacy_smart_split, run_legacy
from tests.tasks import TASK, client_plan, differences, initial_state, tiny_chain

EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
ROUTES = {
    "c0": Route.whole(),
    "c1": Route.split(4, edge="far"),
    "c2": Route.u_shape(3, 7, edge="near"),
    "c3": Route.hops((2, 6), edges=("near", "far")),
}
MOVES: dict[str, dict[int, int]] = {
    "c0": {},
    "c1": {0: 7, 1: 2, 2: 6},
    "c2": {1: 5, 2: 1},
    "c3": {2: 5},
}
CHAIN = tiny_chain()
Between = Callable[[RouteRunner], None]
Kind = Callable[[Callable[[Context], SmartSplitNumPyClient]], ClientApp]


def by_key(request: RouteRequest) -> Route:
    """Give each client its own kind of route."""
    return ROUTES[request.device.client_key]


def legacy_kind(client_fn: Callable[[Context], SmartSplitNumPyClient]) -> ClientApp:
    """Make an app of a ``NumPyClient``."""
    return ClientApp(lambda context: client_fn(context).to_client())


KINDS: list[Kind] = [build_client_app, legacy_kind]


def move_along(runner: RouteRunner) -> None:
    """Make the moves that belong to a client."""
    plan = MOVES[runner.plan.client_key]
    if runner.num_steps in plan:
        runner.move(plan[runner.num_steps], reason="told to")


def clients(kind: Kind, between: Between | None, **changes: Any) -> list[ClientApp]:
    """Make four clients that do something between two steps."""

    def app(index: int) -> ClientApp:
        def client_fn(context: Context) -> SmartSplitNumPyClient:
            client = make_client(index, edges=EDGES, context=context, **changes)
            client._conditions = replace(client._conditions, between_steps=between)
            return client

        return kind(client_fn)

    return [app(index) for index in range(len(ROUTES))]


def message_run(apps: list[ClientApp], *, num_rounds: int = 2, **changes: Any) -> Run:
    """Run them under the Message-API strategy."""
    strategy = smart_split(EDGES, choose_route=by_key, **changes)
    return run(apps, strategy, num_rounds=num_rounds)


def legacy_run(
    apps: list[ClientApp], *, num_rounds: int = 2, **changes: Any
) -> LegacyRun:
    """Run them under the legacy strategy."""
    strategy = legacy_smart_split(EDGES, choose_route=by_key, **changes)
    return run_legacy(apps, strategy, num_rounds=num_rounds)


RUNS: list[Any] = [message_run, legacy_run]
SIDES = list(zip(RUNS, KINDS, strict=True))


@pytest.fixture(scope="module")
def plain() -> Run:
    """Train the same clients with their cuts as planned."""
    return message_run(clients(build_client_app, None))


@pytest.mark.parametrize("run_with", RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_moved_clients_are_merged_bit_for_bit(
    run_with: Any, kind: Kind, plain: Run
) -> None:
    """Two rounds, three kinds of route, cuts that go up and down."""
    rows: list[Any] = []
    moved = run_with(clients(kind, move_along), on_row=(rows.append,))
    assert moved.kinds() == plain.kinds() == []
    assert differences(moved.state, plain.state) == []
    assert differences(moved.state, initial_state()) != []
    written = {
        row["client_key"]: {m["step"]: m["after"] for m in row["moves"]}
        for row in rows
        if row.get("moves")
    }
    assert written == {key: moves for key, moves in MOVES.items() if moves}


@pytest.mark.parametrize(("run_with", "kind"), SIDES)
@pytest.mark.parametrize(
    "moves",
    [
        (Move(step=0, before=4, after=6),),
        (Move(step=0, before=4, after=1),),
    ],
)
def test_a_client_that_only_says_that_its_cut_moved_is_refused(
    run_with: Any, kind: Kind, moves: tuple[Move, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and receipts are not those of the route it claims; nobody else minds."""
    report = RouteRunner.report

    def claimed(self: RouteRunner, *, num_epochs: int) -> StepReport:
        true = report(self, num_epochs=num_epochs)
        return replace(true, moves=moves) if self.plan.client_key == "c1" else true

    monkeypatch.setattr(RouteRunner, "report", claimed)
    made = run_with(clients(kind, None), num_rounds=1)
    assert made.kinds() == [("c1", "refused")]


@pytest.mark.parametrize(("run_with", "kind"), SIDES)
def test_a_client_that_hides_that_its_cut_moved_is_refused(
    run_with: Any, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it sends does not fit its plan; the others are merged without it."""
    report = RouteRunner.report

    def hidden(self: RouteRunner, *, num_epochs: int) -> StepReport:
        return replace(report(self, num_epochs=num_epochs), moves=())

    monkeypatch.setattr(RouteRunner, "report", hidden)
    made = run_with(clients(kind, move_along), num_rounds=1)
    keys = {key for key, _ in made.kinds()}
    assert keys == {key for key, moves in MOVES.items() if moves}


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_ones_own_stays_at_home_when_the_cut_moves(kind: Kind) -> None:
    """The same bits as without moves; the unit itself may not leave."""
    task = replace(TASK, is_local=lambda name: name.startswith("1."))
    routes = {**ROUTES, "c2": Route.u_shape(3, 7, edge="near")}

    def between(runner: RouteRunner) -> None:
        plan = {"c1": {0: 7, 1: 2}, "c3": {1: 4, 2: 3}}.get(runner.plan.client_key, {})
        if runner.num_steps in plan:
            runner.move(plan[runner.num_steps])

    def made(between: Between | None) -> Run:
        strategy = smart_split(
            EDGES,
            task=task,
            seed=0,
            choose_route=lambda request: routes[request.device.client_key],
        )
        return run(clients(kind, between, task=task), strategy)

    moved, plain = made(between), made(None)
    assert moved.kinds() == plain.kinds() == []
    assert differences(moved.state, plain.state) == []


# --- what is expected -----------------------------------------------------------------


def sent(route: Route) -> Sent:
    """Send a client a route whose second unit stays on its device."""
    plan = client_plan(0, route, initial_state(), addresses={"edge": "e-1"})
    names = device_names(plan, CHAIN)
    kept = returned(names, lambda name: name.startswith("1."))
    return Sent(plan, names, kept, 1)


def test_moves_are_followed_one_after_the_other() -> None:
    """Names are those of the last route, without what stays."""
    moves = [Move(step=0, before=4, after=7), Move(step=3, before=7, after=5)]
    ended = sent(Route.split(4)).after(moves, CHAIN)
    expected = sent(Route.split(5))
    assert ended.plan.route == expected.plan.route
    assert (ended.names, ended.returned_names) == (
        expected.names,
        expected.returned_names,
    )


@pytest.mark.parametrize(
    "moves",
    [
        [Move(step=0, before=3, after=5)],
        [Move(step=0, before=4, after=5), Move(step=1, before=4, after=6)],
        [Move(step=0, before=4, after=0)],
        [Move(step=0, before=4, after=9)],
        [Move(step=0, before=4, after=10**30)],
        [Move(step=0, before=4, after=1)],
    ],
)
def test_moves_that_cannot_have_happened_change_nothing(moves: list[Move]) -> None:
    """Neither where they begin and end, nor what leaves the device, can be so."""
    planned = sent(Route.split(4))
    assert planned.after(moves, CHAIN) == planned


def test_a_whole_model_has_no_cut_to_move() -> None:
    """Nor can it have been one."""
    plan = client_plan(0, Route.whole(), initial_state())
    with pytest.raises(InvalidRoute):
        moved_plan(plan, [Move(step=0, before=0, after=3)])
