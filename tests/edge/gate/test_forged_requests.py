"""The forged requests of the deployment trial: what each did, and what is said now.

The numbers are those of the trial (specs/deployment.md, section 5), which ran them
against an edge without a gate: 20 of 35 were let in.
"""

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flwr_smartsplit import Route
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.edge import BytesTransport
from flwr_smartsplit.edge.hosts.spill_folders import claim
from flwr_smartsplit.edge.message_bytes import decode
from flwr_smartsplit.edge.tensors import WireTensor, state_digest
from flwr_smartsplit.errors import (
    EdgeError,
    RefusedMessage,
    RefusedRequest,
    RefusedTail,
    StaleSession,
)
from flwr_smartsplit.split.build import materialise
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.unit_migration import MigratedUnits, migrated_units
from flwr_smartsplit.types import EDGE
from tests.edge.gate.federation import (
    ADDRESS,
    CUT,
    DIGEST,
    STATE,
    Federation,
    make_gate,
    planned,
    units_before_the_cut,
)
from tests.edge.gate.forging import altered, answer_to, forged, wire_tensor
from tests.tasks import BATCH_SIZE, NUM_CLASSES, TASK, tiny_chain

STRATEGY_ONLY = (RefusedRequest, "is for the strategy of a run")
NOT_SIGNED = (RefusedRequest, "was not signed by the strategy of run")
NOT_OPEN = (StaleSession, "is not open at this edge")

Ask = Callable[[Federation], Any]
_ran: list[str] = []


@dataclass(frozen=True)
class Forged:
    """One request, what it did before there was a gate, and what is said now."""

    before: str
    ask: Ask
    refused: tuple[type[Exception], str]


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Start an edge with a run and two clients."""
    return Federation.start(tmp_path)


def plain_opening(**changes: Any) -> wire.OpenSession:
    """Make the opening that a client would write for itself."""
    parts: dict[str, Any] = {
        "session": f"1.0/c0/{EDGE}",
        "place": EDGE,
        "round_number": 1,
        "client_key": "c0",
        "start": CUT,
        "stop": len(tiny_chain()),
        "state_digest": DIGEST,
        "seed": 0,
        "num_threads": 1,
    }
    return wire.OpenSession(**{**parts, **changes})


def to_itself(depth: int) -> wire.OpenSession:
    """Nest an opening in an opening, all at one edge."""
    opening = plain_opening()
    for _ in range(depth):
        opening = plain_opening(onward=wire.Onward(ADDRESS, opening))
    return opening


def opened_with(**changes: Any) -> Ask:
    """Open the thief's session with something else than what was signed."""
    return lambda f: f.stranger.send(altered(f.thief.opening, **changes))


def stepped(**changes: Any) -> Ask:
    """Step in the thief's session."""
    return lambda f: f.thief.step(**changes)


def sealed_after(**changes: Any) -> Ask:
    """Step in the thief's session, and seal it."""

    def ask(f: Federation) -> None:
        f.thief.step(**changes)
        f.thief.seal()

    return ask


def labels(*values: Any) -> WireTensor:
    """Pack labels."""
    return WireTensor.pack(torch.tensor(values))


def with_tensor(head: Any, size: int, num_examples: int) -> Ask:
    """Replace a step's boundary by a tensor that says more than it has."""

    def change(tree: Any) -> None:
        tree["Forward"]["boundary"] = {"tuple": [head]}
        tree["Forward"]["targets"] = None
        tree["Forward"]["num_examples"] = num_examples

    return lambda f: answer_to(
        f.gate, forged(f.thief.forward(), change, body=bytes(-size % 16 + size))
    )


def honest_units() -> MigratedUnits:
    """Make what the unit before the cut takes along from an honest device."""
    chain = tiny_chain()
    segment = materialise(chain, 0, CUT, STATE)
    return migrated_units(SegmentRunner(segment, TASK), chain, 1, CUT)


def moved(**changes: Any) -> Ask:
    """Move the unit before the cut to the edge, with something else."""
    return lambda f: f.thief.move(1, replace(honest_units(), **changes))


def moved_nan(f: Federation) -> None:
    """Move values that are no numbers, and seal."""
    units = honest_units()
    state = {n: a * np.nan if a.dtype == "f4" else a for n, a in units.state.items()}
    f.thief.move(1, replace(units, state=state))
    f.thief.seal()


def many_steps(f: Federation) -> None:
    """Step until the weight is more than the client's profile explains."""
    client = f.returning()
    for _ in range(50):
        client.step(targets=None)
        client.edge.send(
            client.backward(
                step=client.num_steps - 1,
                gradients=(WireTensor.pack(torch.zeros(BATCH_SIZE, 6, 2, 2)),),
            )
        )


