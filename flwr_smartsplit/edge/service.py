"""EdgeService: hosts the rest of each client's model, and knows no network.

Every client trains its own replica of its tail. ``Seal`` checks it, writes it to
disk and frees it; ``Commit`` merges exactly the sealed tails the strategy names.
Until then nothing a client does can touch another one, or the global model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, singledispatchmethod
from pathlib import Path
from typing import Any, cast

import numpy as np

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import Connect, EdgeLink, nowhere
from flwr_smartsplit.edge.moving import MoveCut, Moved
from flwr_smartsplit.edge.session import Session
from flwr_smartsplit.edge.session_room import SessionRoom
from flwr_smartsplit.edge.state_store import Spill, iterate_tails
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.edge.weighted_mean import add_states
from flwr_smartsplit.errors import (
    EdgeError,
    EdgeFull,
    RefusedMove,
    RefusedTail,
    StaleSession,
)
from flwr_smartsplit.memory.meter import unmetered
from flwr_smartsplit.split.build import build_chain, materialise, state_views
from flwr_smartsplit.split.segment import Segment
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.threads import torch_threads
from flwr_smartsplit.types import EdgeProfile, Receipt


@dataclass(frozen=True)
class _Sealed:
    """What is left of a session whose tail is on disk."""

    incarnation: str
    receipts: tuple[Receipt, ...]
    onward: EdgeLink | None


_UNLIMITED = EdgeProfile(name="")


class EdgeService:
    """Answer every request of ``edge.protocol``.

    Parameters
    ----------
    task : Task
        What the edge builds its segments from.
    spill_dir : Path
        Folder for held states and sealed tails; survives a restart of the edge.
    incarnation : str
        Names this life of the edge; requests of another life are refused.
    connect : Callable[[place, address], Transport]
        Reaches other edges, where routes go on.
    profile : EdgeProfile
        The budgets that its sessions share.

    Notes
    -----
    Safe for concurrent requests: those of one session run one after another.
    """

    def __init__(
        self,
        task: Task,
        *,
        spill_dir: Path,
        incarnation: str,
        connect: Connect = nowhere,
        profile: EdgeProfile = _UNLIMITED,
    ) -> None:
        self._task = task
        self._connect = connect
        self._chain = build_chain(task)
        self._spill = Spill(spill_dir)
        self._room = SessionRoom(task, profile, sealed=self._spill.tail_bytes())
        # Where memory is short, large parameters are stepped inside backward.
        self._is_lean = profile.memory_bytes is not None
        self._incarnation = incarnation
        self._sessions: dict[str, Session] = {}
        self._sealed: dict[str, _Sealed] = {}

    def handle(self, request: wire.Request[wire.ReplyT]) -> wire.ReplyT:
        """Answer one request, or raise an ``EdgeError``."""
        try:
            return cast(wire.ReplyT, self._answer(request))
        except OSError as error:
            raise EdgeError(
                f"this edge's disk failed ({error}): make room for held states and "
                "sealed tails, or name another spill_dir."
            ) from error

    @singledispatchmethod
    def _answer(self, request: Any) -> Any:
        raise TypeError(f"an edge cannot be asked {type(request).__name__}.")

    @_answer.register
    def _(self, request: wire.IsHeld) -> wire.Held:
        return wire.Held(self._incarnation, self._spill.holds(request.digest))

    @_answer.register
    def _(self, request: wire.HoldState) -> wire.Held:
        if state_digest(request.state) != request.digest:
            raise EdgeError(
                f"the state that came as {request.digest[:12]} has another digest: "
                "it changed on the way; send it again."
            )
        self._spill.hold(request.digest, request.state)
        return wire.Held(self._incarnation, True)

    @_answer.register
    def _(self, request: wire.OpenSession) -> wire.Opened:
        known = self._sessions.get(request.session)
        if known is not None and request.token and known.opened == request:
            return wire.Opened(known.incarnation)
        # Opening again starts over: whatever this session did before is void.
        self._room.open(request)
        self._sessions.pop(request.session, None)
        self._sealed.pop(request.session, None)
        self._spill.drop_tail(request.session)
        try:
            session = self._opened(request)
        except BaseException:
            self._room.free(request.session)
            raise
        self._sessions[request.session] = session
        return wire.Opened(session.incarnation)

    @_answer.register
    def _(
        self, request: wire.TrainStep | wire.ForwardStep | wire.BackwardStep
    ) -> wire.Stepped | wire.Forwarded | wire.Returned:
        with self._held(request) as session:
            self._fit(session, request)
            reply: wire.Stepped | wire.Forwarded | wire.Returned
            reply = self._void_on_error(session, lambda: session.answer(request))
            return reply

    @_answer.register
    def _(self, request: MoveCut) -> Moved:
        with self._held(request) as session:
            self._room.widen(session, request)
            self._require_open(session)
            make = partial(self._runner, session.opened)
            return self._void_on_error(
                session, lambda: session.move(request, self._chain, make)
            )

    @_answer.register
    def _(self, request: wire.EvaluateStep) -> wire.Evaluated:
        with self._held(request) as session:
            self._fit(session, request)
            return session.evaluate(request)

    @_answer.register
    def _(self, request: wire.EvaluateForward) -> wire.Forwarded:
        with self._held(request) as session:
            self._fit(session, request)
            return session.evaluate_forward(request)

    @_answer.register
    def _(self, request: wire.Seal) -> tuple[Receipt, ...]:
        try:
            with self._held(request) as session:
                return self._void_on_error(
                    session, lambda: self._seal(session, request)
                )
        except StaleSession:
            # It may have been sealed before, or while this one waited.
            known = self._sealed.get(request.session)
            if known is None or known.incarnation != request.incarnation:
                raise
            return known.receipts

    @_answer.register
    def _(self, request: wire.Abandon) -> None:
        name = request.session
        known = self._sessions.get(name) or self._sealed.get(name)
        if known is None or request.incarnation in ("", known.incarnation):
            self._forget(name)  # It is not a later opening's.
            if known is not None and known.onward is not None:
                known.onward.abandon_quietly()

    @_answer.register
    def _(self, request: wire.Commit) -> wire.Committed:
        self._spill.verify({e.session: e.digest for e in request.entries})
        weights = {entry.session: entry.weight for entry in request.entries}
        return wire.Committed(add_states(iterate_tails(self._spill, weights)))

    @_answer.register
    def _(self, request: wire.Release) -> None:
        for name, session in list(self._sessions.items()):
            if session.opened.round_number <= request.round_number:
                self._forget(name)
        self._sealed.clear()
        self._spill.release(request.round_number, request.keep_digest)
        self._room.recount(self._spill.tail_bytes())

    def _opened(self, request: wire.OpenSession) -> Session:
        """Build what a session trains, here and at the edges after this one."""
        with unmetered():  # The template's buffers are nobody's.
            names = self._chain.state_names(request.start, request.stop)
        state = self._spill.read_state(request.state_digest, names)
        segment = materialise(self._chain, request.start, request.stop, state)
        del state
        runner = self._runner(request, segment)
        onward = self._onward(request.onward)
        incarnation = f"{self._incarnation}{request.token}"
        return Session(request, incarnation, runner, onward)

    def _runner(self, opened: wire.OpenSession, segment: Segment) -> SegmentRunner:
        """Make a session's runner, at its opening or when its cut moves."""
        return SegmentRunner(
            segment,
            self._task,
            streams=UnitStreams(opened.seed, opened.round_number, opened.client_key),
            config=opened.config,
            is_trained=opened.is_trained,
            is_lean=self._is_lean,
        )

    def _onward(self, onward: wire.Onward | None) -> EdgeLink | None:
        """Open the session at the next edge, if the route goes on."""
        if onward is None:
            return None
        opening = onward.opening
        return EdgeLink(self._connect(opening.place, onward.address), opening)

    @contextmanager
    def _held(self, request: Any) -> Iterator[Session]:
        """Have a session to oneself, if it is still this opening's.

        Raises
        ------
        StaleSession
            If it is not.
        """
        name = request.session
        session = self._sessions.get(name)
        if session is None or session.incarnation != request.incarnation:
            raise self._stale(name, request.incarnation)
        with session.lock, torch_threads(session.opened.num_threads):
            if self._sessions.get(name) is not session:
                raise self._stale(name, request.incarnation)
            yield session

    def _fit(self, session: Session, request: Any) -> None:
        """Have room for a batch, which may take seconds to work out."""
        self._room.fit(session, request)
        self._require_open(session)

    def _require_open(self, session: Session) -> None:
        """Give room back that was taken for a session which has ended meanwhile.

        Raises
        ------
        StaleSession
            If it has.
        """
        name = session.opened.session
        current = self._sessions.get(name)
        if current is session:
            return
        if current is None:
            self._room.free(name)
        raise self._stale(name, session.incarnation)

    def _stale(self, name: str, incarnation: str) -> StaleSession:
        return StaleSession(
            f"session {name} of incarnation {incarnation!r} is not open at this edge "
            f"(incarnation {self._incarnation!r}): the edge restarted or the session "
            "ended. This client sits the round out.",
            session=name,
        )

    def _void_on_error(
        self, session: Session, do: Callable[[], wire.ReplyT]
    ) -> wire.ReplyT:
        """Void a session whose part failed, so that it can never be sealed."""
        try:
            return do()
        except RefusedMove:  # It is as it was.
            raise
        except Exception as error:
            self._void(session)
            if isinstance(error, EdgeFull):  # Of an edge further on, and too late.
                error.retry_after_seconds = None
            raise

    def _void(self, session: Session) -> None:
        """Forget a session, unless its name belongs to a later opening by now."""
        if self._sessions.get(session.opened.session) is session:
            self._forget(session.opened.session)
        if session.onward is not None:
            session.onward.abandon_quietly()

    def _seal(self, session: Session, request: wire.Seal) -> tuple[Receipt, ...]:
        opened = session.opened
        if session.num_steps != request.num_steps:
            raise RefusedTail(
                f"session {request.session}: the device counts {request.num_steps} "
                f"steps, the edge {session.num_steps}. The tail is not sealed."
            )
        session.finish(request.norm)
        after: tuple[Receipt, ...] = ()
        if session.onward is not None:
            after = session.onward.seal(request.num_steps, request.norm)
        # The session ends here: nothing changes them.
        state = state_views(session.runner.segment)
        broken = [name for name, a in state.items() if not np.isfinite(a).all()]
        if broken:
            raise RefusedTail(
                f"session {request.session}: not finite after {session.num_steps} "
                f"steps: {', '.join(broken)}. Lower the learning rate or clip the loss."
            )
        digest = self._spill.put_tail(request.session, opened.round_number, state)
        receipt = Receipt(
            place=opened.place,
            incarnation=self._incarnation,
            session=request.session,
            names=tuple(state),
            digest=digest,
            num_examples=session.num_examples,
            num_steps=session.num_steps,
            variant=opened.variant,
        )
        if self._sessions.get(request.session) is not session:
            # It was abandoned or opened again meanwhile; a later opening stays.
            self._spill.drop_tail(request.session)
            raise self._stale(request.session, request.incarnation)
        receipts = (receipt, *after)
        name, onward = request.session, session.onward
        self._sealed[name] = _Sealed(session.incarnation, receipts, onward)
        del self._sessions[name]
        self._room.seal(name)
        return receipts

    def _forget(self, name: str) -> None:
        self._sessions.pop(name, None)
        self._sealed.pop(name, None)
        self._spill.drop_tail(name)
        self._room.free(name)
