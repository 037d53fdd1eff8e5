"""Edges in asynchronous runs: several states, and sessions that end one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.gate.gate import EdgeGate, Terms
from flwr_smartsplit.edge.gate.rules import (
    MAX_STATES,
    SPARE_BYTES,
    check_state,
    kind_of,
)
from flwr_smartsplit.edge.gate.run_keys import Run, RunKeys, secret_digest
from flwr_smartsplit.edge.state_store import StateStore
from flwr_smartsplit.errors import RefusedRequest, TailLost
from flwr_smartsplit.types import EDGE, EdgeProfile
from tests.edge.test_session_room import opening, service
from tests.faults import tail_files
from tests.tasks import TASK

STATE = {"w": np.zeros(2**19, np.float32)}
KINDS = {"w": kind_of(STATE["w"])}


def test_a_release_keeps_the_states_of_those_in_flight(tmp_path: Path) -> None:
    """Planted: what is not named goes."""
    store = StateStore(tmp_path)
    for name in ("one", "two", "three", "rest"):
        store.hold(name, STATE)
    store.release(0, "three", "rest", "one")
    held = {name for name in ("one", "two", "three", "rest") if store.holds(name)}
    assert held == {"one", "three", "rest"}


def test_a_file_that_is_being_written_outlives_a_release(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Another client's session may end just then; what a dead process left goes."""
    store = StateStore(tmp_path)
    left = tmp_path / "x.tail.unfinished"
    left.touch()
    usual = Path.replace

    def released_before(self: Path, target: Any) -> Any:
        store.release(1, "")
        return usual(self, target)

    monkeypatch.setattr(Path, "replace", released_before)
    store.put_tail("2.0/c/edge", 2, STATE)
    assert not left.exists()
    assert store.read_tail("2.0/c/edge").keys() == STATE.keys()


def test_a_session_that_has_ended_goes_and_a_later_one_stays_sealed(
    tmp_path: Path,
) -> None:
    """Sealed twice, it gives the same receipts, although others were released."""
    edge = service(tmp_path)
    sealed = {}
    for name in ("ended", "waits"):
        opened = edge.handle(opening(name, round_number=5))
        seal = wire.Seal(name, opened.incarnation, 0)
        sealed[name] = seal, edge.handle(seal)
    digest = opening("x").state_digest
    edge.handle(wire.Release(4, digest, ended=("ended",)))
    assert len(tail_files(tmp_path)) == 1
    seal, receipts = sealed["waits"]
    assert edge.handle(seal) == receipts
    with pytest.raises(TailLost):
        edge.store.read_tail("ended")
    edge.handle(wire.Release(5, digest))
    assert tail_files(tmp_path) == []


def test_a_run_holds_as_many_states_as_it_said() -> None:
    """And no more; planted: two are the limit of rounds."""
    request = wire.HoldState("digest", STATE)
    size = STATE["w"].nbytes
    held = {"held_bytes": 3 * size + SPARE_BYTES}
    check_state(request, KINDS, num_states=4, **held)
    with pytest.raises(RefusedRequest, match="over 2 models: send Release first"):
        check_state(request, KINDS, num_states=2, **held)


def test_a_gate_remembers_how_many_after_a_restart(tmp_path: Path) -> None:
    """As it does who the strategy is; too many are refused."""

    def gate() -> EdgeGate:
        terms = Terms(admin_digest=secret_digest("a"), max_runs=2)
        profile = EdgeProfile(name=EDGE)
        return EdgeGate(
            TASK, spill_dir=tmp_path, incarnation="i", profile=profile, terms=terms
        )

    keys = RunKeys()
    hello = keys.hello("here", admin="a", num_states=7)
    gate().handle(hello)
    again = gate()
    assert again._runs[keys.run].run == Run.of(hello)
    assert again._runs[keys.run].run.num_states == 7
    for wrong in (0, MAX_STATES + 1):
        with pytest.raises(RefusedRequest, match="lower clients_at_once"):
            Run.of(keys.hello("here", num_states=wrong))
