"""EdgeService: hosts the rest of each client's model, and knows no network.

Every client trains its own replica of its tail. ``Seal`` checks it, writes it to
disk and frees it; ``Commit`` merges exactly the sealed tails the strategy names.
Until then nothing a client does can touch another one, or the global model.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import singledispatchmethod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from flwr_smartsplit.errors import (
    EdgeError,
    OutOfOrderStep,
    RefusedTail,
    StaleSession,
)
from flwr_smartsplit.model.building import build_chain, materialise, state_of
from flwr_smartsplit.model.segment import Batch, SegmentRunner
from flwr_smartsplit.policy.merging import add_states
from flwr_smartsplit.runtime import transport as wire
from flwr_smartsplit.runtime.randomness import UnitStreams
from flwr_smartsplit.runtime.spill import Spill, iterate_tails
from flwr_smartsplit.runtime.threads import torch_threads
from flwr_smartsplit.runtime.wire import WireTensor, state_digest
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import Receipt


@dataclass
class _Session:
    """One client's replica of its tail, while it trains."""

    opened: wire.OpenSession
    incarnation: str
    runner: SegmentRunner
    num_steps: int = 0
    num_examples: int = 0
    last_checksum: int = 0
    last_reply: wire.Stepped | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _Sealed:
    """What is left of a session whose tail is on disk."""

    incarnation: str
    receipt: Receipt


class EdgeService:
    """Answer every request of ``runtime.transport``.

    Parameters
    ----------
    task : Task
        What the edge builds its segments from.
    spill_dir : Path
        Folder for held states and sealed tails; survives a restart of the edge.
    incarnation : str
        Names this life of the edge; requests of another life are refused.

    Notes
    -----
    Safe for concurrent requests: those of one session run one after another.
    """

    def __init__(self, task: Task, *, spill_dir: Path, incarnation: str) -> None:
        self._task = task
        self._chain = build_chain(task)
        self._spill = Spill(spill_dir)
        self._incarnation = incarnation
        self._sessions: dict[str, _Session] = {}
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
        names = self._chain.state_names(request.start, request.stop)
        state = self._spill.read_state(request.state_digest, names)
        segment = materialise(self._chain, request.start, request.stop, state)
        streams = UnitStreams(request.seed, request.round_number, request.client_key)
        runner = SegmentRunner(segment, self._task, streams=streams)
        # Opening again starts over: whatever this session did before is void.
        self._forget(request.session)
        incarnation = f"{self._incarnation}{request.token}"
        self._sessions[request.session] = _Session(request, incarnation, runner)
        return wire.Opened(incarnation)

    @_answer.register
    def _(self, request: wire.TrainStep) -> wire.Stepped:
        checksum = 0
        for tensor in (request.boundary, *request.context, request.targets):
            checksum = tensor.checksum(checksum)
        with self._held(request) as session:
            is_repeated = request.step == session.num_steps - 1
            if is_repeated and checksum == session.last_checksum:
                return cast(wire.Stepped, session.last_reply)
            if request.step != session.num_steps:
                self._void(session)
                raise OutOfOrderStep(
                    f"session {request.session}: step {request.step} "
                    f"{'was changed' if is_repeated else 'came'} after "
                    f"{session.num_steps} steps. The session is void: this client "
                    "sits the round out.",
                    step=request.step,
                    num_steps=session.num_steps,
                )
            session.last_reply = self._void_on_error(
                session, lambda: _train(session, request)
            )
            session.last_checksum = checksum
            session.num_steps += 1
            session.num_examples += request.targets.shape[0]
            return session.last_reply

    @_answer.register
    def _(self, request: wire.EvaluateStep) -> wire.Evaluated:
        with self._held(request) as session, torch.no_grad():
            outputs = session.runner.evaluate(_entering(request))
            targets = request.targets.unpack()
            loss = self._task.loss_fn(outputs, targets)
            metrics = self._task.metrics_fn
            return wire.Evaluated(
                loss=float(loss),
                metrics=dict(metrics(outputs, targets)) if metrics else {},
            )

    @_answer.register
    def _(self, request: wire.Seal) -> Receipt:
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
            return known.receipt

    @_answer.register
    def _(self, request: wire.Abandon) -> None:
        session = self._sessions.get(request.session)
        sealed = self._sealed.get(request.session)
        for known in (session, sealed):
            if known is not None and request.incarnation not in ("", known.incarnation):
                return  # Another opening's.
        self._forget(request.session)

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

    @contextmanager
    def _held(
        self, request: wire.TrainStep | wire.EvaluateStep | wire.Seal
    ) -> Iterator[_Session]:
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

    def _stale(self, name: str, incarnation: str) -> StaleSession:
        return StaleSession(
            f"session {name} of incarnation {incarnation!r} is not open at this edge "
            f"(incarnation {self._incarnation!r}): the edge restarted or the session "
            "ended. This client sits the round out.",
            session=name,
        )

    def _void_on_error(
        self, session: _Session, do: Callable[[], wire.ReplyT]
    ) -> wire.ReplyT:
        """Void a session whose part failed, so that it can never be sealed."""
        try:
            return do()
        except Exception:
            self._void(session)
            raise

    def _void(self, session: _Session) -> None:
        """Forget a session, unless its name belongs to a later opening by now."""
        if self._sessions.get(session.opened.session) is session:
            self._forget(session.opened.session)

    def _seal(self, session: _Session, request: wire.Seal) -> Receipt:
        opened = session.opened
        if session.num_steps != request.num_steps:
            raise RefusedTail(
                f"session {request.session}: the device counts {request.num_steps} "
                f"steps, the edge {session.num_steps}. The tail is not sealed."
            )
        state = state_of(session.runner.segment)
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
        )
        if self._sessions.get(request.session) is not session:
            # It was abandoned or opened again meanwhile; a later opening stays.
            self._spill.drop_tail(request.session)
            raise self._stale(request.session, request.incarnation)
        self._sealed[request.session] = _Sealed(session.incarnation, receipt)
        del self._sessions[request.session]
        return receipt

    def _forget(self, name: str) -> None:
        self._sessions.pop(name, None)
        self._sealed.pop(name, None)
        self._spill.drop_tail(name)


def _entering(request: wire.TrainStep | wire.EvaluateStep) -> Batch:
    """Make the boundary that enters a tail, with its context if it has one."""
    tensors = (request.boundary, *request.context)
    values = tuple(tensor.unpack() for tensor in tensors)
    return values if request.context else values[0]


def _train(session: _Session, request: wire.TrainStep) -> wire.Stepped:
    loss, gradient = session.runner.finish(
        _entering(request),
        request.targets.unpack(),
        step=request.step,
        inputs_are_boundary=True,
    )
    if gradient is None:
        raise RuntimeError("the tail gave its boundary no gradient.")
    return wire.Stepped(loss=float(loss), gradient=WireTensor.pack(gradient))
