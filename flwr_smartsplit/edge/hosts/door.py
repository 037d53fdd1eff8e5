"""Door: who is in touch with an edge on a network, and for how long it waits for them.

A visit is one connection of a strategy or of a client. It ends with its connection;
what its client had opened is kept for a grace, in which the client may come again.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import opening_in
from flwr_smartsplit.edge.gate.gate import STRANGERS_BYTES, EdgeGate
from flwr_smartsplit.edge.hosts.counts import Counts
from flwr_smartsplit.edge.hosts.edge import answered
from flwr_smartsplit.edge.message_bytes import Piece
from flwr_smartsplit.errors import EdgeError, EdgeFull

_RESTART_SECONDS = 2.0
_MOST_CALLERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How much of whom a door takes."""

    grace_seconds: float = 60.0  # Until what a lost client had open is deleted
    idle_seconds: float = 30.0  # Until a stranger who opens nothing is sent away
    openings_per_second: float = 50.0  # Of each caller
    max_visits: int = 512
    clock: Callable[[], float] = time.monotonic


@dataclass(eq=False)
class Visit:
    """One connection to the edge."""

    caller: str  # The machine that it comes from
    secret: str  # Of a strategy or a session, if the caller has one already
    end: Callable[[], object]  # Breaks the connection
    heard: float
    is_busy: bool = False
    sessions: dict[str, str] = field(default_factory=dict)  # Names by incarnation


class Door:
    """Let visits in, answer them through the gate, and clean up after them."""

    def __init__(
        self, gate: EdgeGate, *, name: str, patience: Patience = Patience()
    ) -> None:
        self.counts = Counts()
        self._gate = gate
        self._name = name
        self.patience = patience
        self._lock = Lock()
        self._visits: set[Visit] = set()
        self._lost: dict[str, tuple[str, float]] = {}  # Sessions without a visit
        self._openings: dict[str, tuple[float, float]] = {}  # Left, and as of when
        self.is_draining = False

    def enter(self, caller: str, secret: str, end: Callable[[], object]) -> Visit:
        """Begin a visit, or raise ``EdgeFull``."""
        visit = Visit(caller, secret, end, self.patience.clock())
        session = self._gate.session_of(secret) if secret else None
        with self._lock:
            if len(self._visits) >= self.patience.max_visits:
                raise self._full(f"has {len(self._visits)} connections", 1.0)
            self._visits.add(visit)
            if session is not None:
                visit.sessions[secret] = session.opened.session
                self._lost.pop(secret, None)
        return visit

    def most_bytes(self, visit: Visit) -> int:
        """Say how large a visit's next request may be."""
        return max(map(self._gate.most_bytes, (visit.secret, *visit.sessions)))

    def answer(self, visit: Visit, data: Piece) -> list[Piece]:
        """Answer a request's bytes; errors are replies, too."""
        visit.is_busy = True
        self.counts.add("received_bytes_total", len(data))
        try:
            reply = answered(partial(self._handle, visit), data, note=self.note)
        finally:
            visit.is_busy, visit.heard = False, self.patience.clock()
        self.counts.add("sent_bytes_total", sum(map(len, reply)))
        return reply

    def note(self, error: Exception) -> None:
        """Count a refusal."""
        name = type(error).__name__
        self.counts.add("refused_total", label="error", value=name)

    def leave(self, visit: Visit) -> None:
        """End a visit; the grace of its sessions begins."""
        until = self.patience.clock() + self.patience.grace_seconds
        with self._lock:
            self._visits.discard(visit)
            elsewhere = {key for other in self._visits for key in other.sessions}
            for secret, name in visit.sessions.items():
                if secret not in elsewhere:
                    self._lost[secret] = name, until

    def tick(self) -> None:
        """Delete what lost clients had open, and send silent strangers away."""
        now = self.patience.clock()
        self._gate.end_silent_runs()
        with self._lock:
            over = {s: n for s, (n, until) in self._lost.items() if until <= now}
            for secret in over:
                del self._lost[secret]
            silent = [v for v in self._visits if self._is_silent(v, now)]
        for secret, name in over.items():
            with suppress(EdgeError):  # It ended meanwhile.
                self._gate.handle(wire.Abandon(name, secret))
        for visit in silent:
            visit.end()

    def present(self) -> dict[str, float]:
        """Say what there is at this moment."""
        load = self._gate.load()
        return {
            "streams": len(self._visits),
            "runs": load.num_runs,
            "sessions": load.num_sessions,
            "reserved_bytes": load.reserved_bytes,
            "draining": self.is_draining,
        }

    def _handle(self, visit: Visit, request: Any) -> Any:
        started = self.patience.clock()
        if isinstance(request, wire.OpenSigned | wire.OpenSession | wire.Hello):
            self._check_opening(visit)
        reply = self._gate.handle(request)
        match request, reply:
            case wire.OpenSigned() | wire.OpenSession(), wire.Opened(
                incarnation=secret
            ):
                visit.sessions[secret] = opening_in(request).session
            case wire.Seal() | wire.Abandon(), _:
                visit.sessions.pop(request.incarnation, None)
        what, took = type(request).__name__, self.patience.clock() - started
        self.counts.add("requests_total", label="request", value=what)
        self.counts.add("request_seconds_total", took, label="request", value=what)
        return reply

    def _check_opening(self, visit: Visit) -> None:
        """Refuse openings of a door that closes, and too many from one machine."""
        if self.is_draining:
            count = self._gate.load().num_sessions
            text = f"is being stopped: it finishes {count} open sessions, and takes no"
            raise self._full(f"{text} new ones", _RESTART_SECONDS)
        rate, now = self.patience.openings_per_second, self.patience.clock()
        with self._lock:
            left, since = self._openings.pop(visit.caller, (2 * rate, now))
            left = min(2 * rate, left + (now - since) * rate)
            self._openings[visit.caller] = max(left - 1, 0.0), now
            if len(self._openings) > _MOST_CALLERS:
                del self._openings[next(iter(self._openings))]
        if left < 1:
            text = f"opens {rate:g} sessions a second for {visit.caller}, and not more"
            raise self._full(text, 1 / rate)

    def _full(self, text: str, retry_after_seconds: float) -> EdgeFull:
        return EdgeFull(
            f"edge {self._name!r} {text}. Ask again in {retry_after_seconds:g} s, or "
            "use another edge.",
            needed_bytes=0,
            free_bytes=0,
            budget_bytes=0,
            retry_after_seconds=retry_after_seconds,
        )

    def _is_silent(self, visit: Visit, now: float) -> bool:
        """Say whether a visit's caller has shown no secret for a time."""
        if visit.is_busy or now - visit.heard <= self.patience.idle_seconds:
            return False
        known = map(self._gate.most_bytes, (visit.secret, *visit.sessions))
        return max(known) <= STRANGERS_BYTES