def ask_all(f: Federation) -> None:
    """Ask all that a strategy may, and begin a run of one's own."""
    answers = []
    for request in (
        wire.DescribeTask(),
        wire.IsHeld(DIGEST),
        wire.HoldState(DIGEST, STATE),
        wire.Commit(1, ()),
        wire.Release(1, ""),
        f.strategy.keys.hello("another address"),
    ):
        with pytest.raises(RefusedRequest) as raised:
            f.stranger.send(request)
        answers.append(raised.value)
    raise answers[0]


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (_ran.append, ("code ran",))


def reply_by_pickle(f: Federation) -> None:
    """Play an edge that answers a device with a pickle."""
    del f
    BytesTransport(lambda _: [pickle.dumps(_Bomb())]).send(wire.DescribeTask())


FORGED: dict[str, Forged] = {
    "1 release everything": Forged(
        "LET IN: global state, everybody's sessions and sealed tails gone",
        lambda f: f.stranger.send(wire.Release(10**9, "")),
        STRATEGY_ONLY,
    ),
    "2 commit one's own tail early": Forged(
        "LET IN: reads the edge's half of the model",
        lambda f: f.stranger.send(
            wire.Commit(1, (wire.Entry(f.thief.name, f.thief.seal().digest, 1),))
        ),
        STRATEGY_ONLY,
    ),
    "3a commit with a weight below 0": Forged(
        "LET IN: sums returned",
        lambda f: f.strategy.ask(wire.Commit(1, (wire.Entry("a", "b", -5),))),
        (RefusedRequest, "a a weight outside 1 to 536870911"),
    ),
    "3b commit with a weight of 2**80": Forged(
        "LET IN: sums returned",
        lambda f: f.strategy.ask(wire.Commit(1, (wire.Entry("a", "b", 2**80),))),
        (RefusedMessage, "more than 64 bits"),
    ),
    "4 commit another's tail, digest guessed": Forged(
        "refused: SpillLost",
        lambda f: f.stranger.send(
            wire.Commit(1, (wire.Entry(f.victim.name, "guess", 1),))
        ),
        STRATEGY_ONLY,
    ),
    "5a open under another's name": Forged(
        "LET IN: the victim's sealed tail deleted",
        lambda f: f.stranger.send(plain_opening()),
        STRATEGY_ONLY,
    ),
    "5b open what was signed, under another's name": Forged(
        "LET IN: as 5a",
        opened_with(session=f"1.0/c0/{EDGE}", client_key="c0"),
        NOT_SIGNED,
    ),
    "6 abandon another's session": Forged(
        "LET IN: the same, with the default incarnation",
        lambda f: f.stranger.send(wire.Abandon(f.victim.name)),
        NOT_OPEN,
    ),
    "7 step in another's session": Forged(
        "refused: StaleSession", stepped(session=f"1.0/c0/{EDGE}"), NOT_OPEN
    ),
    "8a step there with the edge's incarnation": Forged(
        "LET IN where the session had no token, the default",
        stepped(session=f"1.0/c0/{EDGE}", incarnation="life"),
        NOT_OPEN,
    ),
    "8b ask for the incarnation": Forged(
        "LET IN: told to anybody",
        lambda f: f.stranger.send(wire.IsHeld(DIGEST)),
        STRATEGY_ONLY,
    ),
    "10a hold junk": Forged(
        "LET IN: 200 MiB on a disk budget of 1 MiB",
        lambda f: f.stranger.send(wire.HoldState(DIGEST, STATE)),
        STRATEGY_ONLY,
    ),
    "10b hold junk, as the strategy": Forged(
        "LET IN: no limit",
        lambda f: f.strategy.ask(
            wire.HoldState(state_digest(junk()), junk()),
        ),
        (RefusedRequest, "has junk, of which the model has none"),
    ),
    "11a two bytes as 60,000 examples": Forged(
        "LET IN: broadcast to 33 MiB, trained and weighed",
        with_tensor(wire_tensor([60000, 144], [144, 1], 2), 2, 60000),
        (RefusedMessage, "has 34560000 bytes, not uint8 of shape"),
    ),
    "11b eight bytes with strides over 4 GiB": Forged(
        "LET IN: a storage of 4 GiB",
        with_tensor(wire_tensor([2], [2**30], 8), 8, 2),
        (RefusedMessage, "over more than 16384 times their memory"),
    ),
    "12 one byte as 2 GiB": Forged(
        "LET IN: 2 GiB resident",
        with_tensor(wire_tensor([2**29], [0], 1), 1, 2**29),
        (RefusedMessage, "has 2147483648 bytes"),
    ),
    "12b honest bytes with gaps beyond the plan": Forged(
        "not tried; let in until now",
        stepped(boundary=(WireTensor.pack(torch.zeros(4, 2**22)[:, :256]),)),
        (RefusedRequest, "and the plan allows"),
    ),
    "15 a part of 2**22 examples": Forged(
        "LET IN: 2.2 GiB reserved for 2.3 KB",
        lambda f: f.returning().step(targets=None, num_examples=2**22),
        (RefusedRequest, "4194304 examples in one step, and the plan allows 1 to 64"),
    ),
    "16 100,000 threads": Forged(
        "LET IN: the edge's process dies", opened_with(num_threads=10**5), NOT_SIGNED
    ),
    "17a other units": Forged("LET IN", opened_with(start=CUT + 1), NOT_SIGNED),
    "17b the whole model": Forged(
        "LET IN: the edge trains all of it", opened_with(start=0), NOT_SIGNED
    ),
    "18 openings of round 10**9": Forged(
        "LET IN: 2,000 of them, which survive Release",
        opened_with(round_number=10**9),
        NOT_SIGNED,
    ),
    "20a another batch size": Forged(
        "LET IN: 1.3 s of CPU each, and kept for ever",
        opened_with(batch_size=7),
        NOT_SIGNED,
    ),
    "20b a batch size of 2**40": Forged(
        "LET IN: it opens", opened_with(batch_size=2**40), NOT_SIGNED
    ),
    "21 a move that sets attributes": Forged(
        "LET IN: setattr of any name on any module",
        moved(buffers={"1.training": True}),
        (RefusedRequest, "1.training, 1.training are no tensors of the units"),
    ),
    "22a a move with NaN": Forged(
        "refused at the seal", moved_nan, (RefusedTail, "not finite")
    ),
    "22b a move of a wrong shape": Forged(
        "refused",
        moved(state={**units_before_the_cut().state, "1.bias": np.zeros(5, "f4")}),
        (RefusedRequest, "1.bias of another shape or dtype"),
    ),
    "22c a move in float64": Forged(
        "LET IN: sealed",
        moved(
            state={n: a.astype("f8") for n, a in units_before_the_cut().state.items()}
        ),
        (RefusedRequest, "of another shape or dtype than the model"),
    ),
    "23a a boundary of NaN": Forged(
        "refused at the seal",
        sealed_after(
            boundary=(WireTensor.pack(torch.full((BATCH_SIZE, 4, 6, 6), torch.nan)),)
        ),
        (RefusedTail, "not finite"),
    ),
    "23b label 999": Forged(
        "void; IndexError reached the client raw",
        stepped(targets=labels(999, 0, 0, 0)),
        (EdgeError, "the edge failed at a Forward .IndexError: Target 999"),
    ),
    "23c label -5": Forged(
        "void; IndexError reached the client raw",
        stepped(targets=labels(-5, 0, 0, 0)),
        (EdgeError, "the edge failed at a Forward .IndexError: Target -5"),
    ),
    "23d labels that are floats": Forged(
        "void; RuntimeError reached the client raw",
        stepped(targets=labels(0.0, 1.0, 1.0, 0.0)),
        (EdgeError, "the edge failed at a Forward .RuntimeError"),
    ),
    "23e no examples": Forged(
        "LET IN: an empty batch is sealed",
        stepped(
            boundary=(WireTensor.pack(torch.zeros(0, 4, 6, 6)),),
            targets=WireTensor.pack(torch.zeros(0, dtype=torch.int64)),
            num_examples=0,
        ),
        (RefusedRequest, "0 examples in one step, and the plan allows 1 to 64"),
    ),
    "24a a name with ../": Forged(
        "no escape", opened_with(session="../../etc/x"), NOT_SIGNED
    ),
    "24b a name with NUL": Forged("no escape", opened_with(session="a\0b"), NOT_SIGNED),
    "24c a name of 300 characters": Forged(
        "EdgeError: 'disk failed'", opened_with(session="a" * 300), NOT_SIGNED
    ),
    "25a a route to itself": Forged(
        "RecursionError; the address is the client's choice",
        opened_with(onward=wire.Onward("http://10.0.0.1", plain_opening())),
        NOT_SIGNED,
    ),
    "25b the same, 300 deep": Forged(
        "RecursionError",
        lambda f: f.stranger.send(to_itself(300)),
        (EdgeError, "nested too deep|is for the strategy"),
    ),
    "26 evaluations in a training session": Forged(
        "LET IN: the model as an oracle, uncounted",
        stepped(targets=None),
        (RefusedRequest, "has the loss at the edge; send the labels"),
    ),
    "27a a batch of 4 as 2**29 - 1 examples": Forged(
        "LET IN: one client can own the mean",
        lambda f: f.returning().step(targets=None, num_examples=2**29 - 1),
        (RefusedRequest, "536870911 examples in one step"),
    ),
    "27b small steps without end": Forged(
        "LET IN: the same in small steps",
        many_steps,
        (RefusedRequest, "28 examples so far, and the plan allows 24"),
    ),
    "30 a learning rate of the client's": Forged(
        "LET IN: the schedule at the edge is the client's",
        opened_with(config={"lr": 1e9}),
        NOT_SIGNED,
    ),
    "32a a pickle as a request": Forged(
        "LET IN: code ran at the edge",
        lambda f: answer_to(f.gate, pickle.dumps(_Bomb())),
        (RefusedMessage, "a message begins with"),
    ),
    "32b an object as a part of a request": Forged(
        "LET IN: code ran at the edge",
        lambda f: answer_to(f.gate, np.array([_Bomb()], object)),
        (RefusedMessage, "a message is bytes, and not a ndarray"),
    ),
    "32c a pickle as a reply": Forged(
        "LET IN: code ran at the device",
        reply_by_pickle,
        (RefusedMessage, "a message begins with"),
    ),
    "R a stranger who knows the address": Forged(
        "LET IN: listed the edges, ran code", ask_all, STRATEGY_ONLY
    ),
}


