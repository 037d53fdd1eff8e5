"""How a device and a strategy talk to an edge: one verb, frozen messages.

Every request names its reply type. Whatever is added on the way (counting,
retrying, losing messages in a test) is a transport that wraps another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.model.memory import unmetered
from flwr_smartsplit.policy.merging import WeightedSum
from flwr_smartsplit.runtime.wire import WireTensor
from flwr_smartsplit.types import Receipt

ReplyT = TypeVar("ReplyT")
State = Mapping[str, npt.NDArray[Any]]


class Request(Generic[ReplyT]):
    """What an edge can be asked; the parameter is what it answers."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Held:
    """Whether an edge holds a state, and which life of the edge says so."""

    incarnation: str
    is_held: bool


@dataclass(frozen=True, slots=True)
class IsHeld(Request[Held]):
    """Ask whether a global state is already there."""

    digest: str


@dataclass(frozen=True, slots=True)
class HoldState(Request[Held]):
    """Give the edge a round's global state, under its digest."""

    digest: str
    state: State


@dataclass(frozen=True, slots=True)
class Opened:
    """A session is open; what belongs to this opening carries its incarnation."""

    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSession(Request[Opened]):
    """Build one client's segment at the edge.

    Parameters
    ----------
    session, place : str
        The session's name, and the edge's name in the route.
    round_number : int
        The round it belongs to.
    client_key : str
        Whose segment it is.
    start, stop : int
        The units to host.
    state_digest : str
        The held state to start from.
    seed, num_threads : int
        As in the client's plan.
    token : str
        Tells a repeated request from a second opening, which starts over.
    """

    session: str
    place: str
    round_number: int
    client_key: str
    start: int
    stop: int
    state_digest: str
    seed: int
    num_threads: int
    token: str = ""


@dataclass(frozen=True, slots=True)
class Stepped:
    """Loss of a batch, and the gradient of the boundary."""

    loss: float
    gradient: WireTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep(Request[Stepped]):
    """Do the edge's part of one training step, exactly once.

    Parameters
    ----------
    session, incarnation : str
        The session, and the life of the edge that opened it.
    step : int
        Number of the step, from 0; repeating the last one repeats its reply.
    boundary, targets : WireTensor
        What the device computed, and what the batch should give.
    context : tuple[WireTensor, ...]
        What goes along with the boundary and needs no gradient.
    """

    session: str
    incarnation: str
    step: int
    boundary: WireTensor
    targets: WireTensor
    context: tuple[WireTensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Mean loss and metrics of a batch."""

    loss: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateStep(Request[Evaluated]):
    """Do the edge's part of evaluating one batch; nothing is remembered."""

    session: str
    incarnation: str
    boundary: WireTensor
    targets: WireTensor
    context: tuple[WireTensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Seal(Request[Receipt]):
    """Finish a session: check its tail, put it aside, free its memory."""

    session: str
    incarnation: str
    num_steps: int


@dataclass(frozen=True, slots=True)
class Abandon(Request[None]):
    """Forget a session and its tail, sealed or not.

    Parameters
    ----------
    session : str
        The session.
    incarnation : str
        As the opening answered, so that a later opening is left alone; empty for any.
    """

    session: str
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One sealed session to merge, and what it weighs."""

    session: str
    digest: str
    weight: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The weighted sums of exactly the sessions asked for."""

    sums: Mapping[str, WeightedSum]


@dataclass(frozen=True, slots=True)
class Commit(Request[Committed]):
    """Merge exactly these sealed sessions, in this order; repeating it is safe."""

    round_number: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Release(Request[None]):
    """Delete what belongs to this round and earlier ones, except one state."""

    round_number: int
    keep_digest: str


class Transport(Protocol):
    """A way to an edge."""

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Deliver the request and return its reply, or raise an ``EdgeError``."""


class Edge(Protocol):
    """How a client and a strategy reach an edge; a small value that pickles."""

    @property
    def name(self) -> str:
        """The place's name in routes."""

    def start(self, task: Any) -> str:
        """Start the edge for a run (strategy's side); return its address."""

    def connect(self, address: str) -> Transport:
        """Reach the edge at an address."""

    def stop(self, address: str) -> None:
        """End the edge at an address."""


@dataclass
class CountingTransport:
    """Count the payload bytes that go through another transport."""

    inner: Transport
    sent_bytes: int = 0
    received_bytes: int = 0

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Send, and count both directions."""
        self.sent_bytes += payload_bytes(request)
        reply = self.inner.send(request)
        self.received_bytes += payload_bytes(reply)
        return reply


def payload_bytes(message: Any) -> int:
    """Add up the array bytes in a message; headers are not counted."""
    if isinstance(message, np.ndarray):
        return int(message.nbytes)
    if isinstance(message, Mapping):
        return sum(payload_bytes(value) for value in message.values())
    if isinstance(message, tuple):
        return sum(payload_bytes(value) for value in message)
    if hasattr(message, "__dataclass_fields__"):
        return sum(payload_bytes(getattr(message, f.name)) for f in fields(message))
    return 0


@dataclass(frozen=True)
class LocalTransport:
    """Reach an edge in this process.

    Parameters
    ----------
    handle : Callable[[Request], reply]
        ``EdgeService.handle``.
    """

    handle: Callable[[Any], Any]

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Call the edge, outside the device's memory meter."""
        with unmetered():
            reply: ReplyT = self.handle(request)
        return reply
