"""Edge: what an edge offers, and where it runs."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from flwr_smartsplit.edge.message_bytes import Piece, decode, encode, fitted, reply_hint
from flwr_smartsplit.edge.protocol import ReplyT, Request, Transport
from flwr_smartsplit.errors import EdgeFull, SmartSplitError
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EdgeProfile

_log = logging.getLogger(__name__)


class Host(Protocol):
    """Starts, reaches and stops edges; a small value that pickles.

    Edges reach each other through ``connect``, so it must not wait for a full edge.
    """

    def start(self, task: Task, profile: EdgeProfile) -> str:
        """Start an edge for one run; return its address, or raise EdgeUnreachable."""

    def connect(self, address: str) -> Transport:
        """Reach the edge at an address, or raise ``EdgeUnreachable``."""

    def stop(self, address: str) -> None:
        """Stop the edge and delete its files; no error if it is gone already."""


@dataclass(frozen=True, slots=True)
class RetryingTransport:
    """Send through another transport, and retry for a time while the edge is full."""

    inner: Transport
    max_wait_seconds: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Send; raise the last ``EdgeFull`` if time is up or waiting does not help."""
        deadline = self.clock() + self.max_wait_seconds
        while True:
            try:
                return self.inner.send(request)
            except EdgeFull as error:
                wait = error.retry_after_seconds
                if wait is None or self.clock() + wait > deadline:
                    raise
                self.sleep(wait)


@dataclass(frozen=True, slots=True)
class Edge:
    """An edge's profile, its host, and how long a client waits while it is full."""

    profile: EdgeProfile
    host: Host
    room_patience_seconds: float = 600.0
    admin_secret: str = field(default="", repr=False)  # With which runs begin there

    @property
    def name(self) -> str:
        """Its name in routes."""
        return self.profile.name

    def start(self, task: Task) -> str:
        """Start the edge for one run; return its address."""
        return self.host.start(task, self.profile)

    def connect(self, address: str) -> RetryingTransport:
        """Reach the edge at an address, and wait while it is full."""
        return RetryingTransport(self.host.connect(address), self.room_patience_seconds)

    def stop(self, address: str) -> None:
        """Stop the edge at an address."""
        self.host.stop(address)


def new_address(name: str) -> str:
    """Make an address for an edge, which also names its folder, whatever its name."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[:40]}-{uuid.uuid4().hex[:12]}"


@dataclass(frozen=True, slots=True)
class BytesTransport:
    """Reach an edge through anything that carries bytes."""

    # Takes bytes to ``answered`` and returns the reply's; may join pieces, not divide
    carry: Callable[[list[Piece]], Sequence[Piece]]

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Return the edge's reply, or raise what it raised."""
        return read_reply(request, *self.carry(encode(request)))


def read_reply(request: Request[ReplyT], *pieces: Piece) -> ReplyT:
    """Read the bytes of a request's reply, or raise the error that they are."""
    kind: Any = type(request)
    reply = decode(*pieces)
    if isinstance(reply, Exception):
        raise reply
    where = f"the reply to {kind.__name__}"
    return cast(ReplyT, fitted(reply, reply_hint(kind), where))


def answered(
    handle: Callable[[Any], Any],
    *pieces: Piece,
    note: Callable[[Exception], None] = lambda _: None,
) -> list[Piece]:
    """Answer a request's bytes by an ``EdgeGate.handle``; errors are replies too."""
    try:
        return encode(handle(decode(*pieces)))
    except Exception as error:
        note(error)
        if not isinstance(error, SmartSplitError):
            _log.exception("an edge failed at a request")
        return encode(error)
