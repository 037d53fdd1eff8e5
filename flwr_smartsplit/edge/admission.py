"""Admission: reserves an edge's memory and disk for its sessions.

A session reserves all that it will ever need when it opens, so that none is refused in
the middle of a round, and nothing is swapped. No request waits here, because its thread
may be needed by the sessions it would wait for; a refusal says when to retry.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.edge.session import Session, StepRequest
from flwr_smartsplit.errors import EdgeFull, RefusedMove, bytes_text
from flwr_smartsplit.plan.coding import (
    codecs_at,
    coded_peak_bytes,
    coded_profile,
)
from flwr_smartsplit.plan.tail_memory import TailBytes, tail_bytes
from flwr_smartsplit.profile.forward_memory import dry_forward
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import (
    DEVICE,
    EDGE,
    ChainProfile,
    Codec,
    EdgeProfile,
    Route,
    Variant,
)

LEAST_WAIT_SECONDS, MOST_WAIT_SECONDS = 0.05, 5.0
_NOTHING = TailBytes(0, 0)
_Needed = tuple[int, int]  # Batch size and first unit
_UNKNOWN = (1, 0)
_Key = tuple[str, str]  # Run and session


@dataclass
class Ledger:
    """What the sessions of all runs at one edge have reserved."""

    open: dict[_Key, TailBytes] = field(default_factory=dict)
    since: dict[_Key, float] = field(default_factory=dict)
    sealed: dict[_Key, int] = field(default_factory=dict)  # Bytes of tails on disk
    usual_seconds: float = 0.0
    lock: Lock = field(default_factory=Lock)


class Admission:
    """Let a run's sessions open, grow and move within an edge's budgets, if any."""

    def __init__(
        self,
        task: Task,
        profile: EdgeProfile,
        *,
        sealed: Mapping[str, int],  # Bytes of the tails already on disk, by session
        clock: Callable[[], float] = time.monotonic,
        run: str = "",
        ledger: Ledger | None = None,  # That other runs share
    ) -> None:
        self._task = task
        self._name = profile.name
        self._budgets = (profile.memory_bytes, profile.disk_bytes)
        self.is_limited = self._budgets != (None, None)
        self._clock = clock
        self._run = run
        self._ledger = ledger or Ledger()
        self.recount(sealed)
        self._profiles: dict[tuple[int, int, Variant], ChainProfile] = {}
        self._needed: dict[str, _Needed] = {}
        self._shared: dict[str, str] = {}  # Names of copies, by session
        self._forwards: dict[tuple[int, tuple[int, ...], tuple[Codec, ...]], int] = {}

    def open(self, request: wire.OpenSession, *, shared_as: str = "") -> None:
        """Reserve all that a session will need, or raise ``EdgeFull``.

        Sessions that share a copy of their units also share what they reserve.
        """
        if shared_as:
            with self._ledger.lock:
                self._shared[request.session] = shared_as
        if self.is_limited:  # An unknown batch size counts as 1; ``fit`` reserves more.
            self._reserve_for(request, (request.batch_size or 1, request.start))

    def fit(self, session: Session, request: StepRequest) -> None:
        """Reserve what a larger batch or a moved cut needs, or raise ``EdgeFull``."""
        if not self.is_limited:
            return
        opened = session.opened
        before = self._needed.get(opened.session, _UNKNOWN)
        num_examples = getattr(request, "num_examples", 0) * request.part.count
        needed = max(before[0], num_examples), session.start
        if needed != before:
            self._reserve_for(opened, needed)

    def widen(self, session: Session, request: MoveCut) -> None:
        """Reserve what a move needs, and keep what undoing it needs.

        Raises ``RefusedMove`` if the arriving units do not fit.
        """
        opened = session.opened
        if not self.is_limited or not 0 < request.start < opened.stop:
            return
        batch_size, _ = self._needed.get(opened.session, _UNKNOWN)
        need = self._need(opened, (batch_size, request.start))
        try:
            self.reserve(opened.session, need, keeps=True)
        except EdgeFull as error:
            raise RefusedMove(
                f"session {opened.session} cannot begin at {request.start} instead of "
                f"{session.start}: {error}"
            ) from error
        # Until the next step, the units may come back.
        self._needed[opened.session] = (batch_size, 0)

    def _reserve_for(self, opened: wire.OpenSession, needed: _Needed) -> None:
        need, name = self._need(opened, needed), opened.session
        shared = self._shared.get(name)
        try:
            self.reserve(shared or name, need, keeps=shared is not None)
        except EdgeFull:
            if name not in self._needed:
                self._shared.pop(name, None)
            raise
        self._needed[name] = needed

    def _need(self, opened: wire.OpenSession, needed: _Needed) -> TailBytes:
        """Predict what a session needs, by a dry run of the task."""
        if opened.predicts:
            return TailBytes(self._forward_bytes(opened, needed[0]), 0)
        batch_size, start = needed
        kind = batch_size, opened.accumulate, opened.variant.leading()
        if kind not in self._profiles:
            task = replace(self._task, accumulate=opened.accumulate)
            self._profiles[kind] = profile_of(
                task, batch_size=batch_size, variant=opened.variant
            )
        profile, size = self._profiles[kind], len(self._profiles[kind].units)
        if opened.codecs:
            ends = {start: opened.codecs[0]}
            if opened.stop < size:
                ends[opened.stop] = opened.codecs[1]
            profile = coded_profile(profile, codecs_at(size, ends))
        need = tail_bytes(profile, start, opened.stop)
        return need if opened.is_trained else need._replace(disk_bytes=0)

    def _forward_bytes(self, opened: wire.OpenSession, batch_size: int) -> int:
        """Predict what a copy of units takes that predicts."""
        start, stop = opened.start, opened.stop
        cuts = (start, stop) if stop < len(build_chain(self._task)) else (start,)
        codecs = opened.codecs[: len(cuts)]
        kind = batch_size, cuts, codecs
        if kind not in self._forwards:
            route = Route(cuts, (DEVICE, EDGE, DEVICE)[: len(cuts) + 1])
            found = dry_forward(self._task, route, batch_size=batch_size, place=EDGE)
            peak = coded_peak_bytes(found.peak_bytes, found.crossings, codecs)
            # When it opens, its state is there twice: read, and built.
            self._forwards[kind] = max(peak, 2 * found.state_bytes)
        return self._forwards[kind]

    def reserve(self, session: str, need: TailBytes, *, keeps: bool = False) -> None:
        """Replace a session's reservation, or keep it and raise ``EdgeFull``."""
        ledger, key = self._ledger, (self._run, session)
        with ledger.lock:
            if keeps:  # The larger of both is reserved.
                need = TailBytes(*map(max, ledger.open.get(key, _NOTHING), need))
            self._check(key, need)
            ledger.open[key] = need
            ledger.since.setdefault(key, self._clock())
            ledger.sealed.pop(key, None)

    def seal(self, session: str) -> None:
        """Free a session's memory; its tail stays on disk."""
        ledger, key = self._ledger, (self._run, session)
        with ledger.lock:
            need = ledger.open.pop(key, None)
            if need is not None:
                ledger.sealed[key] = need.disk_bytes
                self._note_end(key)

    def free(self, session: str) -> None:
        """Free all that a session reserved, unless others share it."""
        ledger = self._ledger
        self._needed.pop(session, None)
        with ledger.lock:
            shared = self._shared.pop(session, None)
            if shared in self._shared.values():
                return
            key = self._run, shared or session
            ledger.sealed.pop(key, None)
            if ledger.open.pop(key, None) is not None:
                self._note_end(key)

    def recount(self, sealed: Mapping[str, int]) -> None:
        """Update what is on disk, after a round's tails were deleted."""
        mine = {(self._run, session): size for session, size in sealed.items()}
        with self._ledger.lock:
            kept = {k: v for k, v in self._ledger.sealed.items() if k[0] != self._run}
            self._ledger.sealed = kept | mine

    def _check(self, key: _Key, need: TailBytes) -> None:
        ledger = self._ledger
        others = [held for name, held in ledger.open.items() if name != key]
        sealed = sum(size for name, size in ledger.sealed.items() if name != key)
        used = (
            sum(held.memory_bytes for held in others),
            sum(held.disk_bytes for held in others) + sealed,
        )
        for kind, budget, needed, so_far, stays in zip(
            ("memory", "disk"), self._budgets, need, used, (0, sealed), strict=True
        ):
            if budget is None or needed <= budget - so_far:
                continue
            # What is sealed stays until the round ends; open sessions end before.
            retry = self._wait_seconds() if needed <= budget - stays else None
            advice = (
                "Cut later, use another edge, or raise its budget."
                if retry is None
                else f"Ask again in {retry:.2f} s, or use another edge."
            )
            raise EdgeFull(
                f"edge {self._name!r} has {bytes_text(max(budget - so_far, 0))} of its "
                f"{bytes_text(budget)} of {kind} left beside {len(ledger.open)} open "
                f"and {len(ledger.sealed)} sealed sessions; one more needs "
                f"{bytes_text(needed)}. {advice}",
                needed_bytes=needed,
                free_bytes=budget - so_far,
                budget_bytes=budget,
                retry_after_seconds=retry,
            )

    def _wait_seconds(self) -> float:
        """Predict when the next open session ends, from those that ended."""
        seconds = self._ledger.usual_seconds / max(len(self._ledger.open), 1)
        return min(max(seconds, LEAST_WAIT_SECONDS), MOST_WAIT_SECONDS)

    def _note_end(self, key: _Key) -> None:
        lasted = self._clock() - self._ledger.since.pop(key)
        usual = self._ledger.usual_seconds or lasted
        self._ledger.usual_seconds = usual / 2 + lasted / 2
