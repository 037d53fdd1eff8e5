"""The requests that devices and strategies send to an edge, and its replies.

Every request names the type of its reply. Transports deliver requests; counting,
retrying, and losing messages in a test are transports that wrap another one.
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
    """A request to an edge; the type parameter is its reply."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Held:
    """Whether an edge holds a state, and the incarnation of the edge."""

    incarnation: str
    is_held: bool


@dataclass(frozen=True, slots=True)
class IsHeld(Request[Held]):
    """Ask whether the edge already holds a global state."""

    digest: str


@dataclass(frozen=True, slots=True)
class HoldState(Request[Held]):
    """Send the edge a round's global state, with its digest."""

    digest: str
    state: State


@dataclass(frozen=True, slots=True)
class Opened:
    """A session is open; its later requests carry this incarnation."""

    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSession(Request[Opened]):
    """Build one client's segment at the edge, and those at the edges after it.

    Parameters
    ----------
    session, place : str
        The session's name, and the edge's name in the route.
    start, stop : int
        The edge runs the units ``[start, stop)``.
    state_digest : str
        The held state to start from.
    onward : Onward, optional
        The next edge of the route; this edge opens a session there and talks to it.
    is_trained : bool
        Whether the session trains its segment, or only evaluates it.
    token : str
        Distinguishes a repeated request from a second opening, which starts over.
    cohort : Cohort, optional
        Only for the route's first edge, which advises the device.
    batch_size : int, optional
        The largest batch that will come, if the device knows.
    accumulate : int
        Micro-batches per batch.
    codecs : tuple[str, ...]
        The codec of each crossing, from the one into this edge on; empty for ``RAW``.

    The other fields are as in ``ClientPlan``.
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
    """The address of a route's next edge, and the session to open there."""

    address: str
    opening: OpenSession


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """The reply to ``Forward`` and to ``Backward``.

    ``boundary`` returns to the device, where the route ends there. ``gradients`` are
    those of the incoming tensors that need one, in order. ``values`` holds the batch's
    mean loss, and metrics in evaluation; ``norms`` the gradients' norms, where they are
    clipped. ``advice`` is what the device should change before the next step.
    """

    boundary: tuple[WireTensor, ...] = ()
    gradients: tuple[WireTensor, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    advice: Advice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward(Request[Stepped]):
    """Run forward from a boundary, and as much of the step as possible.

    With targets, that is everything: loss, backward and update in training, loss and
    metrics in evaluation. Without them, the boundary returns to the device, and
    ``Backward`` follows in training. To repeat the last request repeats its reply.

    Parameters
    ----------
    step : int
        The step, from 0.
    num_examples : int
        Examples in the micro-batch.
    norm : float, optional
        The norm of all gradients of the step before, whose update waited for it.
    step_seconds : float, optional
        Seconds per step on the device, with its present route.
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
        given = None if self.targets is None else self.targets.shape[:1]
        if self.targets is not None and given != (self.num_examples,):
            raise ValueError(
                f"step {self.step} has targets of shape {self.targets.shape} for "
                f"{self.num_examples} examples: send as many of both."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward(Request[Stepped]):
    """Run backward in the step of the last ``Forward``, and update.

    ``gradients`` are those of the returned tensors that need one, in order.
    """

    session: str = ""
    incarnation: str = ""
    step: int
    part: MicroBatch = WHOLE_BATCH
    gradients: tuple[WireTensor, ...]


@dataclass(frozen=True, slots=True)
class Seal(Request[tuple[Receipt, ...]]):
    """Finish a session after the device's ``num_steps`` steps.

    The edge checks its tail, writes it to disk and frees its memory.
    """

    session: str
    incarnation: str
    num_steps: int
    norm: float | None = None


@dataclass(frozen=True, slots=True)
class Abandon(Request[None]):
    """Delete a session and its tail, sealed or not, unless it was opened again since.

    An empty incarnation means any.
    """

    session: str
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A sealed session to merge, and its weight."""

    session: str
    digest: str
    weight: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The weighted sums of exactly the requested sessions."""

    sums: Mapping[str, WeightedSum]


@dataclass(frozen=True, slots=True)
class Commit(Request[Committed]):
    """Merge exactly these sealed sessions, in this order; repeating it is safe."""

    round_number: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Release(Request[None]):
    """Delete all of this round and earlier ones, except one state."""

    round_number: int
    keep_digest: str


class Transport(Protocol):
    """Delivers requests to an edge."""

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Return the reply, or raise an ``EdgeError``."""


@dataclass
class CountingTransport:
    """Count the payload bytes through another transport."""

    inner: Transport
    sent_bytes: int = 0
    received_bytes: int = 0

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Send, and count both ways."""
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
    """Reach an edge in this process, by its ``EdgeService.handle``."""

    handle: Callable[[Any], Any]

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Call the edge, unseen by the device's memory meter."""
        with unmetered():
            reply: ReplyT = self.handle(request)
        return reply
