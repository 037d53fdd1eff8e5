"""The seams of a round: mixing, server steps, the hook between rounds, versions."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message

from flwr_smartsplit import Route, deepest_split
from flwr_smartsplit.edge.protocol import HoldState, IsHeld
from flwr_smartsplit.errors import EdgeUnreachable, SmartSplitError
from flwr_smartsplit.flower.rounds.exchange import Dispatch, Sent, device_names
from flwr_smartsplit.flower.serde.records import (
    from_array_record,
    plan_from_config,
    plan_to_scalars,
    to_array_record,
)
from flwr_smartsplit.server.aggregation import Replace, RoundSummary
from tests.faults import Deliver, MortalEdge
from tests.flower.apps import apps, budgets_of, initial_arrays, run, smart_split
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.in_process_grid import InProcessGrid
from tests.tasks import State, client_plan, differences, initial_state, tiny_chain

MIXED = budgets_of(1, 4, None, 8)


@dataclass
class Discount:
    """An asynchronous mixing: a stale mean counts less."""

    weights: list[float] = field(default_factory=list)

    def mix(self, current: Any, mean: Any, summary: RoundSummary) -> State:
        """Go only a part of the way."""
        self.weights.append(1 / (1 + summary.staleness))
        return between(current, mean, self.weights[-1])


def between(one: Any, other: Any, share: float) -> State:
    """Go a share of the way from one state to another."""
    return {n: np.asarray(a + share * (other[n] - a), a.dtype) for n, a in one.items()}


@dataclass
class Scale:
    """A server step that scales the change of a round."""

    factor: float
    seen: list[RoundSummary] = field(default_factory=list)

    def step(self, before: Any, after: Any, summary: RoundSummary) -> State:
        """Go so far beyond the state that was merged."""
        self.seen.append(summary)
        return between(before, after, self.factor)


def run_message(**changes: Any) -> Any:
    """Run the Message API's strategy."""
    return run(apps(MIXED), smart_split(**changes), num_rounds=2)


def run_old(**changes: Any) -> Any:
    """Run the legacy API's strategy."""
    return run_legacy(apps(MIXED), legacy_smart_split(**changes), num_rounds=2)


RUNS = pytest.mark.parametrize("run_with", [run_message, run_old])


@RUNS
def test_neutral_values_change_no_bit(run_with: Any) -> None:
    """Replace, no step, and a hook that only looks; a planted half step is seen."""
    plain = run_with()
    looked: list[int] = []
    neutral = run_with(
        mixing=Replace(),
        server_steps=(),
        between_rounds=lambda number, *_: looked.append(number),
    )
    assert differences(plain.state, neutral.state) == []
    assert looked == [1, 2]
    assert differences(plain.state, run_with(server_steps=(Scale(0.5),)).state) != []


@RUNS
def test_server_steps_follow_each_other_and_know_the_round(run_with: Any) -> None:
    """A half step and a double step come to the whole, up to one rounding."""
    half, double = Scale(0.5), Scale(2.0)
    made = run_with(server_steps=(half, double))
    for name, array in run_with().state.items():
        if array.dtype.kind == "i":
            continue  # A count has no half.
        np.testing.assert_allclose(made.state[name], array, rtol=1e-5, atol=1e-6)
    assert [summary.round_number for summary in half.seen] == [1, 2]
    assert half.seen == double.seen
    assert list(half.seen[0].reports) == ["c0", "c1", "c2", "c3"]
    assert half.seen[0].reports["c1"].num_steps == 3


@RUNS
def test_a_state_made_between_rounds_is_the_next_one(run_with: Any) -> None:
    """The hook sees what the round ends with, and may end it with something else."""
    seen: list[State] = []

    def reset(number: int, state: Any, summary: RoundSummary) -> Any:
        assert summary.failures == ()
        seen.append(state)
        return initial_state() if number == 1 else None

    made = run_with(between_rounds=reset)
    assert differences(made.state, seen[1]) == []
    assert differences(made.state, run_with().state) != []

    def foreign(number: int, state: Any, summary: RoundSummary) -> Any:
        return {name: array for name, array in state.items() if name != "0.weight"}

    with pytest.raises(SmartSplitError, match=r"'0\.weight': missing instead of"):
        run_with(between_rounds=foreign)


def test_the_hook_is_told_of_a_round_in_which_nobody_counted() -> None:
    """With the state that stays."""
    grid = InProcessGrid(apps(MIXED[:2]))
    for index in range(2):
        grid.lose(index, nth=1)
    told: list[Any] = []
    run(grid, smart_split(between_rounds=lambda *facts: told.append(facts)))
    (number, state, summary), _ = told
    assert (number, dict(summary.reports)) == (1, {})
    assert differences(state, initial_state()) == []
    assert [f.kind for f in summary.failures] == ["lost", "lost"]


# --- versions -------------------------------------------------------------------------


def moved_arrays() -> ArrayRecord:
    """Make another state to start from."""
    state = {n: np.asarray(a + a) for n, a in initial_state().items()}
    return to_array_record(state)