def junk() -> dict[str, Any]:
    """Make a state that is of no model."""
    return {"junk": np.zeros(10, np.float32)}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_request_is_refused(federation: Federation, kind: str) -> None:
    """And harms nobody: the victim trains on, seals and is merged."""
    error, text = FORGED[kind].refused
    with pytest.raises(error, match=text) as raised:
        FORGED[kind].ask(federation)
    assert federation.strategy.access.partition(":")[2] not in str(raised.value)
    assert _ran == []
    federation.check_unharmed()


def test_18_many_openings_leave_nothing(federation: Federation) -> None:
    """LET IN before: +61 MiB for 2,000 of a tiny model."""
    (held,) = federation.gate._runs.values()
    before = len(held.service.sessions._open), len(held.answers)
    for number in range(200):
        forgery = altered(federation.thief.opening, session=f"s{number}")
        with pytest.raises(RefusedRequest):
            federation.stranger.send(forgery)
        federation.stranger.send(federation.thief.opening)  # Its own, again and again.
    assert (len(held.service.sessions._open), len(held.answers)) == before
    assert len(held.locks) == len(held.answers)


def test_19_they_leave_room_for_the_honest(tmp_path: Path) -> None:
    """With a budget: before, honest clients got EdgeFull until the round's end."""
    gate = make_gate(tmp_path, memory_bytes=3 * 2**14)
    federation = Federation.start(tmp_path, gate)
    for number in range(20):
        with pytest.raises(RefusedRequest):
            federation.stranger.send(plain_opening(session=f"s{number}"))
        federation.stranger.send(federation.thief.opening)
    federation.evaluating(2)
    federation.check_unharmed()


