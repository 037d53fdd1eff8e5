"""LocalEdge: an edge in this process, with an address and an end."""

import pickle

import pytest

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import EdgeUnreachable
from tests.tasks import TASK, initial_state

DIGEST = state_digest(initial_state())


def test_each_start_is_an_edge_of_its_own() -> None:
    """Two runs do not see each other's states."""
    edge = LocalEdge(name="x")
    one, two = edge.start(TASK), edge.start(TASK)
    assert one != two
    edge.connect(one).send(wire.HoldState(DIGEST, initial_state()))
    assert edge.connect(one).send(wire.IsHeld(DIGEST)).is_held
    answer = edge.connect(two).send(wire.IsHeld(DIGEST))
    assert not answer.is_held
    assert answer.incarnation != edge.connect(one).send(wire.IsHeld(DIGEST)).incarnation
    edge.stop(one)
    edge.stop(two)


def test_a_stopped_edge_is_unreachable() -> None:
    """And so is one that never was; stopping either is no error."""
    edge = LocalEdge()
    address = edge.start(TASK)
    edge.stop(address)
    edge.stop(address)
    edge.stop("nowhere")
    for gone in (address, "nowhere"):
        with pytest.raises(EdgeUnreachable, match=gone):
            edge.connect(gone)


def test_an_edge_is_a_value_that_pickles() -> None:
    """Clients are given copies of it, and reach the same edge by its address."""
    edge = LocalEdge(name="x")
    copy = pickle.loads(pickle.dumps(edge))
    assert copy == edge
    address = edge.start(TASK)
    edge.connect(address).send(wire.HoldState(DIGEST, initial_state()))
    assert copy.connect(address).send(wire.IsHeld(DIGEST)).is_held
    copy.stop(address)
