"""AsyncLoop: ask idle clients, take replies as they come, and merge.

It goes by the grid's time, so a grid that simulates time makes a run reproducible:
replies of one moment are taken in client_key order, and however many a poll brings,
each merge has exactly as many as it shall have.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import WARNING, getLogger
from typing import Any, Protocol

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.flower import messages
from flwr_smartsplit.flower.asynchronous.flights import Flight, Flights
from flwr_smartsplit.flower.asynchronous.grid_time import Time
from flwr_smartsplit.flower.asynchronous.pace import Pace
from flwr_smartsplit.flower.registry import Fleet, Member
from flwr_smartsplit.flower.rounds.exchange import Dispatch, Phase
from flwr_smartsplit.flower.rounds.manager import CentralManager
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from flwr_smartsplit.server.acceptance import check_reply, refusal
from flwr_smartsplit.server.aggregation import Settled
from flwr_smartsplit.types import ClientReply, Failure

_log = getLogger("flwr")


class Asking(Protocol):
    """The strategy's part: which nodes there are, and how a phase begins."""

    _central: CentralManager
    _fleet: Fleet

    def _nodes(self, grid: Grid) -> list[int]: ...

    def _begin(
        self,
        phase: Phase,
        state: Mapping[str, Any],
        clients: Mapping[str, Member],
        failures: list[Failure],
        *,
        asked: str,
    ) -> Dispatch: ...


