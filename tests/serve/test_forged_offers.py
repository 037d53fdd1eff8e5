"""What somebody can do at an edge with an offer: predict, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flwr_smartsplit import Route
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import signed_opening
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.message_bytes import decode
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import EdgeError, RefusedRequest, StaleSession
from tests.edge.gate.federation import make_gate, transport_to
from tests.edge.gate.forging import altered
from tests.serve.test_shared_copies import gate_of
from tests.serve.whole import STATE, batch, difference, predictor, served, whole
from tests.tasks import BATCH_SIZE, NUM_CLASSES

ROUTE = Route.split(2)


class Forger:
    """Somebody with an offer, who sends what they like to its edge."""

    def __init__(self, serving: Any, offer: Any) -> None:
        found = signed_opening(offer.plan)
        assert found is not None
        self.signed = found
        self.opening: wire.OpenSession = decode(found.opening)
        self.edge = transport_to(gate_of(serving))
        self.incarnation = self.edge.send(found).incarnation

    def forward(self, size: int = BATCH_SIZE, **changes: Any) -> wire.Forward:
        """Make the request of a batch."""
        boundary = torch.randn(size, 4, 6, 6)
        parts: dict[str, Any] = {
            "session": self.opening.session,
            "incarnation": self.incarnation,
            "step": 0,
            "boundary": (WireTensor.pack(boundary),),
            "num_examples": size,
        }
        return wire.Forward(**{**parts, **changes})


Forge = Callable[[Forger], Any]
LABELS = WireTensor.pack(torch.zeros(BATCH_SIZE, dtype=torch.int64) % NUM_CLASSES)
FORGED: dict[str, Forge] = {
    "a bare opening": lambda f: f.opening,
    "other units": lambda f: altered(f.signed, start=1),
    "to train": lambda f: altered(f.signed, is_trained=True),
    "a copy of one's own": lambda f: altered(f.signed, predicts=False),
    "the state": lambda f: wire.IsHeld(f.opening.state_digest),
    "another state": lambda f: wire.HoldState("0" * 64, STATE),
    "a merge": lambda f: wire.Commit(1, ()),
    "the end of it all": lambda f: wire.EndRun(),
    "labels, for a loss": lambda f: f.forward(targets=LABELS),
    "a batch that is too large": lambda f: f.forward(BATCH_SIZE + 1),
    "a claim of fewer": lambda f: f.forward(BATCH_SIZE * 10**4, num_examples=1),
    "a step back": lambda f: wire.Backward(
        session=f.opening.session, incarnation=f.incarnation, step=0, gradients=()
    ),
    "a move": lambda f: MoveCut(
        session=f.opening.session,
        incarnation=f.incarnation,
        step=0,
        number=0,
        start=1,
        units=None,
        norm=None,
    ),
    "a tail on the edge's disk": lambda f: wire.Seal(
        f.opening.session, f.incarnation, 0
    ),
    "somebody else's secret": lambda f: f.forward(incarnation="a" * 32 + ":0"),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_what_was_not_signed_is_refused(forge: Forge) -> None:
    """And harms nobody: another device's next answer is right."""
    edge = LocalEdge()
    with served(edge, route=ROUTE) as (serving, offer):
        forger = Forger(serving, serving.offer(ROUTE, batch_size=BATCH_SIZE))
        with predictor(offer, edge) as device:
            assert difference(device.predict(batch()), whole(batch())) == ""
            with pytest.raises((RefusedRequest, StaleSession)):
                forger.edge.send(forge(forger))
            assert difference(device.predict(batch()), whole(batch())) == ""


def test_the_honest_requests_are_answered() -> None:
    """Planted: so the ones above are refused for what is forged in them."""
    with served(LocalEdge(), route=ROUTE) as (serving, offer):
        forger = Forger(serving, offer)
        assert forger.edge.send(forger.forward()).outputs is not None
        assert forger.edge.send(forger.signed).incarnation == forger.incarnation


def test_an_offer_ends_with_its_serving(tmp_path: Path) -> None:
    """And is good at no other edge."""
    with served(LocalEdge(), route=ROUTE) as (serving, offer):
        forger = Forger(serving, offer)
    with pytest.raises(EdgeError):
        forger.edge.send(forger.signed)
    with pytest.raises(EdgeError):
        transport_to(make_gate(tmp_path)).send(forger.signed)


def test_an_offer_can_be_used_again() -> None:
    """By the next predictor of the same device, when the last one was closed."""
    edge = LocalEdge()
    with served(edge, route=ROUTE) as (_, offer):
        for seed in range(2):
            with predictor(offer, edge) as device:
                found = device.predict(batch(seed))
                assert difference(found, whole(batch(seed))) == ""
