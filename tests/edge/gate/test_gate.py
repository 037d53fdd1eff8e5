"""EdgeGate: runs that do not see each other, restarts, leases, repetitions."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr_smartsplit import Route
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.gate import gate as module
from flwr_smartsplit.edge.gate.gate import EdgeGate, Terms
from flwr_smartsplit.edge.gate.run_keys import Run, secret_digest
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import EdgeError, EdgeFull, RefusedRequest, StaleSession
from flwr_smartsplit.types import EDGE, EdgeProfile
from tests.edge.gate.federation import (
    ADDRESS,
    DIGEST,
    STATE,
    Client,
    Federation,
    Strategy,
    make_gate,
    transport_to,
)
from tests.faults import tail_files
from tests.tasks import TASK

ADMIN = "the admin secret"


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shared_edge(folder: Path, clock: Clock | None = None, **profile: Any) -> EdgeGate:
    """Start an edge for several runs."""
    return EdgeGate(
        TASK,
        spill_dir=folder,
        incarnation="life",
        profile=EdgeProfile(name=EDGE, **profile),
        terms=Terms(
            admin_digest=secret_digest(ADMIN),
            max_runs=2,
            lease_seconds=None if clock is None else 60.0,
            clock=clock or Clock(),
        ),
    )


def begun(gate: EdgeGate) -> Strategy:
    """Begin a run and hold its state."""
    strategy = Strategy(gate, admin=ADMIN)
    strategy.hold()
    return strategy


def client_of(gate: EdgeGate, strategy: Strategy) -> Client:
    """Make the client c0 of a run."""
    return Client(transport_to(gate), strategy.signed(0), f"1.0/c0/{EDGE}")


# --- runs ---------------------------------------------------------------------------


def test_two_runs_do_not_see_each_other(tmp_path: Path) -> None:
    """Their clients have the same names; one run's release leaves the other alone."""
    gate = shared_edge(tmp_path)
    one, other = begun(gate), begun(gate)
    clients = [client_of(gate, strategy).open() for strategy in (one, other)]
    for client in clients:
        client.step()
    receipt = clients[0].seal()
    one.ask(wire.Release(10**9, ""))
    assert not one.ask(wire.IsHeld(DIGEST)).is_held
    assert other.ask(wire.IsHeld(DIGEST)).is_held
    clients[1].step()
    same = clients[1].seal()
    assert same.session == receipt.session
    entry = wire.Entry(same.session, same.digest, 1)
    assert other.ask(wire.Commit(1, (entry,))).sums
    for mine, yours in ((one, other), (other, one)):
        stolen = replace(wire.IsHeld(DIGEST), access=mine.access)
        forged = replace(stolen, access=f"{yours.keys.run}:{mine.access[33:]}")
        with pytest.raises(RefusedRequest):
            transport_to(gate).send(forged)
    with pytest.raises(StaleSession):
        clients[1].step(incarnation=clients[0].incarnation)


def test_a_shared_edge_begins_runs_with_its_secret_only(tmp_path: Path) -> None:
    """And not more than it takes; until then, it answers nobody."""
    gate = shared_edge(tmp_path)
    with pytest.raises(RefusedRequest, match="the edge's admin secret, and not"):
        Strategy(gate, admin="guess")
    with pytest.raises(RefusedRequest, match="is for the strategy of a run"):
        transport_to(gate).send(wire.IsHeld(DIGEST))
    begun(gate), begun(gate)
    with pytest.raises(RefusedRequest, match="2 runs of 2 have begun"):
        begun(gate)


def test_runs_share_an_edges_budget(tmp_path: Path) -> None:
    """Two sessions of one name in two runs are two sessions."""
    gate = shared_edge(tmp_path, memory_bytes=2**14)
    one, other = begun(gate), begun(gate)
    first = client_of(gate, one).open()
    with pytest.raises(EdgeFull, match="beside 1 open"):
        client_of(gate, other).open()
    first.edge.send(wire.Abandon(first.name, first.incarnation))
    client_of(gate, other).open().step()


def test_a_run_may_begin_again_as_it_was(tmp_path: Path) -> None:
    """Its request was repeated; sessions go on."""
    federation = Federation.start(tmp_path)
    federation.stranger.send(federation.strategy.keys.hello(ADDRESS))
    federation.check_unharmed()


def test_an_edge_nobody_has_begun_a_run_at_is_private(tmp_path: Path) -> None:
    """Whoever started it in its own process may ask anything, as ``check`` does."""
    gate = make_gate(tmp_path)
    edge = transport_to(gate)
    edge.send(wire.HoldState(DIGEST, STATE))
    assert edge.send(wire.IsHeld(DIGEST)).is_held
    Strategy(gate)
    with pytest.raises(RefusedRequest):
        edge.send(wire.IsHeld(DIGEST))


# --- an edge's lives ------------------------------------------------------------------


def test_a_run_outlives_its_edge(tmp_path: Path) -> None:
    """Strategy and sealed tails are known after a restart; open sessions are lost.

    A client that had not opened yet opens now: the edge needs nothing but the key.
    """
    federation = Federation.start(tmp_path)
    receipt = federation.thief.seal()
    gate = make_gate(tmp_path)
    edge = transport_to(gate)
    with pytest.raises(StaleSession, match="the edge restarted"):
        replace(federation.victim, edge=edge).step()
    entry = wire.Entry(receipt.session, receipt.digest, 1)
    access = federation.strategy.access
    assert edge.send(wire.Commit(1, (entry,), access=access)).sums
    late = Client(edge, federation.strategy.signed(3), f"1.0/c3/{EDGE}").open()
    late.step()
    late.seal()
    with pytest.raises(RefusedRequest):
        edge.send(wire.Release(1, ""))


