"""The requests that devices and strategies send to an edge, and its replies.

Every request names the type of its reply. Transports deliver requests; counting,
retrying, and losing messages in a test are transports that wrap another one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.edge.tensors import Coded, WireTensor
from flwr_smartsplit.edge.weighted_mean import WeightedSum
from flwr_smartsplit.memory.meter import unmetered
from flwr_smartsplit.types import (
    WHOLE,
    WHOLE_BATCH,
    Advice,
    Codec,
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
class StrategyRequest(Request[ReplyT]):
    """A request that only a run's strategy may send; ``access`` proves that it did."""

    access: str = field(default="", kw_only=True, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Held:
    """Whether an edge holds a state, and the incarnation of the edge."""

    incarnation: str
    is_held: bool
    task_digest: str = ""  # Of the task that the edge trains


@dataclass(frozen=True, slots=True)
class Welcome:
    """What an edge at which a run begins offers to all runs together."""

    memory_bytes: int | None = None  # None is no limit
    disk_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Hello(StrategyRequest[Welcome]):
    """Begin a run at the edge; its ``access`` is the edge's admin secret, if any.

    From then on, requests of the run's strategy carry its secret, and its clients open
    what its key has signed.
    """

    run: str
    public_key: bytes  # Ed25519
    secret_digest: bytes  # SHA-256 of the run's ``access``
    num_states: int = 2  # That it holds at once: more if it is asynchronous


@dataclass(frozen=True, slots=True)
class IsHeld(StrategyRequest[Held]):
    """Ask whether the edge already holds a global state."""

    digest: str


@dataclass(frozen=True, slots=True)
class HoldState(StrategyRequest[Held]):
    """Send the edge a round's global state, with its digest.

    With a ``rest``, the digest is ``joined_digest`` of the rest's and of these arrays'.
    """

    digest: str
    state: State
    rest: str = ""  # The digest of a held state that has all other names
    variant: Variant = WHOLE  # What it is the state of: less, once a model is pruned


@dataclass(frozen=True, slots=True)
class Described:
    """What an edge's task is made of, by field; see ``task_facts``."""

    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DescribeTask(StrategyRequest[Described]):
    """Ask for the parts of a task whose digest differs."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session is open; its later requests carry this incarnation."""

    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that a session takes from its client."""

    num_examples: int | None  # In all training steps; None in evaluation
    step_examples: int
    step_bytes: int  # Of one request's tensors, laid out with their gaps
    least_start: int  # The first unit that the client may move to the edge
    ends_at_edge: bool  # The labels come with each step, and nothing goes back to them
    phase: int = 0  # Of the run; once it is over, nothing is opened


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSession(Request[Opened]):
    """Build one client's segment at the edge, and those at the edges after it.

    Fields without a comment are as in ``ClientPlan``.
    """

    session: str  # Its name
    place: str  # The edge's name in the route
    round_number: int
    client_key: str
    start: int  # The edge runs the units ``[start, stop)``
    stop: int
    state_digest: str  # The held state to start from
    seed: int
    num_threads: int
    config: Mapping[str, Any] = field(default_factory=dict)
    onward: "Onward | None" = None  # The next edge; this one opens a session there
    is_trained: bool = True  # Or only evaluated
    token: str = ""  # Tells a repeated request from a second opening, which starts over
    cohort: Cohort | None = None  # For the route's first edge, which advises the device
    importance: float = 0.0
    num_examples: int = 0
    batch_size: int | None = None  # The largest that will come, if the device knows
    variant: Variant = WHOLE
    accumulate: int = 1  # Micro-batches per batch
    wants_norms: bool = False  # Of its gradients, with each step's reply
    codecs: tuple[Codec, ...] = ()  # Of the cuts from this one on; empty for ``RAW``
    limits: Limits | None = None  # None where no strategy planned it
    # Without labels: outputs go back, and all such sessions share one copy of the units
    predicts: bool = False


@dataclass(frozen=True, slots=True)
class OpenSigned(Request[Opened]):
    """Open what the strategy has signed; to repeat it repeats the answer."""

    run: str
    opening: bytes  # An ``OpenSession``
    signature: bytes


@dataclass(frozen=True, slots=True)
class Onward:
    """The address of a route's next edge, and the session to open there."""

    address: str
    opening: OpenSession | OpenSigned


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """The reply to ``Forward`` and to ``Backward``."""

    boundary: tuple[WireTensor | Coded, ...] = ()  # If the route ends on the device
    # Of the whole model, if the session predicts and the route ends at an edge
    outputs: WireTensor | tuple[WireTensor, ...] | None = None  # Several if nested
    # Of the inputs that need one, in order
    gradients: tuple[WireTensor | Coded, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)  # Mean loss; metrics
    norms: Mapping[str, float] = field(default_factory=dict)  # If asked for
    advice: Advice | None = None  # What to change before the next step


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward(Request[Stepped]):
    """Run forward from a boundary, and as much of the step as possible.

    With targets, that is everything: loss, backward and update in training, loss and
    metrics in evaluation. Without them, the boundary returns to the device, and
    ``Backward`` follows in training; where a session predicts, the outputs return if
    there is no boundary to. To repeat the last request repeats its reply.
    """

    session: str = ""
    incarnation: str = ""
    step: int  # From 0
    boundary: tuple[WireTensor | Coded, ...] = ()
    targets: WireTensor | tuple[WireTensor, ...] | None = None  # Several if nested
    num_examples: int  # In the micro-batch
    part: MicroBatch = WHOLE_BATCH
    norm: float | None = None  # Of all gradients of the last step; its update waited
    step_seconds: float | None = None  # On the device, with its present route

    def __post_init__(self) -> None:
        given = self.targets
        if isinstance(given, WireTensor) and given.shape[:1] != (self.num_examples,):
            raise ValueError(
                f"step {self.step} has targets of shape {given.shape} for "
                f"{self.num_examples} examples: send as many of both."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward(Request[Stepped]):
    """Run backward in the step of the last ``Forward``, and update."""

    session: str = ""
    incarnation: str = ""
    step: int
    part: MicroBatch = WHOLE_BATCH
    # Of the returned tensors that need one, in order
    gradients: tuple[WireTensor | Coded, ...]


@dataclass(frozen=True, slots=True)
class Seal(Request[tuple[Receipt, ...]]):
    """Finish a session: check its tail, write it to disk and free its memory."""

    session: str
    incarnation: str
    num_steps: int  # That the device did
    norm: float | None = None  # As in ``Forward``


@dataclass(frozen=True, slots=True)
class Abandon(Request[None]):
    """Delete a session and its tail, sealed or not, unless it was opened again."""

    session: str
    incarnation: str = ""  # Any


@dataclass(frozen=True, slots=True)
class Entry:
    """A sealed session to merge, and its weight."""

    session: str
    digest: str
    weight: int


@dataclass(frozen=True, slots=True)
class Committed:
    """What the requested sessions come to: weighted sums, and means if asked for."""

    sums: Mapping[str, WeightedSum]
    means: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Commit(StrategyRequest[Committed]):
    """Merge exactly these sealed sessions, in this order; repeating it is safe.

    A sum is four times as large as its mean: of names that nobody else has, only the
    means are sent.
    """

    round_number: int
    entries: tuple[Entry, ...]
    alone: tuple[str, ...] = ()  # Names that no other edge or device adds to


@dataclass(frozen=True, slots=True)
class Release(StrategyRequest[None]):
    """Delete all of this round and earlier ones, except one state and its rest.

    An asynchronous run has clients that began with other states: those are kept, too,
    and of the later rounds only what has ended is deleted.
    """

    round_number: int
    keep_digest: str
    keep_rest: str = ""
    phase: int = 0  # This one and all before are over; see ``Limits``
    keep_more: tuple[str, ...] = ()  # Digests of other states
    ended: tuple[str, ...] = ()  # Sessions, of whatever round


@dataclass(frozen=True, slots=True)
class EndRun(StrategyRequest[None]):
    """End the run at the edge, and delete all that it has there."""


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


_NO_ARRAYS = (str, int, float, NoneType, MicroBatch)


@cache
def _names(message: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(message))


def payload_bytes(message: Any) -> int:
    """Add up the array bytes in a message; headers are not counted."""
    if isinstance(message, _NO_ARRAYS):
        return 0
    if isinstance(message, WireTensor | Coded):
        message = message.data
    if isinstance(message, np.ndarray):
        return int(message.nbytes)
    if isinstance(message, Mapping):
        return sum(payload_bytes(value) for value in message.values())
    if isinstance(message, tuple | list):
        return sum(payload_bytes(value) for value in message)
    if hasattr(message, "__dataclass_fields__"):
        cls: Any = type(message)
        return sum(payload_bytes(getattr(message, name)) for name in _names(cls))
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