def test_31_the_spill_folder_is_its_owners(tmp_path: Path) -> None:
    """755 before: the names of clients could be listed."""
    with claim(tmp_path / "edge"):
        assert (tmp_path / "edge").stat().st_mode & 0o777 == 0o700
    federation = Federation.start(tmp_path)
    folder = tmp_path / federation.strategy.keys.run
    assert folder.stat().st_mode & 0o777 == 0o700
    federation.check_unharmed()
    assert re.fullmatch("[0-9a-f]{32}", folder.name)


def test_the_clients_of_this_file_are_let_in_where_they_are_honest(
    federation: Federation,
) -> None:
    """The planted error, turned round: without a forgery, nothing is refused."""
    client = federation.returning()
    stepped = client.step(targets=None)
    assert stepped.boundary
    _, limits = planned(2, Route.u_shape(CUT, 6, edge=EDGE))
    assert decode(client.opening.opening).limits == replace(limits, phase=1)
    federation.thief.move(1, honest_units())
    federation.thief.step(boundary=(WireTensor.pack(torch.zeros(4, 4, 6, 6)),))
    federation.thief.seal()
    evaluated = federation.evaluating().step()
    assert evaluated.values.keys() >= {"loss"}
    assert NUM_CLASSES > 1
    federation.check_unharmed()
