"""An edge with budgets: nobody beyond them, and nobody else suffers."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flwr_smartsplit import Route
from flwr_smartsplit.device.local_training import Conditions, Outcome, train_locally
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.edge.tensors import WireTensor, state_digest
from flwr_smartsplit.errors import EdgeFull, RefusedMove, StaleSession
from flwr_smartsplit.plan.tail_memory import TailBytes, tail_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.types import EDGE, EdgeProfile, Status
from tests.tasks import (
    BATCH_SIZE,
    SEED,
    TASK,
    client_plan,
    device_part,
    differences,
    initial_state,
    loader,
    tiny_chain,
)

STATE = initial_state()
DIGEST = state_digest(STATE)
SIZE = len(tiny_chain())


def need(start: int = 4, batch_size: int = BATCH_SIZE) -> TailBytes:
    """Say what a session from this unit on takes."""
    return tail_bytes(profile_of(TASK, batch_size=batch_size), start, SIZE)


def service(
    folder: Path, memory_bytes: int | None = None, disk_bytes: int | None = None
) -> EdgeService:
    """Start an edge that holds the state."""
    edge = EdgeService(
        TASK,
        spill_dir=folder,
        incarnation="life",
        profile=EdgeProfile(
            name=EDGE, memory_bytes=memory_bytes, disk_bytes=disk_bytes
        ),
    )
    edge.handle(wire.HoldState(DIGEST, STATE))
    return edge


def opening(session: str, **changes: Any) -> wire.OpenSession:
    """Ask for a session with units 4 to the end."""
    plain = wire.OpenSession(
        session=session,
        place=EDGE,
        round_number=1,
        client_key=session,
        start=4,
        stop=SIZE,
        state_digest=DIGEST,
        seed=SEED,
        num_threads=1,
        token="t",
        batch_size=BATCH_SIZE,
    )
    return replace(plain, **changes)


def train(client: int, edge: Edge, address: str, between: Any = None) -> Outcome:
    """Train a client whose tail is at an edge."""
    plan = client_plan(client, Route.split(4), STATE, addresses={EDGE: address})
    conditions = Conditions(
        task=TASK, connect=lambda _, to: edge.connect(to), between_steps=between
    )
    return train_locally(
        plan, device_part(STATE, plan.route), loader(client), conditions
    )


@pytest.fixture
def whole() -> list[Outcome]:
    """Train two clients at an edge without budgets."""
    with_room = LocalEdge()
    address = with_room.start(TASK)
    with_room.connect(address).send(wire.HoldState(DIGEST, STATE))
    outcomes = [train(client, with_room, address) for client in (0, 1)]
    with_room.stop(address)
    return outcomes


@pytest.fixture
def tight() -> Iterator[tuple[Edge, str]]:
    """Start an edge with memory for one client."""
    edge = LocalEdge(memory_bytes=need().memory_bytes)
    address = edge.start(TASK)
    edge.connect(address).send(wire.HoldState(DIGEST, STATE))
    yield edge, address
    edge.stop(address)


def test_an_opening_beyond_the_memory_is_refused_and_costs_nobody_else(
    tmp_path: Path,
) -> None:
    """It can be repeated when one of the others is sealed, or abandoned."""
    edge = service(tmp_path, memory_bytes=2 * need().memory_bytes)
    first = edge.handle(opening("a"))
    edge.handle(opening("b"))
    with pytest.raises(EdgeFull, match="memory left beside 2 open") as caught:
        edge.handle(opening("c"))
    assert caught.value.needed_bytes == need().memory_bytes
    assert caught.value.free_bytes == 0
    assert caught.value.retry_after_seconds
    assert edge.handle(opening("a")) == first  # A repeated request is not a second one.
    edge.handle(wire.Seal("a", first.incarnation, 0))
    edge.handle(opening("c"))
    edge.handle(wire.Abandon("b"))
    edge.handle(opening("d", is_trained=False))
    with pytest.raises(EdgeFull):
        edge.handle(opening("e"))


def test_an_opening_that_fails_gives_its_room_back(tmp_path: Path) -> None:
    edge = service(tmp_path, memory_bytes=need().memory_bytes)
    for _ in range(2):
        with pytest.raises(Exception, match="no global state"):
            edge.handle(opening("a", state_digest="another"))
    edge.handle(opening("b"))


def test_a_seal_never_goes_over_the_disk(tmp_path: Path) -> None:
    """Room for a tail is taken at its opening; a round's end gives it back."""
    edge = service(tmp_path, disk_bytes=2 * need().disk_bytes)
    for name in ("a", "b"):
        opened = edge.handle(opening(name))
        edge.handle(wire.Seal(name, opened.incarnation, 0))
    with pytest.raises(EdgeFull, match="of disk left beside 0 open and 2") as caught:
        edge.handle(opening("c"))
    assert caught.value.retry_after_seconds is None
    edge.handle(opening("c", is_trained=False))  # It leaves nothing behind.
    again = service(tmp_path, disk_bytes=2 * need().disk_bytes)
    with pytest.raises(EdgeFull):  # What lay there before counts, too.
        again.handle(opening("c"))
    edge.handle(wire.Release(1, DIGEST))
    edge.handle(opening("c"))


