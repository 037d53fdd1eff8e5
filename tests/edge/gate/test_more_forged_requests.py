"""More forged requests, of the kinds that the trial's 35 suggest."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import opening_in
from flwr_smartsplit.edge.gate.run_keys import RunKeys
from flwr_smartsplit.edge.message_bytes import encode
from flwr_smartsplit.edge.tensors import WireTensor, state_digest
from flwr_smartsplit.errors import RefusedMessage, RefusedRequest, StaleSession
from flwr_smartsplit.types import MicroBatch
from tests.edge.gate.federation import (
    ADDRESS,
    DIGEST,
    SPLIT,
    STATE,
    Client,
    Federation,
    Strategy,
    make_gate,
    planned,
    units_before_the_cut,
)
from tests.edge.gate.forging import altered, answer_to, forged, framed
from tests.edge.gate.test_forged_requests import (
    NOT_OPEN,
    NOT_SIGNED,
    STRATEGY_ONLY,
    honest_units,
    moved,
    stepped,
)
from tests.tasks import BATCH_SIZE

Ask = Callable[[Federation], Any]
TOO_LARGE = (RefusedRequest, "the tensors of one message take .* and the plan allows")
NOT_HERE = (RefusedRequest, "runs of 1 have begun at this edge")
NO_PART = (RefusedRequest, "and the plan has at most 1 of them")


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Start an edge with a run and two clients."""
    return Federation.start(tmp_path)


def as_strategy(request: Any, access: str) -> Ask:
    """Ask for something with a made up secret; ``RUN`` stands for the run's name."""

    def ask(f: Federation) -> Any:
        run = f.strategy.keys.run
        secrets = {"RUN": run, "SESSION": f.victim.incarnation}
        for word, secret in secrets.items():
            if access.startswith(word):
                return f.stranger.send(
                    replace(request, access=secret + access.removeprefix(word))
                )
        return f.stranger.send(replace(request, access=access))

    return ask


def hello(**changes: Any) -> Ask:
    """Begin a run; ``changes`` forge the request."""
    return lambda f: f.stranger.send(replace(RunKeys().hello(ADDRESS), **changes))


def impostor(f: Federation) -> None:
    """Begin the present run anew, with another key."""
    f.stranger.send(replace(RunKeys().hello(ADDRESS), run=f.strategy.keys.run))


def signed_by_another(f: Federation) -> None:
    """Sign the thief's opening with a key of one's own."""
    own = RunKeys()
    _, limits = planned(1, SPLIT)
    opening = own.sign(opening_in(f.thief.opening), limits)
    f.stranger.send(replace(opening, run=f.strategy.keys.run))


def with_opening(**changes: Any) -> Ask:
    """Send the thief's opening with another field."""
    return lambda f: f.stranger.send(replace(f.thief.opening, **changes))


def signed_for(**changes: Any) -> Ask:
    """Have the strategy sign for another place, round or kind."""
    return lambda f: f.stranger.send(
        f.strategy.signed(1, change=lambda opening: replace(opening, **changes))
    )


def after_release(*, phase: int, is_train: bool) -> Ask:
    """Open after the strategy has ended its third phase."""

    def ask(f: Federation) -> Any:
        gate = make_gate(f.folder / "another")
        strategy = Strategy(gate)
        strategy.hold()
        strategy.ask(wire.Release(3, DIGEST, phase=3))
        opening = strategy.signed(phase=phase, is_train=is_train)
        return answer_to(gate, b"".join(encode(opening)))

    return ask


def after_end(end: Callable[[Client], Any], then: Callable[[Client], Any]) -> Ask:
    """End the thief's session, open it again, and use it."""

    def ask(f: Federation) -> Any:
        end(f.thief)
        before = f.thief.incarnation
        assert f.thief.open().incarnation == before  # The same answer.
        return then(f.thief)

    return ask


def abandoned(client: Client) -> None:
    """Abandon one's own session."""
    client.edge.send(wire.Abandon(client.name, client.incarnation))


def large_optimizer(f: Federation) -> None:
    """Move with an optimizer's state that is no one's."""
    spread = WireTensor.pack(torch.zeros(4, 2**20)[:, :64])
    units = honest_units()
    optimizer = {"1.weight": {"momentum_buffer": spread}}
    f.thief.move(1, replace(units, optimizer=optimizer))


def returning(send: Callable[[Client], Any]) -> Ask:
    """Ask in a session whose route comes back to the device."""
    return lambda f: send(f.returning())


def half_step(client: Client, gradient: torch.Tensor) -> None:
    """Step forward, and go backward from a gradient."""
    client.step(targets=None)
    packed = WireTensor.pack(gradient)
    client.edge.send(client.backward(step=0, gradients=(packed,)))


