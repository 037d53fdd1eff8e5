"""AsyncSmartSplit: with all at once it is SmartSplit; else replies count one by one."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import (
    AsyncSmartSplit,
    Checkpoints,
    Momentum,
    Planning,
    PolynomialStaleness,
    StragglerAdvisor,
    Whole,
    select_at_random,
)
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.server.aggregation import Replace, RoundSummary
from flwr_smartsplit.server.mixing.staleness import mixed
from tests.flower.apps import apps, initial_arrays, legacy_app, message_app, smart_split
from tests.flower.asynchronous.runs import async_split, rows_of, state_after, timed
from tests.flower.test_mixed_routes import EDGES, NUM_CLIENTS, by_key, clients
from tests.in_process_grid import InProcessGrid
from tests.tasks import TASK, State, differences, initial_state

ALL = {"clients_at_once": NUM_CLIENTS, "merge_every": NUM_CLIENTS}
MIXED = {"choose_route": by_key}
FEDASYNC = {"clients_at_once": 3, "mixing": PolynomialStaleness()}


class Shrinking(Whole):
    """Variants that make the model smaller, as pruning does."""

    def base(self, memory: Any) -> Any:
        """Return what is left."""
        return memory


class Nearly:
    """Replace the state, but for a millionth."""

    def mix(self, current: Any, mean: Any, summary: RoundSummary) -> Any:
        """Go nearly all of the way."""
        return mixed(current, mean, 1 - 1e-6)


@pytest.fixture(scope="module")
def rounds() -> State:
    """Train the same clients whole, in two synchronous rounds."""
    return state_after(InProcessGrid(clients(message_app)), smart_split(()))


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_all_at_once_is_smartsplit_bit_for_bit(make: Any, rounds: State) -> None:
    """Along all kinds of route, whoever is slow; also for ``NumPyClient`` apps."""
    strategy = async_split(EDGES, mixing=Replace(), **ALL, **MIXED)
    assert differences(state_after(timed(clients(make)), strategy), rounds) == []
    assert strategy.failures == []


def test_a_grid_without_a_time_of_its_own_is_polled(rounds: State) -> None:
    """Here its replies are there at once; the clock is the plan's."""
    grid = InProcessGrid(clients(message_app))
    strategy = async_split(EDGES, mixing=Replace(), **ALL, **MIXED)
    assert differences(state_after(grid, strategy), rounds) == []


def test_a_millionth_is_seen(rounds: State) -> None:
    """Planted: the mean does not quite replace the state."""
    strategy = async_split(EDGES, mixing=Nearly(), **ALL, **MIXED)
    assert differences(state_after(timed(clients(message_app)), strategy), rounds) != []


def test_a_reply_that_comes_a_merge_later_is_seen(rounds: State) -> None:
    """Planted: the last of five is merged alone."""
    strategy = async_split(
        EDGES, mixing=Replace(), clients_at_once=5, merge_every=4, **MIXED
    )
    assert differences(state_after(timed(clients(message_app)), strategy), rounds) != []


def test_rounds_of_a_sample_are_smartsplits() -> None:
    """A place is taken until the merge, so three of five at a time are rounds."""
    wanted = state_after(
        InProcessGrid(clients(message_app)),
        smart_split((), select=select_at_random, fraction_train=0.6),
    )
    strategy = async_split(
        mixing=Replace(), clients_at_once=3, merge_every=3, select=select_at_random
    )
    assert differences(state_after(timed(clients(message_app)), strategy), wanted) == []


@pytest.mark.parametrize("merge_every", [1, 2])
def test_routes_do_not_show_in_an_asynchronous_run(merge_every: int) -> None:
    """Front and tail of a reply get one weight, so it is as if all trained whole."""
    asked = {**FEDASYNC, "merge_every": merge_every}
    split = async_split(EDGES, **asked, **MIXED)
    made = state_after(timed(clients(message_app)), split)
    whole = state_after(timed(clients(message_app)), async_split(**asked))
    assert differences(made, whole) == []
    assert split.failures == []
    other = async_split(**asked | {"mixing": PolynomialStaleness(power=0.4)})
    assert differences(state_after(timed(clients(message_app)), other), whole) != []


def test_the_journal_tells_versions_staleness_and_weights() -> None:
    """And what was merged when: of three at once, the slow one is stale."""
    _, rows = rows_of(async_split, timed(apps([None] * 3)), **FEDASYNC)
    merged = [row for row in rows if row.get("status") == "accepted"]
    assert [(r["client_key"], r["merge"], r["staleness"]) for r in merged] == [
        ("c0", 1, 0),
        ("c0", 2, 0),
        ("c2", 3, 2),
        ("c0", 4, 0),
        ("c0", 5, 0),
        ("c2", 6, 2),
    ]
    assert all(r["version"] + r["staleness"] + 1 == r["merge"] for r in merged)
    assert [row["round"] for row in merged] == [1, 1, 1, 2, 2, 2]
    ends = [row for row in rows if row["kind"] == "round"]
    assert [row["at_seconds"] for row in ends] == [1.0, 2.0, 2.0, 3.0, 4.0, 4.0]
    expected = [0.6 * (1 + row["staleness"]) ** -0.5 for row in merged]
    assert [row["weight"] for row in ends] == expected


def test_a_run_twice_has_the_same_bits_at_any_poll_interval() -> None:
    """Node ids are random in each; ties go by client_key."""
    made = [
        rows_of(async_split, timed(clients(message_app)), poll_seconds=poll, **FEDASYNC)
        for poll in (0.1, 9.0)
    ]
    assert differences(made[0][0], made[1][0]) == []
    keys = [
        [r["client_key"] for r in rows if r["kind"] == "client"] for _, rows in made
    ]
    assert keys[0] == keys[1]