def test_a_device_that_does_not_know_its_batch_size_gets_room_with_its_first_batch(
    tmp_path: Path,
) -> None:
    """If there is none, the session is as it was."""
    small, large = need(batch_size=1).memory_bytes, need().memory_bytes
    assert small < large
    edge = LocalEdge(memory_bytes=small + large, room_patience_seconds=0.0)
    address = edge.start(TASK)
    send = edge.connect(address).send
    send(wire.HoldState(DIGEST, STATE))
    send(opening("b", batch_size=None))
    batches: list[Any] = list(loader(0))[:2]
    plan = client_plan(0, Route.split(4), STATE, addresses={EDGE: address})
    conditions = Conditions(task=TASK, connect=lambda _, to: edge.connect(to))
    parts = plan, device_part(STATE, plan.route), batches, conditions
    assert train_locally(*parts).report.status is Status.OK
    send(opening("c", batch_size=BATCH_SIZE - 1))
    report = train_locally(*parts).report
    assert report.status is Status.EDGE_FAILED
    assert "memory left beside 2 open" in report.message
    edge.stop(address)


def test_a_client_tells_the_batch_size_that_its_loader_does_not(
    tmp_path: Path,
) -> None:
    """So room is taken at the opening, where nobody waits with half of it."""
    edge = LocalEdge(memory_bytes=need().memory_bytes)
    address = edge.start(TASK)
    asked: list[Any] = []

    def connect(_: str, to: str) -> Any:
        def noted(request: Any) -> Any:
            asked.append(request)
            return edge.connect(to).send(request)

        return SimpleNamespace(send=noted)

    edge.connect(address).send(wire.HoldState(DIGEST, STATE))
    plan = client_plan(0, Route.split(4), STATE, addresses={EDGE: address})
    conditions = Conditions(task=TASK, connect=connect, batch_size=BATCH_SIZE)
    batches: list[Any] = list(loader(0))[:2]
    state = device_part(STATE, plan.route)
    assert train_locally(plan, state, batches, conditions).report.status is Status.OK
    (opened,) = [each for each in asked if isinstance(each, wire.OpenSession)]
    assert opened.batch_size == BATCH_SIZE
    edge.stop(address)


