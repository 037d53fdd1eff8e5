"""Frozen weights are sent to each node and edge once; no wrong ones are trained on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Context
from flwr.clientapp import ClientApp

from flwr_smartsplit import Route, RouteRequest
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.flower.serde.records import (
    config_of,
    plan_from_config,
    to_array_record,
)
from flwr_smartsplit.types import ClientPlan
from tests.flower.apps import Run, arrays_of, make_client, message_app, messages, run
from tests.flower.apps import smart_split as smart_split_of
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.flower.test_frozen_front import TASK_FROZEN
from tests.in_process_grid import InProcessGrid
from tests.tasks import State, differences, initial_state

KEPT = "smartsplit.frozen"
FROZEN = {"0.weight", "1.weight", "1.bias"}
ROUTES = (Route.split(2), Route.whole(), Route.u_shape(2, 7))
Edit = Callable[[int, InProcessGrid], None]


def route_of(request: RouteRequest) -> Route:
    """Give each client another kind of route; all have the frozen front."""
    return ROUTES[request.index]


def apps() -> list[ClientApp]:
    """Make three clients of the Message API."""
    return [message_app(index, task=TASK_FROZEN) for index in range(3)]


def forgetful_apps() -> list[ClientApp]:
    """Make the same as ``NumPyClient`` apps that were given no context."""

    def client_fn(context: Context) -> Any:
        return make_client(number(context), task=TASK_FROZEN).to_client()

    return [ClientApp(client_fn)] * 3


def number(context: Context) -> int:
    """Return the partition's number."""
    return int(context.node_config["partition-id"])


def smart_split(**changes: Any) -> Any:
    """Make the strategy, over the task with a frozen front."""
    rules = {"edges": (LocalEdge(),), "choose_route": route_of, **changes}
    return smart_split_of(task=TASK_FROZEN, **rules)


def train(edit: Edit | None = None, *, num_rounds: int = 3, **changes: Any) -> Run:
    """Run three clients; ``edit(round, grid)`` is called after each round."""
    grid = changes.pop("grid", None) or InProcessGrid(apps())

    def between(number: int, state: State, summary: Any) -> None:
        del state, summary
        if edit is not None:
            edit(number, grid)

    strategy = smart_split(between_rounds=between, **changes)
    return run(grid, strategy, num_rounds=num_rounds)


def unsplit(num_rounds: int = 3) -> State:
    """Train whole models, to which everything is sent in each round."""
    strategy = smart_split_of((), task=TASK_FROZEN)
    return run(forgetful_apps(), strategy, num_rounds=num_rounds).state


def plans(grid: InProcessGrid, partition: int, kind: str = "train") -> list[ClientPlan]:
    """List the plans that a node was sent."""
    node = grid.node_ids[partition]
    mine = [m for m in messages(grid, kind) if m.metadata.dst_node_id == node]
    found = [plan_from_config(config_of(message.content)) for message in mine]
    return [plan for plan in found if plan is not None]


def sent(made: Run, partition: int = 0, kind: str = "train") -> list[bool]:
    """Say for each message to a node whether the frozen weights were in it."""
    node = made.grid.node_ids[partition]
    mine = [m for m in messages(made.grid, kind) if m.metadata.dst_node_id == node]
    found = [FROZEN & arrays_of(message).keys() for message in mine]
    assert all(names in (FROZEN, set()) for names in found)
    said = [plan.sends_frozen for plan in plans(made.grid, partition, kind)]
    assert said == [bool(names) for names in found]
    return said


def context_of(grid: InProcessGrid, partition: int) -> Context:
    """Return what Flower keeps for a node."""
    return grid._nodes[grid.node_ids[partition]].context


# --- once -----------------------------------------------------------------------------


def test_frozen_weights_are_sent_to_a_node_once() -> None:
    """On every route, and the result is that of sending all in each round."""
    made = train()
    assert made.kinds() == []
    assert [sent(made, index) for index in range(3)] == [[True, False, False]] * 3
    assert differences(made.state, unsplit()) == []


def test_a_model_that_is_trained_whole_keeps_what_is_frozen() -> None:
    """Without edges, too."""
    made = train(edges=(), choose_route=None)
    assert sent(made) == [True, False, False]
    assert differences(made.state, unsplit()) == []


def test_evaluation_uses_what_was_kept_for_training() -> None:
    """On the same node."""
    made = train(fraction_evaluate=1.0, num_rounds=2)
    assert made.kinds() == []
    assert sent(made, kind="train") == [True, False]
    assert sent(made, kind="evaluate") == [False, False]


def test_a_node_without_a_context_is_sent_them_in_each_round() -> None:
    """It has nowhere to keep them."""
    made = run(forgetful_apps(), smart_split(), num_rounds=2)
    assert made.kinds() == []
    assert all(plan.sends_frozen for i in range(3) for plan in plans(made.grid, i))
    assert differences(made.state, unsplit(2)) == []