def test_what_lies_on_the_disk_opens_no_door(tmp_path: Path) -> None:
    """A public key and a digest, in a folder of the edge's owner."""
    federation = Federation.start(tmp_path)
    (path,) = tmp_path.glob("*/run.json*")
    text = path.read_text("utf-8")
    secret = federation.strategy.access.partition(":")[2]
    assert secret not in text
    assert secret_digest(federation.strategy.access).hex() in text


def test_a_silent_run_ends_with_its_lease(tmp_path: Path) -> None:
    """Its sessions, tails, folder and memory are given back; another run goes on."""
    clock = Clock()
    gate = shared_edge(tmp_path, clock, memory_bytes=2**14)
    silent, other = begun(gate), begun(gate)
    client = client_of(gate, silent).open()
    for clock.now in (50.0, 100.0):  # Clients are heard, too.
        client.step()
        assert other.ask(wire.IsHeld(DIGEST)).is_held
    clock.now = 150.0
    assert other.ask(wire.IsHeld(DIGEST)).is_held
    clock.now = 161.0
    with pytest.raises(StaleSession, match="its run ended"):
        client.step()
    with pytest.raises(StaleSession, match="has not begun at this edge, or is over"):
        client.open()
    assert not (tmp_path / silent.keys.run).exists()
    honest = client_of(gate, other).open()  # There is room for one.
    honest.step()
    honest.seal()
    begun(gate)


# --- honest repetitions ---------------------------------------------------------------


def test_a_repeated_opening_has_the_same_answer_until_the_round_ends(
    tmp_path: Path,
) -> None:
    """Its reply was lost; the session is as it was."""
    federation = Federation.start(tmp_path)
    before = federation.victim.incarnation
    assert federation.victim.open().incarnation == before
    assert len(before.partition(":")[2]) == 32  # 128 bits
    federation.check_unharmed()
    (held,) = federation.gate._runs.values()
    evaluating = federation.evaluating()
    assert len(held.answers) == 3
    federation.strategy.ask(wire.Release(1, DIGEST, phase=1))
    assert held.answers == held.locks == {}
    with pytest.raises(RefusedRequest, match="round 1 is over"):
        evaluating.open()


def test_an_opening_that_failed_may_be_tried_again(tmp_path: Path) -> None:
    """A full edge has no room now, and perhaps later."""
    gate = make_gate(tmp_path, memory_bytes=2**14)
    strategy = Strategy(gate)
    strategy.hold()
    first = Client(transport_to(gate), strategy.signed(0), f"1.0/c0/{EDGE}").open()
    second = Client(transport_to(gate), strategy.signed(1), f"1.0/c1/{EDGE}")
    with pytest.raises(EdgeFull):
        second.open()
    first.edge.send(wire.Abandon(first.name, first.incarnation))
    second.open().step()


def test_a_route_over_two_edges_is_signed_hop_by_hop(tmp_path: Path) -> None:
    """The first edge passes on what the strategy has signed for the second."""
    far = make_gate(tmp_path / "far")
    far._profile = EdgeProfile(name="far")
    near = EdgeGate(
        TASK,
        spill_dir=tmp_path / "near",
        incarnation="life",
        profile=EdgeProfile(name="near"),
        connect=lambda place, _: {"far": transport_to(far)}[place],
    )
    strategy = Strategy(near)
    strategy.hold()
    transport_to(far).send(strategy.keys.hello(ADDRESS))
    transport_to(far).send(wire.HoldState(DIGEST, STATE, access=strategy.access))
    route = Route.hops((2, 6), edges=("near", "far"))
    client = Client(transport_to(near), strategy.signed(0, route), "1.0/c0/near")
    client.open().step()
    receipts = client.edge.send(wire.Seal(client.name, client.incarnation, 1))
    assert [receipt.place for receipt in receipts] == ["near", "far"]


# --- the checks are what does it ------------------------------------------------------


def test_without_its_checks_a_gate_lets_them_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted errors, one for each role."""
    monkeypatch.setattr(module, "check_step", lambda *_: None)
    monkeypatch.setattr(Run, "check_access", lambda *_: None)
    federation = Federation.start(tmp_path)
    client = federation.returning()
    client.step(targets=None, num_examples=2**29 - 1)
    run = federation.strategy.keys.run
    federation.stranger.send(wire.Release(10**9, "", access=run))
    with pytest.raises(StaleSession):
        federation.check_unharmed()


def test_states_that_are_within_the_quota_are_held(tmp_path: Path) -> None:
    """Two of them: this round's and the next one's."""
    federation = Federation.start(tmp_path)
    newer = {name: np.asarray(array + 1) for name, array in STATE.items()}
    federation.strategy.ask(wire.HoldState(state_digest(newer), newer))
    federation.strategy.ask(wire.HoldState(DIGEST, STATE))
    assert federation.strategy.ask(wire.IsHeld(state_digest(newer))).is_held
    federation.check_unharmed()


def test_what_fails_inside_stays_at_the_edge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The client hears of the error; its traceback is in the edge's log."""
    federation = Federation.start(tmp_path)
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(EdgeError, match=r"a Forward .Runtime"),
    ):
        federation.thief.step(boundary=())
    assert "Traceback" in caplog.text
    with pytest.raises(StaleSession):
        federation.thief.step()
    assert tail_files(tmp_path, "") == []
    federation.check_unharmed()
