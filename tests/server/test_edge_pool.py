"""EdgePool: one edge's trouble is that edge's, and states travel once."""

from pathlib import Path
from typing import Any

import pytest

from flwr_smartsplit import Route
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.grpc import GrpcEdge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.hosts.ray import RayEdge
from flwr_smartsplit.edge.message_bytes import decode
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import EdgeError, EdgeUnreachable, RefusedRequest
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.server.global_state import GlobalState
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE, EdgeProfile, Link
from tests.faults import Deliver, MortalEdge
from tests.server.one_round import ROUND, prepared, signed, start, train
from tests.tasks import TASK, State, client_plan, initial_state, state_bytes

STATE = initial_state()
DIGEST = state_digest(STATE)


class Stillborn(MortalEdge):
    """An edge that cannot be started while it is ``broken``."""

    broken = True

    def start(self, task: Task) -> str:
        """Fail, or start."""
        if self.broken:
            raise EdgeUnreachable(f"edge {self.name!r}: no such machine.")
        return super().start(task)


def held(edge: MortalEdge) -> list[str]:
    """List the digests an edge was sent a state under."""
    return [r.digest for r in edge.requests if isinstance(r, wire.HoldState)]


@pytest.fixture
def edges(tmp_path: Path) -> tuple[MortalEdge, MortalEdge]:
    """Make two edges."""
    return MortalEdge(tmp_path / "a", name="a"), MortalEdge(tmp_path / "b", name="b")


def other_state() -> State:
    """Make another state."""
    return {name: array + 1 for name, array in STATE.items()}


def test_names_must_differ(tmp_path: Path) -> None:
    """Routes name edges, so two of one name would be one."""
    with pytest.raises(ValueError, match="different names"):
        EdgePool([LocalEdge(), LocalEdge()], TASK)