def test_fedasync_is_its_reference() -> None:
    """Twenty lines that know no edges: train, wait in time's order, mix, go on."""
    speeds, merges = (1.0, 2.5, 4.2), 6
    grid = timed(apps([None] * 3), speeds)
    made = state_after(grid, async_split(**FEDASYNC))
    state, version, now = initial_state(), 0, 0.0
    flying = []

    def trained(key: int) -> State:
        """Train one client alone, as SmartSplit does in a round of this number."""
        strategy = smart_split((), select=lambda request: only(request, key))
        grid = InProcessGrid(apps([None] * 3))
        messages = list(
            strategy.configure_train(
                version + 1, to_array_record(state), ConfigRecord(), grid
            )
        )
        replies = grid.send_and_receive(messages)
        arrays, _ = strategy.aggregate_train(version + 1, replies)
        assert arrays is not None
        return {name: array.numpy() for name, array in arrays.items()}

    for key in range(3):
        flying.append((speeds[key], key, version, trained(key)))
    while version < merges:
        now, key, began, reply = flying.pop(
            flying.index(min(flying, key=lambda f: f[:2]))
        )
        weight = 0.6 * (1 + version - began) ** -0.5
        state = {
            n: np.asarray(
                a.astype(np.float64) + weight * (reply[n].astype(np.float64) - a)
            ).astype(a.dtype)
            for n, a in state.items()
        }
        version += 1
        flying.append((now + speeds[key], key, version, trained(key)))
    assert differences(made, state) == []


def only(request: Any, key: int) -> Any:
    """Choose one client."""
    kept = tuple(c for c in request.candidates if c.device.client_key == f"c{key}")
    return select_at_random(replace(request, candidates=kept, num_clients=1))


def test_a_round_is_as_much_work_as_a_synchronous_one() -> None:
    """``evaluate_fn``, ``server-round`` and metrics count rounds, not merges."""
    seen: list[int] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(number)
        return MetricRecord({"score": float(number)})

    result = async_split(**FEDASYNC).start(
        timed(apps([None] * 3)), initial_arrays(), num_rounds=2, evaluate_fn=evaluate
    )
    assert seen == [0, 1, 2]
    assert result.evaluate_metrics_serverapp.keys() == {0, 1, 2}
    assert result.train_metrics_clientapp.keys() == {1, 2}


def test_what_needs_rounds_is_refused_at_the_start() -> None:
    """Each with the reason, and what to do."""
    make = {"clients_at_once": 2}
    refused = [
        ({"strategy": FedAvg()}, "fraction_evaluate=0.0, and an evaluate_fn"),
        ({"strategy": FedAvg(0.5, 0.0)}, "clients_at_once says how many"),
        ({"planning": Planning(advisor=StragglerAdvisor())}, "leave it out"),
        ({"planning": Planning(variants=Shrinking())}, "change what is trained"),
        ({"checkpoints": Checkpoints("x")}, "do not hold what is in flight"),
        ({"merge_every": 3}, "at most as many as are trained at once"),
        ({"max_share": 0.01}, "at least 1 of the last 20"),
        ({"max_staleness": -1}, "max_staleness is -1"),
        ({"poll_seconds": 0}, "poll_seconds is 0"),
    ]
    for changes, text in refused:
        with pytest.raises(ValueError, match=text):
            AsyncSmartSplit(TASK, **make | changes)
    grid = InProcessGrid(apps([None]))
    with pytest.raises(SmartSplitError, match="call start, unwrapped"):
        async_split(**make).configure_train(1, initial_arrays(), ConfigRecord(), grid)


def test_server_steps_that_step_at_each_merge_are_said_aloud(caplog: Any) -> None:
    """Once; and fewer clients than places, too."""
    strategy = async_split(clients_at_once=9, server_steps=(Momentum(beta=0.5),))
    state_after(timed(apps([None] * 3)), strategy, num_rounds=1)
    lines = [line for line in caplog.messages if "fewer train at once" in line]
    assert len(lines) == 1
    assert any("1 server steps are taken at each merge" in m for m in caplog.messages)


def test_split_routes_really_train_at_the_edge() -> None:
    """So that the tests above mean what they say."""
    strategy = async_split(EDGES, **FEDASYNC, **MIXED)
    state_after(timed(clients(message_app)), strategy)
    made = {a.option.route for p in strategy.round_plans for a in p.assignments}
    assert len(made) > 2
    assert {len(route.edges()) for route in made} >= {1, 2}


def test_a_buffer_is_the_mean_of_its_replies_by_the_oldest_one() -> None:
    """Two of three replies each time; planted: each reply alone is another run."""
    grid = timed(apps([None] * 3), (1.0, 2.5, 4.2))
    _, rows = rows_of(async_split, grid, **FEDASYNC, merge_every=2)
    ends = [row for row in rows if row["kind"] == "round"]
    oldest = [
        max(
            r["staleness"]
            for r in rows
            if r.get("status") == "accepted" and r["merge"] == m
        )
        for m in (1, 2, 3)
    ]
    assert [row["accepted"] for row in ends] == [2, 2, 2]
    assert [row["round"] for row in ends] == [1, 1, 2]
    assert max(oldest) > 0
    assert [row["weight"] for row in ends] == [0.6 * (1 + s) ** -0.5 for s in oldest]
