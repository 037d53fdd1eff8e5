"""Flights: whom an asynchronous run has asked, since when, and what waits to be merged.

It knows no grid: it is told what happens, in order.
"""

from collections import deque
from dataclasses import dataclass, field

from flwr_smartsplit.flower.rounds.exchange import Dispatch
from flwr_smartsplit.types import ClientReply, Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """One client that is training, on the state that it was sent."""

    client_key: str
    node_id: int
    dispatch: Dispatch  # What it was asked, alone
    deadline_seconds: float


@dataclass
class Flights:
    """Who trains, by message id, and what has come back since the last merge.

    A client is in one place at most: in flight, in the buffer or among the failed.
    """

    flying: dict[str, Flight] = field(default_factory=dict)
    buffer: list[tuple[Dispatch, ClientReply]] = field(default_factory=list)
    failed: list[tuple[Dispatch, Failure]] = field(default_factory=list)
    merged: deque[str] = field(default_factory=deque)  # Whose replies, in order

    def num_places(self) -> int:
        """Count the places that are taken: a reply keeps its own until the merge."""
        return len(self.flying) + len(self.buffer)

    def busy(self) -> set[str]:
        """Return whom not to ask: who trains, waits, or has failed with this state."""
        keys = {flight.client_key for flight in self.flying.values()}
        keys |= {reply.client_key for _, reply in self.buffer}
        return keys | {key for dispatch, _ in self.failed for key in dispatch.sent}

    def fail(self, message_id: str, failure: Failure) -> None:
        """Note that a flight has ended without a reply to merge."""
        self.failed.append((self.flying.pop(message_id).dispatch, failure))

    def lost(self, present: set[int], now: float) -> dict[str, Failure]:
        """Say which flights have ended by themselves: node gone, or out of time."""
        found: dict[str, Failure] = {}
        for message_id, each in self.flying.items():
            if each.node_id not in present:
                cause = f"node {each.node_id} has left while it trained."
            elif now >= each.deadline_seconds:
                cause = "no reply before the timeout; raise it, or look at its log."
            else:
                continue
            key = each.client_key
            found[message_id] = Failure(client_key=key, kind="lost", cause=cause)
        return found

    def taken(self) -> tuple[list[Dispatch], list[ClientReply], list[Failure]]:
        """Take what a merge settles: replies, and failures since the last one."""
        due, failed = self.buffer, self.failed
        self.buffer, self.failed = [], []
        dispatches = [dispatch for dispatch, _ in (*due, *failed)]
        return dispatches, [reply for _, reply in due], [each for _, each in failed]