def test_a_state_is_sent_to_each_edge_once(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """A second phase with the same state costs a question and no more."""
    pool = EdgePool(edges, TASK)
    addresses, failures = prepared(pool, DIGEST, STATE)
    assert list(addresses) == ["a", "b"]
    assert failures == []
    assert prepared(pool, DIGEST, STATE)[0] == addresses
    for edge in edges:
        assert held(edge) == [DIGEST]
        assert edge.num_starts == 1
    assert pool.traffic_bytes() == 2 * state_bytes(STATE)
    newer = other_state()
    prepared(pool, state_digest(newer), newer)
    assert held(edges[0]) == [DIGEST, state_digest(newer)]


def two_parts(state: State) -> GlobalState:
    """Divide a state after its first name, which is frozen."""
    frozen, *changing = state
    del frozen
    return GlobalState.of(state, changing)


def both_held(pool: EdgePool, parts: GlobalState) -> None:
    """Have all edges hold both parts."""
    rest = {parts.rest: parts.frozen}
    _, failures = prepared(pool, parts.digest, parts.changing, rest=rest)
    assert failures == []


def test_a_state_is_sent_to_the_edges_in_use_only(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """All are asked, in the order of the pool; those that no route has are not sent."""
    pool = EdgePool(edges, TASK)
    addresses, failures = pool.prepare(DIGEST)
    assert (list(addresses), failures) == (["a", "b"], [])
    assert [held(edge) for edge in edges] == [[], []]
    assert pool.hold(["b"], DIGEST, STATE) == (addresses, [])
    assert [held(edge) for edge in edges] == [[], [DIGEST]]
    pool.prepare(DIGEST)
    assert pool.hold(["b", "a"], DIGEST, STATE) == (addresses, [])
    assert [held(edge) for edge in edges] == [[DIGEST], [DIGEST]]
    assert pool.hold([], state_digest(other_state()), other_state()) == (addresses, [])


def test_an_edge_that_dies_before_it_is_sent_the_state_is_started_again(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """Its new address is returned; if it cannot be had, it is left out."""
    pool = EdgePool(edges, TASK)
    pool.prepare(DIGEST)
    before, _ = pool.prepare(DIGEST)
    edges[1].kill()
    after, failures = pool.hold(["b"], DIGEST, STATE)
    assert (after["a"], failures) == (before["a"], [])
    assert after["b"] != before["b"]
    assert held(edges[1]) == [DIGEST]


def test_the_frozen_part_of_a_state_is_sent_to_each_edge_once(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """Also over rounds, until an edge has lost it; another one is sent."""
    pool = EdgePool(edges, TASK)
    first = two_parts(STATE)
    both_held(pool, first)
    name = next(iter(STATE))
    second = two_parts({**other_state(), name: STATE[name]})
    assert first.rest == second.rest
    pool.release(1, second.digest, second.rest)
    both_held(pool, second)
    assert [held(edge) for edge in edges] == [
        [first.rest, first.digest, second.digest]
    ] * 2
    edges[0].kill()
    both_held(pool, second)
    assert held(edges[0])[3:] == [second.rest, second.digest]
    third = two_parts(other_state())
    assert third.rest != second.rest
    both_held(pool, third)
    assert held(edges[1])[3:] == [third.rest, third.digest]


def test_a_frozen_part_under_a_wrong_digest_is_refused(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """The planted error: a state that claims another rest."""
    pool = EdgePool(edges, TASK)
    parts = two_parts(STATE)
    other = two_parts(other_state())
    rest = {other.rest: other.frozen}
    with pytest.raises(EdgeUnreachable, match="has another digest: it changed on the"):
        prepared(pool, parts.digest, parts.changing, rest=rest)


def test_a_dead_edge_is_restarted_and_given_the_state_again(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """The other one is not even asked to hold it twice."""
    pool = EdgePool(edges, TASK)
    before, _ = prepared(pool, DIGEST, STATE)
    edges[1].kill()
    after, failures = prepared(pool, DIGEST, STATE)
    assert failures == []
    assert after["a"] == before["a"]
    assert after["b"] != before["b"]
    assert [edge.num_starts for edge in edges] == [1, 2]
    assert held(edges[0]) == [DIGEST]
    assert held(edges[1]) == [DIGEST, DIGEST]
    assert edges[1].connect(after["b"]).send(wire.IsHeld(DIGEST)).is_held


def test_an_edge_that_restarted_by_itself_keeps_what_is_on_its_disk(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """Its address stays, and the state is not sent again."""
    pool = EdgePool(edges, TASK)
    before, _ = prepared(pool, DIGEST, STATE)
    edges[1].restart()
    assert prepared(pool, DIGEST, STATE) == (before, [])
    assert held(edges[1]) == [DIGEST]


def test_an_edge_that_cannot_be_had_is_left_out_and_tried_again(
    tmp_path: Path,
) -> None:
    """Rounds go on with the others, and with it as soon as it is back."""
    good, bad = (
        MortalEdge(tmp_path / "a", name="a"),
        Stillborn(tmp_path / "b", name="b"),
    )
    pool = EdgePool([bad, good], TASK)
    addresses, failures = prepared(pool, DIGEST, STATE)
    assert list(addresses) == ["a"]
    (failure,) = failures
    assert (failure.client_key, failure.kind) == ("edge b", "edge_failed")
    assert "no such machine" in failure.cause
    with pytest.raises(EdgeUnreachable, match="'b' is not running"):
        pool.commit("b", 1, ())
    bad.broken = False
    addresses, failures = prepared(pool, DIGEST, STATE)
    assert sorted(addresses) == ["a", "b"]
    assert failures == []


def test_no_edge_from_the_start_is_an_error(tmp_path: Path) -> None:
    """Something is set up wrongly, and the cause is in the message."""
    pool = EdgePool([Stillborn(tmp_path, name="b")], TASK)
    with pytest.raises(EdgeUnreachable, match=r"no edge could be started.*no such"):
        prepared(pool, DIGEST, STATE)


def test_losing_every_edge_later_is_not(tmp_path: Path) -> None:
    """Whole models can still train."""
    edge = Stillborn(tmp_path, name="b")
    edge.broken = False
    pool = EdgePool([edge], TASK)
    prepared(pool, DIGEST, STATE)
    edge.kill()
    edge.broken = True
    addresses, failures = prepared(pool, DIGEST, STATE)
    assert addresses == {}
    assert [failure.client_key for failure in failures] == ["edge b"]


def test_no_edges_are_no_trouble() -> None:
    """A pool of none prepares, releases and stops."""
    pool = EdgePool([], TASK)
    assert prepared(pool, DIGEST, STATE) == ({}, [])
    pool.release(1, DIGEST)
    pool.stop()
    assert pool.traffic_bytes() == 0


def test_releasing_passes_over_dead_edges(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """Those that live are told, whatever their order."""
    pool = EdgePool(edges, TASK)
    prepared(pool, DIGEST, STATE)
    edges[0].kill()
    pool.release(1, "another digest")
    assert any(isinstance(request, wire.Release) for request in edges[1].requests)
    assert list(edges[1].folder.iterdir()) == []


def test_stopping_ends_every_edge(edges: tuple[MortalEdge, MortalEdge]) -> None:
    """Their files go too, and stopping twice is no error."""
    pool = EdgePool(edges, TASK)
    prepared(pool, DIGEST, STATE)
    edges[0].kill()
    pool.stop()
    pool.stop()
    assert not any(edge.folder.exists() for edge in edges)
    with pytest.raises(EdgeUnreachable):
        pool.commit("a", 1, ())


def test_traffic_never_becomes_less(edges: tuple[MortalEdge, MortalEdge]) -> None:
    """What was sent to an edge that died was sent; journals hold differences."""
    pool = EdgePool(edges, TASK)
    prepared(pool, DIGEST, STATE)
    before = pool.traffic_bytes()
    edges[0].kill()
    prepared(pool, DIGEST, STATE)
    assert pool.traffic_bytes() == before + state_bytes(STATE)


def test_an_edge_whose_disk_fails_costs_itself_only(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """An error of the operating system at one edge is that edge's failure."""

    def full(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.HoldState):
            edges[0].folder.rmdir()
            edges[0].folder.write_text("a file where the folder was")
        return deliver(request)

    edges[0].hook = full
    addresses, failures = prepared(EdgePool(edges, TASK), DIGEST, STATE)
    assert list(addresses) == ["b"]
    assert [failure.client_key for failure in failures] == ["edge a"]


def test_an_edge_that_cannot_take_the_state_is_stopped(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """Else every round would leave one more of its processes behind."""

    def refuse(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.HoldState):
            raise EdgeUnreachable("no room")
        return deliver(request)

    edges[0].hook = refuse
    pool = EdgePool(edges, TASK)
    prepared(pool, DIGEST, STATE)
    assert not edges[0].folder.exists()


def test_edges_keep_their_order_after_a_restart(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """Clients are dealt out by it, and edges feed one another along it."""
    pool = EdgePool(edges, TASK)
    prepared(pool, DIGEST, STATE)
    edges[0].kill()
    newer = other_state()
    addresses, failures = prepared(pool, state_digest(newer), newer)
    assert failures == []
    assert list(addresses) == ["a", "b"]


def test_a_pool_says_what_its_edges_offer() -> None:
    """In the order asked for."""
    facts: dict[str, Any] = {
        "name": "near",
        "memory_bytes": 3,
        "disk_bytes": 4,
        "flops_per_second": 5.0,
        "links": {"plain": Link(latency_seconds=1.0)},
    }
    for kind in (LocalEdge, RayEdge, GrpcEdge):
        pool = EdgePool([kind(**facts), LocalEdge(name="plain")], TASK)
        assert pool.profiles(("plain", "near")) == (
            EdgeProfile(name="plain"),
            EdgeProfile(**facts),
        )


def test_a_link_leads_to_another_edge_of_the_run() -> None:
    """A name with an error in it would make it free."""
    near = LocalEdge(name="near", links={"fra": Link()})
    with pytest.raises(ValueError, match=r"'near' has a link to 'fra', and the edges"):
        EdgePool([near, LocalEdge(name="far")], TASK)


def test_an_edge_that_runs_out_of_memory_is_that_edges_trouble(
    edges: tuple[MortalEdge, MortalEdge],
) -> None:
    """Its clients are dropped; the round, and the run, go on."""
    pool = EdgePool(edges, TASK)
    prepared(pool, DIGEST, STATE)

    def fails(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.Commit | wire.HoldState):
            raise MemoryError("cannot sum")
        return deliver(request)

    edges[0].hook = fails
    with pytest.raises(EdgeError, match=r"fails at Commit \(MemoryError: cannot sum\)"):
        pool.commit("a", 1, ())
    newer = other_state()
    addresses, failures = prepared(pool, state_digest(newer), newer)
    assert list(addresses) == ["b"]
    assert [failure.client_key for failure in failures] == ["edge a"]


def test_what_was_signed_opens_nothing_after_the_release() -> None:
    """And a later phase may have the same round: a strategy may be used again."""
    edge, routes = LocalEdge(), [Route.split(2)]
    pool, first = start([edge], routes)
    try:
        addresses, _ = prepared(pool, DIGEST, STATE)
        plan = client_plan(0, routes[0], STATE, addresses=addresses)
        old = signed(plan, pool, num_examples=9)
        pool.release(ROUND, DIGEST)
        addresses, _ = prepared(pool, DIGEST, STATE)
        again = train(routes, STATE, edges={EDGE: edge}, addresses=addresses, pool=pool)
        assert again[0].receipts[0].digest == first[0].receipts[0].digest
        with pytest.raises(RefusedRequest, match="round 1 is over"):
            edge.connect(addresses[EDGE]).send(decode(old.opening))
    finally:
        pool.stop()
