"""How a device and a strategy talk to an edge: one verb, frozen messages.

Every request names its reply type. Whatever is added on the way (counting,
retrying, losing messages in a test) is a transport that wraps another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.edge.weighted_mean import WeightedSum
from flwr_smartsplit.memory.meter import unmetered
from flwr_smartsplit.types import WHOLE, Advice, Cohort, Receipt, Variant

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
    """Build one client's segment at the edge, and those at the edges after it.

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
    seed, num_threads, config : int, int, Mapping
        As in the client's plan.
    onward : Onward, optional
        The edge where the route goes on, which this one opens and talks to.
    is_trained : bool
        Whether the segments are trained, or only evaluated.
    token : str
        Tells a repeated request from a second opening, which starts over.
    cohort, importance, num_examples : Cohort or None, float, int
        As in the client's plan, at the edge that advises the device; no other one is
        given a cohort.
    batch_size : int, optional
        The most examples that a batch will have, if the device knows.
    variant : Variant
        What of the global model is trained; the receipt says it again.
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
    config: Mapping[str, Any] = field(default_factory=dict)
    onward: "Onward | None" = None
    is_trained: bool = True
    token: str = ""
    cohort: Cohort | None = None
    importance: float = 0.0
    num_examples: int = 0
    batch_size: int | None = None
    variant: Variant = WHOLE


@dataclass(frozen=True, slots=True)
class Onward:
    """Where the next edge of a route is, and what to ask it first."""

    address: str
    opening: OpenSession


@dataclass(frozen=True, slots=True)
class Stepped:
    """Loss of a batch, the gradient of the boundary, and norms if they are clipped.

    ``advice`` is what the edge would have changed before the next step.
    """

    loss: float
    gradient: WireTensor
    norms: Mapping[str, float] = field(default_factory=dict)
    advice: Advice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep(Request[Stepped]):
    """Do all that is left of one training step, exactly once.

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
    norm : float, optional
        The norm of all gradients of the step before, whose update waited for it.
    step_seconds : float, optional
        What a step takes the device, as the route is now.
    """

    session: str
    incarnation: str
    step: int
    boundary: WireTensor
    targets: WireTensor
    context: tuple[WireTensor, ...] = ()
    norm: float | None = None
    step_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Forwarded:
    """The boundary that goes back to the device, with its context."""

    boundary: WireTensor
    context: tuple[WireTensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardStep(Request[Forwarded]):
    """Do the edges' forward of a step whose end is on the device.

    The parameters are those of ``TrainStep``, with the number of examples instead of
    the labels, which stay where they are.
    """

    session: str
    incarnation: str
    step: int
    boundary: WireTensor
    num_examples: int
    context: tuple[WireTensor, ...] = ()
    norm: float | None = None


@dataclass(frozen=True, slots=True)
class Returned:
    """The gradient of the boundary that came in, and norms if they are clipped."""

    gradient: WireTensor
    norms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardStep(Request[Returned]):
    """Do the edges' backward of the step whose forward was last."""

    session: str
    incarnation: str
    step: int
    gradient: WireTensor


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Mean loss and metrics of a batch."""

    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateStep(Request[Evaluated]):
    """Do all that is left of evaluating one batch; nothing is remembered."""

    session: str
    incarnation: str
    boundary: WireTensor
    targets: WireTensor
    context: tuple[WireTensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateForward(Request[Forwarded]):
    """Do the edges' part of evaluating a batch whose labels stay on the device."""

    session: str
    incarnation: str
    boundary: WireTensor
    context: tuple[WireTensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Seal(Request[tuple[Receipt, ...]]):
    """Finish a session: check its tail, put it aside, free its memory.

    Parameters
    ----------
    session, incarnation : str
        The session, and the life of the edge that opened it.
    num_steps : int
        How many steps the device counts.
    norm : float, optional
        As for ``TrainStep``.
    """

    session: str
    incarnation: str
    num_steps: int
    norm: float | None = None


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


def num_examples_of(request: Any) -> int:
    """Count the examples of a step's message; 0 if it brings none."""
    if hasattr(request, "num_examples"):
        return int(request.num_examples)
    tensor = getattr(request, "targets", None) or getattr(request, "boundary", None)
    return 0 if tensor is None else int(tensor.shape[0])


def payload_bytes(message: Any) -> int:
    """Add up the array bytes in a message; headers are not counted."""
    if isinstance(message, np.ndarray):
        return int(message.nbytes)
    if isinstance(message, Mapping):
        return sum(payload_bytes(value) for value in message.values())
    if isinstance(message, tuple | list):
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
