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
from flwr_smartsplit.types import (
    WHOLE,
    WHOLE_BATCH,
    Advice,
    Cohort,
    MicroBatch,
    Receipt,
    Variant,
)

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
    accumulate : int
        Into how many micro-batches a batch is divided.
    codecs : tuple[str, ...]
        How each crossing is written from the one into this edge on; empty for ``RAW``.
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
    accumulate: int = 1
    codecs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Onward:
    """Where the next edge of a route is, and what to ask it first."""

    address: str
    opening: OpenSession


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """What a place answers to ``Forward`` or ``Backward``.

    Parameters
    ----------
    boundary : tuple[WireTensor, ...]
        What goes back to the device, where the route ends there.
    gradients : tuple[WireTensor, ...]
        The gradients of those tensors of the boundary that need one, in order.
    values : Mapping[str, float]
        Mean loss of the batch, and metrics in evaluation.
    norms : Mapping[str, float]
        The norm of each gradient, where they are clipped.
    advice : Advice or None
        What the edge would have changed before the next step.
    """

    boundary: tuple[WireTensor, ...] = ()
    gradients: tuple[WireTensor, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    advice: Advice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward(Request[Stepped]):
    """Go forward from a boundary, and do all that can be done of the step.

    With targets that is everything: loss, backward and update in a session that trains,
    loss and metrics in one that evaluates. Without, the boundary comes back to the
    device, and ``Backward`` follows if the session trains.

    Parameters
    ----------
    session, incarnation : str
        The session, and the life of the edge that opened it.
    step : int
        Number of the step, from 0. In training, repeating the last one repeats its
        reply; in evaluation, nothing is remembered.
    boundary : tuple[WireTensor, ...]
        The tensors that cross.
    targets : WireTensor, optional
        What the batch should give.
    num_examples : int
        Examples in the micro-batch.
    part : MicroBatch
        Which part of the step's batch it is.
    norm : float, optional
        The norm of all gradients of the step before, whose update waited for it.
    step_seconds : float, optional
        What a step takes the device, as the route is now.

    Raises
    ------
    ValueError
        If there are targets, and not for so many examples.
    """

    session: str = ""
    incarnation: str = ""
    step: int
    boundary: tuple[WireTensor, ...] = ()
    targets: WireTensor | None = None
    num_examples: int
    part: MicroBatch = WHOLE_BATCH
    norm: float | None = None
    step_seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse a number of examples that the targets contradict."""
        given = None if self.targets is None else self.targets.shape[:1]
        if self.targets is not None and given != (self.num_examples,):
            raise ValueError(
                f"step {self.step} brings targets of shape {self.targets.shape} for "
                f"{self.num_examples} examples."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward(Request[Stepped]):
    """Go backward in the step whose ``Forward`` was last, and update.

    Parameters
    ----------
    session, incarnation, step, part : str, str, int, MicroBatch
        As for ``Forward``.
    gradients : tuple[WireTensor, ...]
        Of those tensors of the returned boundary that need one, in order.
    """

    session: str = ""
    incarnation: str = ""
    step: int
    part: MicroBatch = WHOLE_BATCH
    gradients: tuple[WireTensor, ...]


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
        As for ``Forward``.
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


def payload_bytes(message: Any) -> int:
    """Add up the array bytes in a message; headers are not counted."""
    if message is None or isinstance(message, str | int | float):
        return 0
    if isinstance(message, WireTensor):
        message = message.data
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