class Versions:
    """Two versions of the global state, each sent to all four clients."""

    def __init__(self, **changes: Any) -> None:
        """Make one strategy over one grid."""
        self.grid = InProcessGrid(apps(MIXED))
        self.strategy = smart_split(choose_route=deepest_split, **changes)
        self.arrays = {1: initial_arrays(), 2: moved_arrays()}

    def send(self, version: int) -> list[Message]:
        """Let the clients train on a version."""
        arrays, config = self.arrays[version], ConfigRecord()
        sent = self.strategy.configure_train(version, arrays, config, self.grid)
        return list(self.grid.send_and_receive(sent))

    def settle(self, version: int, replies: list[Message]) -> State:
        """Settle a version."""
        arrays, _ = self.strategy.aggregate_train(version, replies)
        assert arrays is not None
        return from_array_record(arrays)


def test_two_versions_may_be_out_and_settle_in_any_order() -> None:
    """With the bits of settling each at once; tails wait at the edge until then."""
    one_by_one = Versions()
    expected = {v: one_by_one.settle(v, one_by_one.send(v)) for v in (1, 2)}
    both = Versions()
    replies = {version: both.send(version) for version in (1, 2)}
    found = {version: both.settle(version, replies[version]) for version in (2, 1)}
    for version in (1, 2):
        assert differences(found[version], expected[version]) == []
    assert differences(expected[1], expected[2]) != []
    assert both.strategy.failures == []
    assert both.strategy.aggregate_train(1, replies[1]) == (None, None)


def test_a_mixing_is_told_how_stale_a_mean_is() -> None:
    """The older of two versions counts half against the newer one's result."""
    mixing = Discount()
    both = Versions(mixing=mixing)
    replies = {version: both.send(version) for version in (1, 2)}
    newer, older = (both.settle(version, replies[version]) for version in (2, 1))
    assert mixing.weights == [1.0, 0.5]
    alone = Versions()
    mean = alone.settle(1, alone.send(1))
    assert differences(older, between(newer, mean, 0.5)) == []


def test_a_second_attempt_has_sessions_of_its_own() -> None:
    """A receipt of the first is not one of the second."""
    plan = client_plan(0, Route.split(4), initial_state(), addresses={"edge": "e"})
    again = replace(plan, attempt=1)
    assert plan.session("edge") != again.session("edge")
    assert plan_from_config(plan_to_scalars(again)) == again
    chain = tiny_chain()
    names = device_names(again, chain)
    dispatch = Dispatch(1, True, 0.0)
    dispatch.sent["c0"] = Sent(again, names, names, None)  # type: ignore[arg-type]
    tail = dispatch.expectations(chain)["c0"].tails["edge"]
    assert tail.session == again.session("edge")


# --- edges ----------------------------------------------------------------------------


def by_name(name: str) -> Any:
    """Route every client over one edge, if it is there; else over the other one."""

    def choose(request: Any) -> Route:
        names = request.edges
        if not names:
            return Route.whole()
        return Route.split(2, edge=name if name in names else names[0])

    return choose


def states_sent(edge: MortalEdge) -> int:
    """Count the states that an edge was sent."""
    return sum(isinstance(request, HoldState) for request in edge.requests)


@pytest.mark.parametrize("kind", [(run, smart_split), (run_legacy, legacy_smart_split)])
def test_an_edge_that_no_route_goes_to_is_not_sent_the_state(
    kind: Any, tmp_path: Path
) -> None:
    """It is asked whether it holds it; the weights are those of a run without it."""
    run_it, make = kind
    pair = [MortalEdge(tmp_path / name, name=name) for name in ("a", "b")]
    ran = run_it(apps(MIXED, edges=pair), make(pair, choose_route=by_name("b")))
    assert [states_sent(edge) for edge in pair] == [0, 2]
    assert all(any(isinstance(r, IsHeld) for r in edge.requests) for edge in pair)
    alone = [MortalEdge(tmp_path / "c", name="b")]
    truth = run_it(apps(MIXED, edges=alone), make(alone, choose_route=by_name("b")))
    assert differences(ran.state, truth.state) == []


def test_an_edge_that_cannot_be_sent_the_state_is_planned_without(
    tmp_path: Path,
) -> None:
    """The round is the one of a run without it; the journal says why it is missing."""
    pair = [MortalEdge(tmp_path / name, name=name) for name in ("a", "b")]

    def refuse(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, HoldState):
            raise EdgeUnreachable("no room")
        return deliver(request)

    pair[0].hook = refuse
    strategy = smart_split(pair, choose_route=by_name("a"))
    ran = run(apps(MIXED, edges=pair), strategy)
    assert ran.kinds() == [("edge a", "edge_failed")] * 2
    assert states_sent(pair[1]) == 2
    assert len(strategy.round_plans) == 2
    alone = [MortalEdge(tmp_path / "c", name="b")]
    truth = run(apps(MIXED, edges=alone), smart_split(alone, choose_route=by_name("b")))
    assert differences(ran.state, truth.state) == []