def third_state(f: Federation) -> None:
    """Hold more states than a round needs."""
    for number in range(1000):
        state = {name: array + number for name, array in STATE.items()}
        f.strategy.ask(wire.HoldState(state_digest(state), state))


def other_kind(f: Federation) -> None:
    """Hold a state in another dtype than the model's."""
    state = {n: a.astype("f8") for n, a in STATE.items()}
    f.strategy.ask(wire.HoldState(state_digest(state), state))


def committed_twice(f: Federation) -> None:
    """Merge one session twice."""
    entry = wire.Entry(f.victim.name, "d", 1)
    f.strategy.ask(wire.Commit(1, (entry, entry)))


def unknown_request(f: Federation) -> None:
    """Send a reply where a request should be."""
    answer_to(f.gate, b"".join(encode(wire.Opened("x"))))


def signed_by_nobody(f: Federation) -> None:
    """Ask a run that has not begun."""
    f.stranger.send(replace(f.thief.opening, run="0" * 32))


MORE: dict[str, tuple[Ask, tuple[type[Exception], str]]] = {
    # Whoever is not the strategy.
    "a second run": (hello(), NOT_HERE),
    "the present run, with another key": (impostor, NOT_HERE),
    "a run named after a folder": (
        hello(run="../../../../../../tmp/aaaaaaaaaaa"),
        (RefusedRequest, "a name has 32 digits"),
    ),
    "a run with a short key": (
        hello(public_key=b"k"),
        (RefusedRequest, r"a digest of \(1, 32\) bytes"),
    ),
    "a secret that is empty": (as_strategy(wire.Release(9, ""), ""), STRATEGY_ONLY),
    "a secret that is the run": (
        as_strategy(wire.Release(9, ""), "RUN:"),
        STRATEGY_ONLY,
    ),
    "a secret of a session": (
        as_strategy(wire.Commit(1, ()), "SESSION"),
        STRATEGY_ONLY,
    ),
    "a secret that is no Unicode": (
        as_strategy(wire.DescribeTask(), "RUN:\ud800"),
        STRATEGY_ONLY,
    ),
    "the strategy's secret of another edge": (
        lambda f: f.stranger.send(
            replace(wire.Release(9, ""), access=f.strategy.keys.access("edge-2"))
        ),
        STRATEGY_ONLY,
    ),
    "a reply as a request": (unknown_request, STRATEGY_ONLY),
    # Openings.
    "an opening signed by oneself": (signed_by_another, NOT_SIGNED),
    "an opening without a signature": (with_opening(signature=b""), NOT_SIGNED),
    "a signature of zeros": (with_opening(signature=bytes(64)), NOT_SIGNED),
    "another's signature": (
        lambda f: f.stranger.send(
            replace(f.thief.opening, signature=f.victim.opening.signature)
        ),
        NOT_SIGNED,
    ),
    "an opening of nothing": (with_opening(opening=b""), NOT_SIGNED),
    "an opening of no run": (
        signed_by_nobody,
        (StaleSession, "has not begun at this edge, or is over"),
    ),
    "limits that are gone": (
        lambda f: f.stranger.send(altered(f.thief.opening, limits=None)),
        NOT_SIGNED,
    ),
    "an opening for another edge": (
        signed_for(place="elsewhere"),
        (RefusedRequest, "is for edge 'elsewhere', and this is 'edge'"),
    ),
    "training in a phase that is over": (
        after_release(phase=3, is_train=True),
        (RefusedRequest, "round 1 is over, and its openings with it"),
    ),
    "evaluation of a phase before": (
        after_release(phase=2, is_train=False),
        (RefusedRequest, "round 1 is over"),
    ),
    "a step after the seal": (after_end(Client.seal, Client.step), NOT_OPEN),
    "a step after the end": (after_end(abandoned, Client.step), NOT_OPEN),
    # Sessions.
    "a seal of another's session": (
        lambda f: f.thief.seal(session=f.victim.name),
        NOT_OPEN,
    ),
    "an end of another's session": (
        lambda f: f.stranger.send(wire.Abandon(f.victim.name, f.thief.incarnation)),
        NOT_OPEN,
    ),
    "a move of another's session": (
        lambda f: f.thief.move(3, session=f.victim.name),
        NOT_OPEN,
    ),
    "a secret with another run": (
        lambda f: f.thief.step(
            incarnation="0" * 32 + ":" + f.thief.incarnation.partition(":")[2]
        ),
        NOT_OPEN,
    ),
    # Steps.
    "a number of examples below 0": (
        stepped(targets=None, num_examples=-(2**62)),
        (RefusedRequest, "has the loss at the edge"),
    ),
    "as many in a route that returns": (
        returning(lambda c: c.step(targets=None, num_examples=-5)),
        (RefusedRequest, "-5 examples in one step"),
    ),
    "labels in a route that returns": (
        returning(lambda c: c.step()),
        (RefusedRequest, "has the loss elsewhere"),
    ),
    "a step backward where the edge has the loss": (
        lambda f: f.stranger.send(f.thief.backward()),
        (RefusedRequest, "a Backward, where the labels come"),
    ),
    "a step backward in evaluation": (
        lambda f: f.stranger.send(f.evaluating().backward()),
        (RefusedRequest, "a Backward, where the labels come"),
    ),
    "an evaluation without labels": (
        lambda f: f.evaluating().step(targets=None),
        (RefusedRequest, "send the labels"),
    ),
    "a million micro-batches": (stepped(part=MicroBatch(0, 10**6, 2.0)), NO_PART),
    "a micro-batch after the last": (stepped(part=MicroBatch(1, 1, 1.0)), NO_PART),
    "a micro-batch before the first": (stepped(part=MicroBatch(-1, 1, 1.0)), NO_PART),
    "a loss over nothing": (stepped(part=MicroBatch(0, 1, 0.0)), NO_PART),
    "a loss over no number": (stepped(part=MicroBatch(0, 1, np.nan)), NO_PART),
    "a loss over infinity": (stepped(part=MicroBatch(0, 1, np.inf)), NO_PART),
    "a boundary of 4 MiB": (
        stepped(boundary=(WireTensor.pack(torch.zeros(BATCH_SIZE, 2**18)),)),
        TOO_LARGE,
    ),
    "many boundaries": (
        stepped(boundary=(WireTensor.pack(torch.zeros(BATCH_SIZE, 2**14)),) * 20),
        TOO_LARGE,
    ),
    "labels of 4 MiB": (
        stepped(targets=WireTensor.pack(torch.zeros(BATCH_SIZE, 2**18))),
        TOO_LARGE,
    ),
    "a gradient of 4 MiB": (
        returning(lambda c: half_step(c, torch.zeros(BATCH_SIZE, 2**18))),
        TOO_LARGE,
    ),
    "a text for a number": (
        lambda f: answer_to(
            f.gate,
            forged(f.thief.forward(), lambda t: t["Forward"].update(num_examples="4")),
        ),
        (RefusedMessage, "Forward.num_examples is a str"),
    ),
    "a request inside a request": (
        lambda f: answer_to(
            f.gate, framed({"Abandon": {"session": {"Release": {}}, "incarnation": ""}})
        ),
        (RefusedMessage, "Release has fields"),
    ),
    # Moves.
    "a move in evaluation": (
        lambda f: f.evaluating().move(1, honest_units(), step=0),
        (RefusedRequest, "cannot begin at 1"),
    ),
    "a move of units that are not before the cut": (
        moved(stop=3),
        (RefusedRequest, "or are not those before the session's"),
    ),
    "a move with other names": (
        moved(state={**units_before_the_cut().state, "8.weight": STATE["8.weight"]}),
        (RefusedRequest, "8.weight of another shape"),
    ),
    "a move with an optimizer of other names": (
        moved(optimizer={"8.weight": {}}),
        (RefusedRequest, "8.weight are no tensors of the units"),
    ),
    "a move with settings of other names": (
        moved(settings={"8.weight": ""}),
        (RefusedRequest, "8.weight are no tensors of the units"),
    ),
    "a move with a large optimizer": (large_optimizer, TOO_LARGE),
    # The strategy's own mistakes, or those of whoever has taken it over.
    "states without end": (third_state, (RefusedRequest, "would be over 2 models")),
    "a state of another dtype": (other_kind, (RefusedRequest, "or another shape")),
    "a session merged twice": (committed_twice, (RefusedRequest, "names one twice")),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", MORE)
def test_another_forged_request_is_refused(federation: Federation, kind: str) -> None:
    """And harms nobody: the victim trains on, seals and is merged."""
    ask, (error, text) = MORE[kind]
    with pytest.raises(error, match=text) as raised:
        ask(federation)
    assert federation.strategy.access.partition(":")[2] not in str(raised.value)
    federation.check_unharmed()


def test_the_constraints_of_a_plan_hold_for_moves(federation: Federation) -> None:
    """A client may not move to the edge what must stay with it."""
    plan, limits = planned(3, SPLIT)
    opening = opening_in(federation.strategy.signed(3))
    signed = federation.strategy.keys.sign(
        opening, replace(limits, least_start=2, phase=1)
    )
    client = Client(federation.stranger, signed, opening.session).open()
    with pytest.raises(RefusedRequest, match="keeps the units below 2 on the device"):
        client.move(1, honest_units(), step=0)
    assert plan.client_key == opening.client_key
    federation.check_unharmed()
