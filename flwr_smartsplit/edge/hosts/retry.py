"""Retry a request while the edge is full."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr_smartsplit.edge.protocol import ReplyT, Request, Transport
from flwr_smartsplit.errors import EdgeFull


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
