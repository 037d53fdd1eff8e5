"""EdgeGate: answers each request to an edge, if whoever asks may ask it.

There are two roles. The strategy of a run has a secret, and may do anything within its
run. A client has nothing but what its plan brings: it opens what the strategy signed,
once, and goes on with the secret that the opening returned.

Each run has its own service, folder and states, so no run sees another one. All share
the edge's budgets.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from hmac import compare_digest
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.admission import Ledger
from flwr_smartsplit.edge.client import Connect, nowhere
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.edge.gate.rules import (
    Arriving,
    check_commit,
    check_move,
    check_opening,
    check_seal,
    check_state,
    check_step,
    is_over,
    most_move_bytes,
    most_state_bytes,
)
from flwr_smartsplit.edge.gate.run_keys import Run, not_for_clients, secret_digest
from flwr_smartsplit.edge.message_bytes import MAX_HEAD_BYTES
from flwr_smartsplit.edge.service import UNLIMITED, EdgeService
from flwr_smartsplit.edge.session import Session
from flwr_smartsplit.errors import (
    EdgeError,
    RefusedRequest,
    SmartSplitError,
    StaleSession,
)
from flwr_smartsplit.memory.meter import unmetered
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.torch_device import CPU
from flwr_smartsplit.types import EdgeProfile

STRANGERS_BYTES = 2**18  # Of a request by whoever has no secret: openings are smaller
_RUN = "run.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Whose runs an edge takes, and for how long it waits for their strategies.

    Without an admin secret, the first run that begins owns the edge, and nobody is
    asked for anything before: whoever started it in this process or cluster is alone.
    """

    admin_digest: bytes | None = None  # SHA-256 of the secret that begins runs
    max_runs: int = 8
    lease_seconds: float | None = None  # A run of which nobody is heard so long ends
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class Load:
    """What the runs at one edge take together."""

    num_runs: int
    num_sessions: int
    reserved_bytes: int  # Of memory, where the edge has a limit of it


@dataclass
class _Held:
    """One run at this edge."""

    run: Run
    service: EdgeService
    heard: float  # When its strategy or one of its clients last asked something
    released: int = 0  # The last phase that is over
    answers: dict[str, tuple[wire.OpenSession, wire.Opened]] = field(
        default_factory=dict
    )
    locks: dict[str, Lock] = field(default_factory=dict)


