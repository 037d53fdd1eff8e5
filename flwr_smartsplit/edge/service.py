"""EdgeService: runs the tails of one run's clients; it knows no network.

It trusts whoever asks: hosts put an ``EdgeGate`` before it.

Every client trains its own replica of its tail. ``Seal`` checks it, writes it to disk
and frees its memory; ``Commit`` merges exactly the sealed tails that the strategy
names. Until then, no client can affect another one, or the global model.
"""

from dataclasses import replace
from functools import cached_property, partial, singledispatchmethod
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any, cast

import numpy as np
import torch

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.admission import Admission, Ledger
from flwr_smartsplit.edge.client import Connect, EdgeClient, nowhere, opening_in
from flwr_smartsplit.edge.cut_moves import MoveCut, Moved
from flwr_smartsplit.edge.gate.labels import LabelCheck
from flwr_smartsplit.edge.regions import cut_state
from flwr_smartsplit.edge.replicas import Replicas, replica_name
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

UNLIMITED = EdgeProfile(name="")


class EdgeService:
    """Answer every request of a run to an edge; it is thread-safe."""

    def __init__(  # noqa: PLR0913 - where it runs, and within what
        self,
        task: Task,
        *,
        spill_dir: Path,  # For held states and sealed tails; survives a restart
        incarnation: str,  # This start's; requests to an earlier one are refused
        connect: Connect = nowhere,  # To the edges where routes continue
        profile: EdgeProfile = UNLIMITED,  # The budgets that all sessions share
        device: torch.device = CPU,
        run: str = "",
        ledger: Ledger | None = None,  # Of the budgets, if several runs share them
    ) -> None:
        self._task = task
        self._run = run
        self._connect = connect
        self._device = device
        self._incarnation = incarnation
        self.chain = build_chain(task)
        self.store = StateStore(spill_dir)
        self._admission = Admission(
            task, profile, sealed=self.store.tail_bytes(), run=run, ledger=ledger
        )
        self._replicas = Replicas()
        self.sessions = SessionTable(
            self.store, self._admission, incarnation=incarnation
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
        session = self.sessions.opened_by(request) or self.sessions.open(
            request,
            partial(self._built, request),
            shared_as=replica_name(request, self.chain.under(request.variant)),
        )
        return wire.Opened(session.incarnation)

    @_answer.register
    def _(self, request: wire.OpenSigned) -> wire.Opened:
        token = sha256(request.opening).hexdigest()
        opened: wire.Opened = self._answer(replace(opening_in(request), token=token))
        return opened

    @_answer.register
    def _(self, request: wire.Forward | wire.Backward) -> wire.Stepped:
        with self.sessions.held(request) as session:
            # This may take seconds; the session may end meanwhile.
            self._admission.fit(session, request)
            self.sessions.require_open(session)
            with self.sessions.void_on_error(session):
                return session.answer(request)

    @_answer.register
    def _(self, request: MoveCut) -> Moved:
        with self.sessions.held(request) as session:
            self._admission.widen(session, request)
            self.sessions.require_open(session)
            make = partial(self._runner, session.opened)
            with self.sessions.void_on_error(session):
                return session.move(request, self._chain_of(session), make)

    @_answer.register
    def _(self, request: wire.Seal) -> tuple[Receipt, ...]:
        try:
            with self.sessions.held(request) as session:
                with self.sessions.void_on_error(session):
                    return self.sessions.seal(session, request, self.chain)
        except StaleSession:
            # It may have been sealed before, or while this request waited.
            receipts = self.sessions.sealed_by(request)
            if receipts is None:
                raise
            return receipts

    @_answer.register
    def _(self, request: wire.Abandon) -> None:
        self.sessions.abandon(request)

    def close(self) -> None:
        """Free what the sessions of this run hold and reserve."""
        self.sessions.close()

    def _built(self, request: wire.OpenSession) -> Session:
        """Build a session here, and at the edges after this one."""
        replica, build = None, partial(self._segment, request)
        if name := replica_name(request, self.chain.under(request.variant)):
            replica = self._replicas.of(name, build)
        runner = self._runner(request, replica.segment if replica else build())
        onward = None
        if request.onward is not None:
            place = opening_in(request.onward.opening).place
            transport = self._connect(place, request.onward.address)
            onward = EdgeClient(transport, request.onward.opening, device=self._device)
        return Session(
            request,
            # Only who opened the session knows this; the gate reads the run off it.
            f"{self._run}:{token_hex(16)}",
            runner,
            onward,
            device=self._device,
            replica=replica,
            answers=request.predicts and request.stop == len(self.chain),
        )

    def _segment(self, request: wire.OpenSession) -> Segment:
        """Build a session's units from the state that they start with."""
        with unmetered():  # The template's buffers belong to no session.
            chain = self.chain.under(request.variant)
            names = chain.state_names(request.start, request.stop)
            held_of = self.store.variant_of(request.state_digest)
            regions = self.chain.regions(request.variant, of=held_of)
        held = self.store.read_state(request.state_digest, names)
        state = cut_state(held, regions)
        del held
        segment = materialise(chain, request.start, request.stop, state)
        return segment.to(self._device).eval() if request.predicts else segment

    def _chain_of(self, session: Session) -> Chain:
        return self.chain.under(session.opened.variant)

    def _runner(self, opened: wire.OpenSession, segment: Segment) -> SegmentRunner:
        """Make a session's runner, when it opens or its cut moves."""
        runner = SegmentRunner(
            segment,
            self._task,
            streams=UnitStreams(
                opened.seed, opened.round_number, opened.client_key, self._device
            ),
            config=opened.config,
            is_trained=opened.is_trained,
            steps_in_backward=self._steps_in_backward,
            notes_norms=opened.wants_norms,
            device=self._device,
        )
        if self._device != CPU:  # There, a label out of range ends the process.
            runner.guard_loss(LabelCheck(self._task))
        return runner

    @_answer.register
    def _(self, request: wire.IsHeld) -> wire.Held:
        digest = facts_digest(self._facts)
        return wire.Held(self._incarnation, self.store.holds(request.digest), digest)

    @_answer.register
    def _(self, request: wire.DescribeTask) -> wire.Described:
        del request
        return wire.Described(self._facts)

    @cached_property
    def _facts(self) -> dict[str, str]:
        return task_facts(self._task, self.chain.model)

    @_answer.register
    def _(self, request: wire.HoldState) -> wire.Held:
        if joined_digest(request.rest, state_digest(request.state)) != request.digest:
            raise EdgeError(
                f"the state sent as {request.digest[:12]} has another digest: "
                "it changed on the way; send it again."
            )
        self.store.hold(
            request.digest, request.state, rest=request.rest, variant=request.variant
        )
        return wire.Held(self._incarnation, True)

    @_answer.register
    def _(self, request: wire.Commit) -> wire.Committed:
        sums = dict(add_states(self.store.read_tails(request.entries)))
        kinds = self.chain.kinds
        means = {
            name: sums.pop(name).mean(np.dtype(kinds[name][1]))
            for name in request.alone
            if name in sums
        }
        return wire.Committed(sums, means)

    @_answer.register
    def _(self, request: wire.Release) -> None:
        self.sessions.release(request.round_number, request.ended)
        kept = request.keep_digest, request.keep_rest, *request.keep_more
        self.store.release(request.round_number, *kept)
        self._admission.recount(self.store.tail_bytes())
