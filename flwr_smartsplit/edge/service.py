"""EdgeService: runs the tails of clients' models; it knows no network.

Every client trains its own replica of its tail. ``Seal`` checks it, writes it to disk
and frees its memory; ``Commit`` merges exactly the sealed tails that the strategy
names. Until then, no client can affect another one, or the global model.
"""

from functools import cached_property, partial, singledispatchmethod
from pathlib import Path
from typing import Any, cast

import torch

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.admission import Admission
from flwr_smartsplit.edge.client import Connect, EdgeClient, nowhere
from flwr_smartsplit.edge.cut_moves import MoveCut, Moved
from flwr_smartsplit.edge.session import Session
from flwr_smartsplit.edge.session_table import SessionTable
from flwr_smartsplit.edge.state_store import StateStore
from flwr_smartsplit.edge.tensors import joined_digest, state_digest
from flwr_smartsplit.edge.weighted_mean import add_states
from flwr_smartsplit.errors import EdgeError, StaleSession
from flwr_smartsplit.memory.meter import unmetered
from flwr_smartsplit.split.build import build_chain, materialise
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Segment
from flwr_smartsplit.task import Task
from flwr_smartsplit.task_digest.facts import facts_digest, task_facts
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.torch_device import CPU
from flwr_smartsplit.types import EdgeProfile, Receipt

_UNLIMITED = EdgeProfile(name="")


class EdgeService:
    """Answer every request to an edge; it is thread-safe."""

    def __init__(
        self,
        task: Task,
        *,
        spill_dir: Path,  # For held states and sealed tails; survives a restart
        incarnation: str,  # This start's; requests to an earlier one are refused
        connect: Connect = nowhere,  # To the edges where routes continue
        profile: EdgeProfile = _UNLIMITED,  # The budgets that all sessions share
        device: torch.device = CPU,
    ) -> None:
        self._task = task
        self._connect = connect
        self._device = device
        self._incarnation = incarnation
        self._chain = build_chain(task)
        self._store = StateStore(spill_dir)
        self._admission = Admission(task, profile, sealed=self._store.tail_bytes())
        self._sessions = SessionTable(
            self._store, self._admission, incarnation=incarnation
        )
        # Where memory is short, large parameters are stepped inside backward.
        self._steps_in_backward = profile.memory_bytes is not None

    def handle(self, request: wire.Request[wire.ReplyT]) -> wire.ReplyT:
        """Return the reply to a request, or raise an ``EdgeError``."""
        try:
            return cast(wire.ReplyT, self._answer(request))
        except OSError as error:
            raise EdgeError(
                f"this edge's disk failed ({error}): free space for held states and "
                "sealed tails, or set another spill_dir."
            ) from error

    @singledispatchmethod
    def _answer(self, request: Any) -> Any:
        raise TypeError(f"an edge cannot be asked {type(request).__name__}.")

    @_answer.register
    def _(self, request: wire.OpenSession) -> wire.Opened:
        session = self._sessions.opened_by(request) or self._sessions.open(
            request, partial(self._built, request)
        )
        return wire.Opened(session.incarnation)

    @_answer.register
    def _(self, request: wire.Forward | wire.Backward) -> wire.Stepped:
        with self._sessions.held(request) as session:
            # This may take seconds; the session may end meanwhile.
            self._admission.fit(session, request)
            self._sessions.require_open(session)
            with self._sessions.void_on_error(session):
                return session.answer(request)

    @_answer.register
    def _(self, request: MoveCut) -> Moved:
        with self._sessions.held(request) as session:
            self._admission.widen(session, request)
            self._sessions.require_open(session)
            make = partial(self._runner, session.opened)
            with self._sessions.void_on_error(session):
                return session.move(request, self._chain_of(session), make)

    @_answer.register
    def _(self, request: wire.Seal) -> tuple[Receipt, ...]:
        try:
            with self._sessions.held(request) as session:
                with self._sessions.void_on_error(session):
                    return self._sessions.seal(
                        session, request, self._chain_of(session)
                    )
        except StaleSession:
            # It may have been sealed before, or while this request waited.
            receipts = self._sessions.sealed_by(request)
            if receipts is None:
                raise
            return receipts

    @_answer.register
    def _(self, request: wire.Abandon) -> None:
        self._sessions.abandon(request)

    def _built(self, request: wire.OpenSession) -> Session:
        """Build a session here, and at the edges after this one."""
        with unmetered():  # The template's buffers belong to no session.
            chain = self._chain.under(request.variant)
            names = chain.state_names(request.start, request.stop)
        state = self._store.read_state(request.state_digest, names)
        segment = materialise(chain, request.start, request.stop, state)
        del state
        runner, onward = self._runner(request, segment), None
        if request.onward is not None:
            opening = request.onward.opening
            transport = self._connect(opening.place, request.onward.address)
            onward = EdgeClient(transport, opening, device=self._device)
        incarnation = f"{self._incarnation}{request.token}"
        return Session(request, incarnation, runner, onward, device=self._device)

    def _chain_of(self, session: Session) -> Chain:
        return self._chain.under(session.opened.variant)

    def _runner(self, opened: wire.OpenSession, segment: Segment) -> SegmentRunner:
        """Make a session's runner, when it opens or its cut moves."""
        return SegmentRunner(
            segment,
            self._task,
            streams=UnitStreams(
                opened.seed, opened.round_number, opened.client_key, self._device
            ),
            config=opened.config,
            is_trained=opened.is_trained,
            steps_in_backward=self._steps_in_backward,
            device=self._device,
        )

    @_answer.register
    def _(self, request: wire.IsHeld) -> wire.Held:
        digest = facts_digest(self._facts)
        return wire.Held(self._incarnation, self._store.holds(request.digest), digest)

    @_answer.register
    def _(self, request: wire.DescribeTask) -> wire.Described:
        del request
        return wire.Described(self._facts)

    @cached_property
    def _facts(self) -> dict[str, str]:
        return task_facts(self._task, self._chain.model)

    @_answer.register
    def _(self, request: wire.HoldState) -> wire.Held:
        if joined_digest(request.rest, state_digest(request.state)) != request.digest:
            raise EdgeError(
                f"the state sent as {request.digest[:12]} has another digest: "
                "it changed on the way; send it again."
            )
        self._store.hold(request.digest, request.state, rest=request.rest)
        return wire.Held(self._incarnation, True)

    @_answer.register
    def _(self, request: wire.Commit) -> wire.Committed:
        self._store.verify({e.session: e.digest for e in request.entries})
        weights = {entry.session: entry.weight for entry in request.entries}
        return wire.Committed(add_states(self._store.read_tails(weights)))

    @_answer.register
    def _(self, request: wire.Release) -> None:
        self._sessions.release(request.round_number)
        self._store.release(
            request.round_number, request.keep_digest, request.keep_rest
        )
        self._admission.recount(self._store.tail_bytes())