@dataclass(kw_only=True)
class AsyncLoop:
    """One asynchronous run over a grid, from merge to merge."""

    strategy: Asking
    grid: Grid
    time: Time
    pace: Pace
    timeout: float  # Seconds for one client's answer
    arrays: ArrayRecord  # The newest global state
    config: Mapping[str, Any] = field(default_factory=dict)  # Of Flower's round
    version: int = 0  # Of the global state: merges so far
    flights: Flights = field(default_factory=Flights)
    _arrived: deque[Message] = field(default_factory=deque)
    _last: Dispatch | None = None  # The phase that was begun last
    _offered: tuple[int, frozenset[str]] | None = None  # To whom, and with what state
    _asked_all: int = 0  # The round in which silent nodes were asked again
    _has_warned: bool = False

    def __post_init__(self) -> None:
        self._central = self.strategy._central
        self._began = self.time.seconds()

    def next_merge(self) -> Settled:
        """Go on until as many replies as shall be are merged, or nobody is left."""
        while True:
            while self._arrived:
                self._arrive(self._arrived.popleft())
                if len(self.flights.buffer) == self.pace.merge_every:
                    return self._merge()
            self._fill()
            if not self.flights.flying:  # Nobody else can train this state.
                return self._merge()
            self._poll()

    # --- asking -------------------------------------------------------------------

    def _fill(self) -> None:
        """Let idle clients train, as many as there are free places."""
        free = self.pace.clients_at_once - self.flights.num_places()
        if free < 1:
            return
        nodes = self._present() if self.flights.num_places() else self._all_nodes()
        round_number = self.pace.round_of(self.version + 1)
        members, failures = self.strategy._fleet.members(
            self.grid, nodes, ask_again=self._asked_all < round_number
        )
        self._asked_all = round_number
        self._warn_of_few(members)
        idle = self._idle(members)
        offered = self.version, frozenset(idle)
        if members and (not idle or offered == self._offered):
            rounds = self._central.rounds
            rounds.write_failures(failures, self.version + 1, phase="profile")
            return
        self._offered = offered
        phase = Phase(
            round_number=self.version + 1,
            is_train=True,
            sample_size=lambda available: free,
            config=self.config,
        )
        state = from_array_record(self.arrays)
        dispatch = self.strategy._begin(
            phase, state, idle, failures, asked=f"{len(nodes)} nodes"
        )
        self._send(dispatch)

    def _send(self, dispatch: Dispatch) -> None:
        """Write and push a phase's messages; from now on each client is alone."""
        self._last = dispatch
        written = messages.written(dispatch, self.arrays, self.config, ttl=self.timeout)
        # Grids differ in what they return for a message that they could not take.
        pushed = set(self.grid.push_messages(written)) if written else set()
        deadline = self.time.seconds() + self.timeout
        for key, part in self._central.outstanding.one_by_one(dispatch).items():
            message_id = part.messages[key].message_id
            self.flights.flying[message_id] = Flight(
                client_key=key,
                node_id=part.contacts[key].node_id,
                dispatch=part,
                deadline_seconds=deadline,
            )
            if message_id not in pushed:
                cause = "Flower could not take the message to it; is its node there?"
                failure = Failure(client_key=key, kind="lost", cause=cause)
                self.flights.fail(message_id, failure)

    def _idle(self, members: Mapping[str, Member]) -> dict[str, Member]:
        """List who may be asked: not busy, nor merged too often of late."""
        busy = self.flights.busy()
        idle = [key for key in members if key not in busy]
        allowed = self.pace.within_share(idle, tuple(self.flights.merged))
        if not allowed and not busy:  # Too few clients for such a share.
            allowed = idle
        return {key: members[key] for key in allowed}

    def _warn_of_few(self, members: Mapping[str, Member]) -> None:
        if len(members) < self.pace.clients_at_once and not self._has_warned:
            self._has_warned = True
            _log.log(
                WARNING,
                "%s clients are there, and clients_at_once=%s: fewer train at once.",
                len(members),
                self.pace.clients_at_once,
            )

    def _present(self) -> list[int]:
        return list(self.grid.get_node_ids())

    def _all_nodes(self) -> list[int]:
        return self.strategy._nodes(self.grid)

    # --- hearing ------------------------------------------------------------------

    def _poll(self) -> None:
        """Take what has come; give up who has left; else let time pass."""
        flying = self.flights.flying
        came = list(self.grid.pull_messages(list(flying)))
        known = [m for m in came if m.metadata.reply_to_message_id in flying]
        known.sort(key=lambda m: flying[m.metadata.reply_to_message_id].client_key)
        self._arrived.extend(known)
        answered = {message.metadata.reply_to_message_id for message in known}
        now = self.time.seconds()
        lost = self.flights.lost(set(self._present()), now)
        for message_id in lost.keys() - answered:
            self.flights.fail(message_id, lost[message_id])
        if not known and not lost:
            deadlines = (flight.deadline_seconds for flight in flying.values())
            self.time.wait(min(deadlines) - now)

    def _arrive(self, message: Message) -> None:
        """Read and check one reply; it waits for the merge, or has failed."""
        message_id = message.metadata.reply_to_message_id
        flight = self.flights.flying.get(message_id)
        if flight is None:
            self._refuse_second(message)
            return
        dispatch, chain = flight.dispatch, self._central.chain
        replies, failures = messages.read(dispatch, [message], chain)
        for reply in replies:
            try:
                self._check(dispatch, reply)
            except RefusedReply as error:
                failures.append(refusal(reply, error))
        if failures:
            self.flights.fail(message_id, failures[0])
            return
        del self.flights.flying[message_id]
        self.flights.buffer.append((dispatch, replies[0]))

    def _check(self, dispatch: Dispatch, reply: ClientReply) -> None:
        most = self.pace.max_staleness
        staleness = self.version + 1 - dispatch.version
        if most is not None and staleness > most:
            raise RefusedReply(
                f"client {reply.client_key!r} began {staleness} merges ago, and "
                f"max_staleness is {most}: raise it, or give the client less work.",
                kind="late",
            )
        check_reply(
            reply,
            round_number=dispatch.round_number,
            expected=dispatch.expectations(self._central.chain, [reply]),
            accepted={},
            current=self._central.state,
        )

    def _refuse_second(self, message: Message) -> None:
        cause = "a second reply to one message; the first one counts."
        key = f"node {message.metadata.src_node_id}"
        failure = Failure(client_key=key, kind="duplicate", cause=cause)
        rounds = self._central.rounds
        rounds.write_failures([failure], self.version + 1, phase="train")

    # --- merging ------------------------------------------------------------------

    def _merge(self) -> Settled:
        """Settle what waits, and who has failed since the last merge."""
        assert self._last is not None  # Something was begun, or an error raised.
        dispatches, replies, failures = self.flights.taken()
        dispatch = self._central.outstanding.join(
            dispatches, round_number=self.version + 1, like=self._last
        )
        dispatch.at_seconds = self.time.seconds() - self._began
        self.strategy._fleet.heard(dispatch, failures)
        settled = self._central.settle(dispatch, replies, failures)
        self.version += 1
        self.flights.merged.extend(settled.accepted)
        while len(self.flights.merged) > self.pace.window:
            self.flights.merged.popleft()
        if settled.state is not None:
            self.arrays = to_array_record(settled.state)
        return settled