class EdgeGate:
    """Answer every request to an edge; the arguments are those of its services."""

    def __init__(  # noqa: PLR0913 - those of a service, and whose runs it takes
        self,
        task: Task,
        *,
        spill_dir: Path,
        incarnation: str,
        connect: Connect = nowhere,
        profile: EdgeProfile = UNLIMITED,
        device: torch.device = CPU,
        terms: Terms = Terms(),
    ) -> None:
        self._service = partial(
            EdgeService,
            task,
            incarnation=incarnation,
            connect=connect,
            profile=profile,
            device=device,
            ledger=(ledger := Ledger()),
        )
        self._ledger = ledger
        self._profile = profile
        self._folder = spill_dir
        self._terms = terms
        self._lock = Lock()
        self._runs: dict[str, _Held] = {}
        self._is_private = terms.admin_digest is None
        for path in spill_dir.glob(f"*/{_RUN}"):  # Those of an earlier life.
            facts = json.loads(path.read_text("utf-8"))
            num_states = int(facts.pop("num_states", 2))
            known = {name: bytes.fromhex(text) for name, text in facts.items()}
            self._take(Run(path.parent.name, **known, num_states=num_states))

    def handle(self, request: Any) -> Any:
        """Return the reply to a request, or raise an ``EdgeError``."""
        self.end_silent_runs()
        if self._is_private and not isinstance(request, wire.Hello | wire.OpenSigned):
            return self._private.handle(request)
        try:
            return self._answer(request)
        except SmartSplitError:
            raise
        except Exception as error:
            _log.exception("an edge failed at a %s", type(request).__name__)
            raise EdgeError(
                f"the edge failed at a {type(request).__name__} "
                f"({type(error).__name__}: {error}): the session is void."
            ) from error

    def _answer(self, request: Any) -> Any:
        match request:
            case wire.Hello():
                return self._begin(request)
            case wire.OpenSigned():
                return self._open(request)
            case wire.StrategyRequest():
                return self._ask(request)
            case wire.Forward() | wire.Backward() | MoveCut() | wire.Seal():
                return self._go_on(request)
            case wire.Abandon():
                return self._abandon(request)
        raise not_for_clients(request)

    @cached_property
    def _private(self) -> EdgeService:
        """The service of an edge in which no run has begun."""
        return self._service(spill_dir=self._folder)

    # --- the strategy ---------------------------------------------------------------

    def _begin(self, request: wire.Hello) -> wire.Welcome:
        run, admin = Run.of(request), self._terms.admin_digest
        found = secret_digest(request.access)
        if admin is not None and not compare_digest(found, admin):
            raise RefusedRequest(
                "a run begins here with the edge's admin secret, and not with this "
                "one: give the strategy the secret of this edge."
            )
        offer = wire.Welcome(self._profile.memory_bytes, self._profile.disk_bytes)
        with self._lock:
            known = self._runs.get(run.name)
            if known is not None and known.run == run:  # The request was repeated.
                return offer
            max_runs = 1 if admin is None else self._terms.max_runs
            if known is not None or len(self._runs) >= max_runs:
                raise RefusedRequest(
                    f"{len(self._runs)} runs of {max_runs} have begun at this edge, "
                    "maybe under this very name: use another edge, or wait."
                )
            _remember(run, self._folder / run.name)
            self._take(run)
        return offer

    def _take(self, run: Run) -> None:
        self._is_private = False
        service = self._service(spill_dir=self._folder / run.name, run=run.name)
        self._runs[run.name] = _Held(run, service, heard=self._terms.clock())

    def _ask(self, request: wire.StrategyRequest[Any]) -> Any:
        held = self._runs.get(request.access.partition(":")[0])
        if held is None:
            raise not_for_clients(request)
        held.run.check_access(request)
        held.heard = self._terms.clock()
        store, chain = held.service.store, held.service.chain
        match request:
            case wire.Commit():
                check_commit(request)
            case wire.HoldState():
                others = store.held_bytes(without=request.digest)
                kinds = chain.under(request.variant).kinds_of(request.state)
                most = held.run.num_states
                check_state(request, kinds, held_bytes=others, num_states=most)
            case wire.Release():
                self._end_phase(held, request.phase)
            case wire.EndRun():
                return self._end(held)
        return held.service.handle(request)

    def _end_phase(self, held: _Held, phase: int) -> None:
        """Forget who opened what in phases that are over."""
        held.released = max(held.released, phase)
        for digest, (opening, _) in list(held.answers.items()):
            if is_over(opening, held.released):
                held.answers.pop(digest, None)
                held.locks.pop(digest, None)

    # --- clients --------------------------------------------------------------------

    def _open(self, request: wire.OpenSigned) -> wire.Opened:
        """Open a session once; a used opening gets the same answer again.

        Where a session only predicts, it may be opened again once it has ended: its
        device was away, and nothing counts its batches.
        """
        held = self._runs.get(request.run)
        if held is None:
            raise StaleSession(
                f"run {request.run:.40} has not begun at this edge, or is over: the "
                "edge restarted. This client sits the round out.",
                session="",
            )
        opening = held.run.read(request)
        check_opening(opening, place=self._profile.name, released=held.released)
        held.heard = self._terms.clock()
        digest = secret_digest(request.opening.hex()).hex()
        with held.locks.setdefault(digest, Lock()):
            known = held.answers.get(digest)
            if known is None or (opening.predicts and self._is_gone(held, known)):
                known = opening, held.service.handle(request)
                held.answers[digest] = known
        return known[1]

    @staticmethod
    def _is_gone(held: _Held, known: tuple[wire.OpenSession, wire.Opened]) -> bool:
        """Say whether a session ended; if it only predicts, it may open again."""
        opening, opened = known
        return not held.service.sessions.knows(opening.session, opened.incarnation)

    def _go_on(
        self, request: wire.Forward | wire.Backward | MoveCut | wire.Seal
    ) -> Any:
        """Answer a request of a session, if it is what the session is for."""
        held = self._run_of(request.session, request.incarnation)
        service = held.service
        ask: Callable[[Any], Any] = service.handle
        session = service.sessions.session_of(request.session, request.incarnation)
        if session is not None:
            held.heard, opening = self._terms.clock(), session.opened
            if isinstance(request, wire.Forward | wire.Backward):
                check_step(request, opening, session.num_examples)
            elif isinstance(request, MoveCut):
                chain = service.chain.under(opening.variant)
                coming = arriving(chain, request.start, session.start)
                check_move(request, opening, session.start, coming)
            else:
                check_seal(opening)
        return ask(request)

    def _abandon(self, request: wire.Abandon) -> None:
        service = self._run_of(request.session, request.incarnation).service
        if not service.sessions.knows(request.session, request.incarnation):
            raise self._stale(request.session)
        service.handle(request)

    def _run_of(self, session: str, incarnation: str) -> _Held:
        held = self._runs.get(incarnation.partition(":")[0])
        if held is None:
            raise self._stale(session)
        return held

    def _stale(self, session: str) -> StaleSession:
        return StaleSession(
            f"session {session:.400} is not open at this edge, or not to this "
            "requester: the edge restarted, or the session or its run ended.",
            session=session,
        )

    # --- for the hosts --------------------------------------------------------------

    def load(self) -> Load:
        """Say what all runs take now."""
        held = list(self._runs.values())
        services = [each.service for each in held]
        if self._is_private:
            services.append(self._private)
        with self._ledger.lock:
            reserved = sum(need.memory_bytes for need in self._ledger.open.values())
        sessions = sum(len(service.sessions) for service in services)
        return Load(len(held), sessions, reserved)

    def most_bytes(self, secret: str) -> int:
        """Say how large a request may be from whoever has this secret, or none.

        A host that knows it takes no memory for what is larger.
        """
        held = self._runs.get(secret.partition(":")[0])
        if self._is_private:
            return most_state_bytes(self._private.chain.kinds) + MAX_HEAD_BYTES
        if held is not None and held.run.is_access(secret):
            return most_state_bytes(held.service.chain.kinds) + MAX_HEAD_BYTES
        session = self.session_of(secret)
        limits = None if session is None else session.opened.limits
        if held is None or session is None or limits is None:
            return STRANGERS_BYTES
        most = limits.step_bytes
        if session.opened.is_trained and limits.least_start < session.start:
            chain = held.service.chain.under(session.opened.variant)
            coming = arriving(chain, limits.least_start, session.start)
            most = max(most, most_move_bytes(coming))
        return most + STRANGERS_BYTES

    def session_of(self, secret: str) -> Session | None:
        """Return the open session that a client has this secret of, if any."""
        held = self._runs.get(secret.partition(":")[0])
        service = self._private if self._is_private else held and held.service
        return service.sessions.opened_with(secret) if service else None

    def end_silent_runs(self) -> None:
        """End the runs of which nobody has been heard for a lease."""
        lease, now = self._terms.lease_seconds, self._terms.clock()
        if lease is None:
            return
        for held in list(self._runs.values()):
            if now - held.heard > lease:
                self._end(held)

    def _end(self, held: _Held) -> None:
        with self._lock:
            self._runs.pop(held.run.name, None)
        held.service.close()
        shutil.rmtree(self._folder / held.run.name, ignore_errors=True)


def _remember(run: Run, folder: Path) -> None:
    """Write down how to recognise a run's strategy: the edge may restart."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = {
        "public_key": run.public_key.hex(),
        "secret_digest": run.secret_digest.hex(),
        "num_states": str(run.num_states),
    }
    unfinished = folder / f"{_RUN}.unfinished"
    unfinished.write_text(json.dumps(facts), "utf-8")
    unfinished.replace(folder / _RUN)


def arriving(chain: Chain, start: int, stop: int) -> Arriving:
    """Say what units ``[start, stop)`` that come to the edge must be like."""
    if not 0 < start < stop:  # None, or a move that the session refuses.
        return Arriving({}, frozenset(), 0)
    with unmetered():
        part = chain.segment(start, stop)
        saved = part.state_dict(keep_vars=True)
        buffers = {name for name, _ in part.named_buffers(remove_duplicate=False)}
    size = sum(tensor.nbytes for tensor in saved.values())
    kinds = {name: chain.kinds[name] for name in saved}
    return Arriving(kinds, frozenset(buffers - saved.keys()), size)
