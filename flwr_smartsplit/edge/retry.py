"""Waiting for room at an edge: it says when to ask again, and the asker sleeps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from flwr_smartsplit.edge.protocol import ReplyT, Request, Transport
from flwr_smartsplit.errors import EdgeFull

AnswerT = TypeVar("AnswerT")


def ask_patiently(
    ask: Callable[[], AnswerT],
    patience_seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> AnswerT:
    """Ask until there is room, or until patience ends.

    Parameters
    ----------
    ask : Callable
        Asks once.
    patience_seconds : float
        How long to go on asking.
    clock, sleep : Callable
        Seconds that only move forward, and what passes them.

    Raises
    ------
    EdgeFull
        The last refusal, where patience has ended or waiting does not help.
    """
    deadline = clock() + patience_seconds
    while True:
        try:
            return ask()
        except EdgeFull as error:
            wait = error.retry_after_seconds
            if wait is None or clock() + wait > deadline:
                raise
            sleep(wait)


@dataclass(frozen=True, slots=True)
class PatientTransport:
    """Send through another transport, and wait where the edge is full.

    Parameters
    ----------
    inner : Transport
        Reaches the edge.
    patience_seconds : float
        How long to wait for one request.
    """

    inner: Transport
    patience_seconds: float

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Deliver the request once there is room for it."""
        return ask_patiently(lambda: self.inner.send(request), self.patience_seconds)