@pytest.mark.parametrize("api", ["message", "legacy"])
def test_a_numpy_client_keeps_them_too(api: str) -> None:
    """Its arrays have no names: both sides leave out the same."""

    def client_fn(context: Context) -> Any:
        client = make_client(number(context), task=TASK_FROZEN, context=context)
        return client.to_client()

    clients = [ClientApp(client_fn)] * 3
    if api == "message":
        made: Any = run(clients, smart_split(), num_rounds=3)
    else:
        strategy = legacy_smart_split(task=TASK_FROZEN, choose_route=route_of)
        made = run_legacy(clients, strategy, num_rounds=3)
    assert made.kinds() == []
    for partition in range(3):
        found = [plan.sends_frozen for plan in plans(made.grid, partition)]
        found = found or [p.sends_frozen for p in plans(made.grid, partition, "fit")]
        assert found == [True, False, False]
    assert differences(made.state, unsplit()) == []


# --- again ----------------------------------------------------------------------------


def test_a_node_that_restarted_says_so_and_is_sent_them_again() -> None:
    """It sits one round out and is not merged; the others are."""

    def restart(number: int, grid: InProcessGrid) -> None:
        if number == 1:
            context_of(grid, 1).state.clear()

    made = train(restart)
    assert sent(made, 0) == [True, False, False]
    assert sent(made, 1) == [True, False, True]
    (failure,) = made.strategy.failures
    assert (failure.client_key, failure.kind) == ("c1", "not_held")
    assert "are not kept here, as after a restart" in failure.cause


def test_weights_that_are_not_those_of_the_round_are_never_trained_on() -> None:
    """The planted error: one value of what a node keeps is another."""

    def damage(number: int, grid: InProcessGrid) -> None:
        if number == 1:
            record = context_of(grid, 2).state[KEPT]
            arrays = {name: array.numpy().copy() for name, array in record.items()}
            arrays["1.bias"][0] += 1
            context_of(grid, 2).state[KEPT] = to_array_record(arrays)

    made = train(damage)
    assert made.kinds() == [("c2", "not_held")]
    assert sent(made, 2) == [True, False, True]


def test_a_lost_reply_means_that_they_are_sent_again() -> None:
    """The strategy does not know that the node has kept them."""
    grid = InProcessGrid(apps())
    grid.lose(0, nth=1)
    made = train(grid=grid)
    assert made.kinds() == [("c0", "lost")]
    assert sent(made, 0) == [True, True, False]
    assert sent(made, 1) == [True, False, False]


def test_a_late_reply_and_a_second_one_change_nothing() -> None:
    """Replies of another round say nothing of this one."""
    grid = InProcessGrid(apps())
    grid.delay(0, nth=1)
    grid.duplicate(1, nth=1)
    made = train(grid=grid)
    assert sorted(made.kinds()) == [("c0", "late"), ("c0", "lost"), ("c1", "duplicate")]
    assert sent(made, 0) == [True, True, False]
    assert sent(made, 1) == [True, False, False]


def test_weights_that_the_server_changes_are_sent_again() -> None:
    """In the same round, since the strategy knows the digest."""

    def between(number: int, state: State, summary: Any) -> State | None:
        del summary
        if number != 1:
            return None
        return {**state, "0.weight": state["0.weight"] * 2}

    made = run(apps(), smart_split(between_rounds=between), num_rounds=3)
    assert made.kinds() == []
    assert sent(made) == [True, True, False]
    doubled = initial_state()["0.weight"] * 2
    assert np.array_equal(made.state["0.weight"], doubled)


def test_a_route_with_more_frozen_units_is_sent_all_of_them() -> None:
    """One with fewer is sent none."""
    cuts = [1, 2, 1]

    def other_cut(request: RouteRequest) -> Route:
        return Route.split(cuts[len(rounds)])

    rounds: list[int] = []
    made = train(lambda number, grid: rounds.append(number), choose_route=other_cut)
    assert made.kinds() == []
    node = made.grid.node_ids[0]
    mine = [m for m in messages(made.grid, "train") if m.metadata.dst_node_id == node]
    names = [FROZEN & arrays_of(message).keys() for message in mine]
    assert names == [{"0.weight"}, FROZEN, set()]
    assert differences(made.state, unsplit()) == []


# --- edges ----------------------------------------------------------------------------


def edge_rows(made: list[dict[str, Any]]) -> list[int]:
    """List what went between strategy and edges in each round, in bytes."""
    return [row["edge_state_bytes"] for row in made if row["kind"] == "round"]


def test_edges_are_sent_them_once_and_the_journal_shows_it() -> None:
    """Then only what training changes goes to them and comes back."""
    rows: list[dict[str, Any]] = []
    made = train(on_row=(rows.append,))
    state = initial_state()
    frozen = {n for n in state if n.startswith(("0.", "1."))} & FROZEN
    first, second, third = edge_rows(rows)
    assert second == third == first - sum(state[name].nbytes for name in frozen)
    down = [r["bytes_down"] for r in rows if r.get("client_key") == "c1"]
    assert down[0] - down[1] > sum(state[name].nbytes for name in frozen)
    assert down[1] - down[2] in range(-9, 10)  # Plans differ by a number's length.
    assert made.kinds() == []
