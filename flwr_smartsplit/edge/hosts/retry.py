"""Ask a full edge again, when it says so."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr_smartsplit.edge.protocol import ReplyT, Request, Transport
from flwr_smartsplit.errors import EdgeFull


@dataclass(frozen=True, slots=True)
class RetryingTransport:
    """Send through another transport, and again while the edge is full.

    Parameters
    ----------
    inner : Transport
        Reaches the edge.
    max_wait_seconds : float
        How long to go on asking, for one request.
    clock, sleep : Callable
        Seconds that only move forward, and what passes them.
    """

    inner: Transport
    max_wait_seconds: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Deliver the request once the edge is not full.

        Raises
        ------
        EdgeFull
            The last refusal, where time is up or waiting does not help.
        """
        deadline = self.clock() + self.max_wait_seconds
        while True:
            try:
                return self.inner.send(request)
            except EdgeFull as error:
                wait = error.retry_after_seconds
                if wait is None or self.clock() + wait > deadline:
                    raise
                self.sleep(wait)