@pytest.mark.parametrize("ended_by", [wire.Release(1, DIGEST), wire.Abandon("a")])
def test_a_round_that_ends_while_room_is_worked_out_leaves_none_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended_by: Any
) -> None:
    """A late client's step finds its session gone, and nobody pays for it."""
    edge = service(tmp_path, memory_bytes=need().memory_bytes)
    opened = edge.handle(opening("a", batch_size=None))
    fit = edge._admission.fit

    def late(*args: Any) -> None:
        edge.handle(ended_by)
        fit(*args)

    monkeypatch.setattr(edge._admission, "fit", late)
    step = wire.Forward(
        session="a",
        incarnation=opened.incarnation,
        step=0,
        boundary=(WireTensor.pack(torch.zeros(BATCH_SIZE, 1)),),
        num_examples=BATCH_SIZE,
        targets=WireTensor.pack(torch.zeros(BATCH_SIZE, dtype=torch.int64)),
    )
    with pytest.raises(StaleSession):
        edge.handle(step)
    monkeypatch.undo()
    edge.handle(wire.HoldState(DIGEST, STATE))
    edge.handle(opening("b"))


def test_who_finds_no_room_waits_for_it(
    whole: list[Outcome], tight: tuple[Edge, str]
) -> None:
    """Both clients end with the bits they have where there is room for both."""
    outcomes: dict[int, Outcome] = {}
    is_one_there, is_other_asking = threading.Event(), threading.Event()

    def hold(runner: RouteRunner) -> None:
        is_one_there.set()
        assert is_other_asking.wait(30)
        second.join(0.05)

    def run(client: int, between: Any) -> None:
        outcomes[client] = train(client, *tight, between)

    first = threading.Thread(target=run, args=(0, hold))
    second = threading.Thread(target=run, args=(1, None))
    first.start()
    assert is_one_there.wait(30)
    second.start()
    is_other_asking.set()
    for thread in (first, second):
        thread.join(30)
    for client in (0, 1):
        assert outcomes[client].report.status is Status.OK
        assert differences(outcomes[client].state, whole[client].state) == []
        found, wanted = (o[client].receipts[0] for o in (outcomes, whole))
        assert found.digest == wanted.digest


def test_whose_patience_ends_sits_the_round_out(tight: tuple[Edge, str]) -> None:
    """With the numbers in the report; the one inside goes on."""
    edge, address = tight
    opened = edge.connect(address).send(opening("b"))
    hasty = replace(edge, room_patience_seconds=0.0)
    report = train(0, hasty, address).report
    assert report.status is Status.EDGE_FAILED
    assert "has 0 B of its" in report.message
    edge.connect(address).send(wire.Seal("b", opened.incarnation, 0))


def test_a_cut_moves_as_far_as_there_is_room(
    whole: list[Outcome], tight: tuple[Edge, str]
) -> None:
    """Earlier is refused, and the session is as it was; later and back is not."""
    refused: list[RefusedMove] = []

    def between(runner: RouteRunner) -> None:
        if runner.num_steps == 1:
            with pytest.raises(RefusedMove, match="of memory left") as caught:
                runner.move(1)
            refused.append(caught.value)
            runner.move(6)
            runner.move(4)  # The room for the way back is there until the next step.
        if runner.num_steps == 2:
            runner.move(6)

    outcome = train(0, *tight, between)
    assert outcome.report.status is Status.OK, outcome.report.message
    assert len(refused) == 1
    assert [(m.before, m.after) for m in outcome.report.moves] == [
        *((4, 6), (6, 4), (4, 6))
    ]
    shared = {n: a for n, a in outcome.state.items() if n in whole[0].state}
    assert differences(shared, whole[0].state) == []


def test_a_moved_cut_gives_room_back_with_the_next_step(
    tight: tuple[Edge, str],
) -> None:
    """What a later cut leaves is for others; coming back is refused then."""
    edge, address = tight
    found = []

    def between(runner: RouteRunner) -> None:
        other = replace(edge, room_patience_seconds=0.0).connect(address)
        if runner.num_steps == 1:
            runner.move(7)
            with pytest.raises(EdgeFull):
                other.send(opening("b", start=7))
        if runner.num_steps == 2:
            found.append(other.send(opening("b", start=7)))
            with pytest.raises(RefusedMove):
                runner.move(4)

    assert need(7).memory_bytes * 2 <= need(4).memory_bytes
    assert train(0, edge, address, between).report.status is Status.OK
    assert len(found) == 1
