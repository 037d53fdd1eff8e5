"""Edge: one value that says what an edge offers and where it runs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from flwr_smartsplit.edge.hosts.retry import RetryingTransport
from flwr_smartsplit.edge.message_bytes import (
    Piece,
    decode,
    encode,
    fitted,
    reply_hint,
)
from flwr_smartsplit.edge.protocol import ReplyT, Request, Transport
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EdgeProfile

_log = logging.getLogger(__name__)


class Host(Protocol):
    """Where an edge runs and how it is reached; a small value that pickles.

    Edges reach each other through ``connect``, so it must not wait for room.
    """

    def start(self, task: Task, profile: EdgeProfile) -> str:
        """Start an edge for one run (strategy's side); return its address.

        Raises
        ------
        EdgeUnreachable
            If it cannot be started.
        """

    def connect(self, address: str) -> Transport:
        """Reach the edge at an address.

        Raises
        ------
        EdgeUnreachable
            If there is none.
        """

    def stop(self, address: str) -> None:
        """End the edge and delete its files; no error if it is gone already."""


@dataclass(frozen=True, slots=True)
class Edge:
    """How a client and a strategy reach an edge.

    Parameters
    ----------
    profile : EdgeProfile
        Its name in routes, and what it offers.
    host : Host
        Where it runs.
    room_patience_seconds : float
        How long a client waits for room.
    """

    profile: EdgeProfile
    host: Host
    room_patience_seconds: float = 600.0

    @property
    def name(self) -> str:
        """The place's name in routes."""
        return self.profile.name

    def start(self, task: Task) -> str:
        """Start the edge for one run (strategy's side); return its address."""
        return self.host.start(task, self.profile)

    def connect(self, address: str) -> RetryingTransport:
        """Reach the edge at an address, and wait where it is full."""
        return RetryingTransport(self.host.connect(address), self.room_patience_seconds)

    def stop(self, address: str) -> None:
        """End the edge at an address."""
        self.host.stop(address)


@dataclass(frozen=True, slots=True)
class BytesTransport:
    """Reach an edge through whatever carries bytes.

    Parameters
    ----------
    carry : Callable[[list[Piece]], Sequence[Piece]]
        Brings a request's bytes to ``answered`` at the edge, and returns its reply's.
        Pieces may be joined on the way, but not divided.
    """

    carry: Callable[[list[Piece]], Sequence[Piece]]

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Deliver the request and return its reply, or raise what the edge raised."""
        kind: Any = type(request)
        reply = decode(*self.carry(encode(request)))
        if isinstance(reply, Exception):
            raise reply
        where = f"the reply to {kind.__name__}"
        return cast(ReplyT, fitted(reply, reply_hint(kind), where))


def answered(handle: Callable[[Any], Any], *pieces: Piece) -> list[Piece]:
    """Answer a request at the edge; an error is a reply like any other.

    Parameters
    ----------
    handle : Callable[[Request], reply]
        ``EdgeService.handle``.
    *pieces : Piece
        The request's bytes.
    """
    try:
        return encode(handle(decode(*pieces)))
    except Exception as error:
        if not isinstance(error, SmartSplitError):
            _log.exception("an edge failed at a request")
        return encode(error)
