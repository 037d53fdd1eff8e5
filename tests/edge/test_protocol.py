"""Transports: what is counted, and what is left out of the device's meter."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.edge.weighted_mean import WeightedSum
from flwr_smartsplit.memory.cap import memory_cap

FOUR = np.zeros(4, np.float32)
PACKED = WireTensor.pack(torch.zeros(2, 3))


def step() -> wire.Forward:
    """Make a step with 24 bytes of boundary and 8 of targets."""
    return wire.Forward(
        session="a long name that counts for nothing",
        incarnation="i",
        step=0,
        boundary=(PACKED,),
        num_examples=1,
        targets=WireTensor.pack(torch.zeros(1, dtype=torch.int64)),
    )


@pytest.mark.parametrize(
    ("message", "num_bytes"),
    [
        (None, 0),
        ("text", 0),
        (FOUR, 16),
        ({"a": FOUR, "b": FOUR}, 32),
        (PACKED, 24),
        (step(), 32),
        (wire.Stepped(gradients=(PACKED,), values={"loss": 0.5}), 24),
        (wire.HoldState("digest", {"a": FOUR}), 16),
        (wire.Stepped(values={"loss": 0.5, "accuracy": 0.5}), 0),
        (wire.Backward(step=0, gradients=(PACKED, PACKED)), 48),
        (wire.Committed({"a": WeightedSum.of(FOUR, 2)}), 64),
        (wire.Committed({}, {"a": FOUR}), 16),
        (wire.Commit(1, (wire.Entry("s", "d", 1),)), 0),
    ],
)
def test_payload_is_the_bytes_of_the_arrays(message: Any, num_bytes: int) -> None:
    """However deep they lie in a message; names and numbers are headers."""
    assert wire.payload_bytes(message) == num_bytes


def test_a_counting_transport_adds_up_both_ways() -> None:
    """And hands on what came, unchanged."""
    reply = wire.Stepped(gradients=(PACKED,), values={"loss": 0.5})
    counting = wire.CountingTransport(wire.LocalTransport(lambda request: reply))
    assert counting.send(step()) is reply
    counting.send(step())
    assert (counting.sent_bytes, counting.received_bytes) == (64, 48)


def test_a_request_that_fails_was_sent_all_the_same() -> None:
    """The error comes through, and only the way there is counted."""

    def fail(request: Any) -> Any:
        raise ConnectionError("gone")

    counting = wire.CountingTransport(wire.LocalTransport(fail))
    with pytest.raises(ConnectionError, match="gone"):
        counting.send(step())
    assert (counting.sent_bytes, counting.received_bytes) == (32, 0)


def test_an_edge_in_the_same_thread_does_not_count_for_the_device() -> None:
    """The device's cap holds for the device only."""

    def greedy(request: Any) -> wire.Held:
        torch.zeros(1_000_000)
        return wire.Held("i", True)

    with memory_cap(10_000) as meter:
        torch.zeros(100)
        wire.LocalTransport(greedy).send(wire.IsHeld("d"))
        torch.zeros(100)
    assert meter.peak_bytes == 400


REQUESTS = [
    kind
    for kind in vars(wire).values()
    if isinstance(kind, type) and issubclass(kind, wire.Request)
]


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.__name__)
def test_requests_are_frozen_values(kind: type) -> None:
    """A request that is repeated is the same request."""
    if kind is not wire.Request:
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen
    assert not hasattr(object.__new__(kind), "__dict__")
