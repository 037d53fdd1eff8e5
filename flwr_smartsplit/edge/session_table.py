"""SessionTable: an edge's open and sealed sessions."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hmac import compare_digest

import numpy as np

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.admission import Admission
from flwr_smartsplit.edge.client import EdgeClient
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.edge.regions import cut_state
from flwr_smartsplit.edge.session import Session, StepRequest
from flwr_smartsplit.edge.state_store import StateStore
from flwr_smartsplit.edge.weighted_mean import has_diverged
from flwr_smartsplit.errors import EdgeFull, RefusedMove, RefusedTail, StaleSession
from flwr_smartsplit.split.build import check_unsent, state_views
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.train.threads import torch_threads
from flwr_smartsplit.types import Receipt


def is_same(one: str, other: str) -> bool:
    """Compare secrets in a time that tells nothing of them."""
    pair = (text.encode(errors="surrogatepass") for text in (one, other))
    return compare_digest(*pair)


@dataclass(frozen=True)
class _Sealed:
    """What remains in memory of a sealed session."""

    incarnation: str
    round_number: int
    receipts: tuple[Receipt, ...]
    onward: EdgeClient | None


class SessionTable:
    """Keep an edge's sessions, each for one opening and one request at a time."""

    def __init__(
        self, store: StateStore, admission: Admission, *, incarnation: str
    ) -> None:
        self._store = store
        self._admission = admission
        self._incarnation = incarnation
        self._open: dict[str, Session] = {}
        self._sealed: dict[str, _Sealed] = {}

    def opened_by(self, request: wire.OpenSession) -> Session | None:
        """Return the session that this very request opened before, if any."""
        known = self._open.get(request.session)
        is_it = known is not None and request.token and known.opened == request
        return known if is_it else None

    def open(
        self,
        request: wire.OpenSession,
        build: Callable[[], Session],
        *,
        shared_as: str = "",  # The copy of its units that it shares; see replicas.py
    ) -> Session:
        """Open a session; an earlier one of its name, sealed or not, is void."""
        name = request.session
        self._admission.open(request, shared_as=shared_as)
        self._open.pop(name, None)
        self._sealed.pop(name, None)
        self._store.drop_tail(name)
        try:
            session = build()
        except BaseException:
            self._admission.free(name)
            raise
        self._open[name] = session
        return session

    def session_of(self, name: str, incarnation: str) -> Session | None:
        """Return an open session, if this is its secret."""
        known = self._open.get(name)
        return known if known and is_same(known.incarnation, incarnation) else None

    def knows(self, name: str, incarnation: str) -> bool:
        """Say whether this is the secret of an open or sealed session."""
        known = self._open.get(name) or self._sealed.get(name)
        return known is not None and is_same(known.incarnation, incarnation)

    def __len__(self) -> int:
        """Count the open sessions."""
        return len(self._open)

    def opened_with(self, incarnation: str) -> Session | None:
        """Return the open session of this secret, if any."""
        sessions = list(self._open.values())
        return next((s for s in sessions if is_same(s.incarnation, incarnation)), None)

    @contextmanager
    def held(self, request: StepRequest | MoveCut | wire.Seal) -> Iterator[Session]:
        """Lock a request's session, or raise ``StaleSession`` if it is not open."""
        session = self._open.get(request.session)
        if session is None or session.incarnation != request.incarnation:
            raise self._stale(request.session, request.incarnation)
        with session.lock, torch_threads(session.opened.num_threads):
            if self._open.get(request.session) is not session:
                raise self._stale(request.session, request.incarnation)
            yield session

    @contextmanager
    def void_on_error(self, session: Session) -> Iterator[None]:
        """Void a session after an error, so that it can never be sealed."""
        try:
            yield
        except RefusedMove:  # The session is unchanged.
            raise
        except Exception as error:
            if not session.opened.is_trained:  # A retry is harmless.
                raise
            if self._open.get(session.opened.session) is session:
                self.forget(session.opened.session)  # Not a later opening.
            if session.onward is not None:
                session.onward.abandon()
            if isinstance(error, EdgeFull):  # A later edge is full; do not retry.
                error.retry_after_seconds = None
            raise

    def require_open(self, session: Session) -> None:
        """Raise ``StaleSession`` if a session ended meanwhile; free its reservation."""
        name = session.opened.session
        current = self._open.get(name)
        if current is session:
            return
        if current is None:
            self._admission.free(name)
        raise self._stale(name, session.incarnation)

    def seal(
        self, session: Session, request: wire.Seal, chain: Chain
    ) -> tuple[Receipt, ...]:
        """Finish a session here and at later edges, write its tail, and close it.

        ``chain`` is the whole model's. The tail is what training can change of the
        session's units. Raises ``RefusedTail`` if it is not finite or the steps do not
        agree with the device's, and ``StaleSession`` if the session ended meanwhile.
        """
        name, opened = request.session, session.opened
        if session.num_steps != request.num_steps:
            raise RefusedTail(
                f"session {name}: the device counts {request.num_steps} "
                f"steps, the edge {session.num_steps}. The tail is not sealed."
            )
        session.finish(request.norm)
        after: tuple[Receipt, ...] = ()
        if session.onward is not None:
            after = session.onward.seal(request.num_steps, request.norm)
        state = self._tail(session, chain)
        receipt = Receipt(
            place=opened.place,
            incarnation=self._incarnation,
            session=name,
            names=tuple(state),
            digest=self._store.put_tail(name, opened.round_number, state),
            num_examples=session.num_examples,
            num_steps=session.num_steps,
            variant=opened.variant,
        )
        if self._open.get(name) is not session:  # A later opening stays.
            self._store.drop_tail(name)
            raise self._stale(request.session, request.incarnation)
        receipts = (receipt, *after)
        self._sealed[name] = _Sealed(
            session.incarnation, opened.round_number, receipts, session.onward
        )
        del self._open[name]
        self._admission.seal(name)
        return receipts

    def _tail(self, session: Session, chain: Chain) -> State:
        """Show what training can change of a session's units, if it is finite."""
        # Views suffice: nothing changes the segment any more.
        views = state_views(session.runner.segment)
        variant = session.opened.variant
        changed = chain.under(variant).changed_names(session.start, session.opened.stop)
        check_unsent(session.runner.segment, changed)
        state = {name: views[name] for name in changed}
        broken = tuple(name for name, a in state.items() if not np.isfinite(a).all())
        if broken:  # An infinite constant may have been so before.
            digest = session.opened.state_digest
            regions = chain.regions(variant, of=self._store.variant_of(digest))
            before = cut_state(self._store.read_state(digest, broken), regions)
            broken = tuple(n for n in broken if has_diverged(state[n], before[n]))
        if broken:
            raise RefusedTail(
                f"session {session.opened.session}: not finite after "
                f"{session.num_steps} steps: {', '.join(broken)}. Lower the learning "
                "rate or clip the loss."
            )
        return state

    def sealed_by(self, request: wire.Seal) -> tuple[Receipt, ...] | None:
        """Return the receipts of a session that was sealed before, if any."""
        known = self._sealed.get(request.session)
        if known is None or known.incarnation != request.incarnation:
            return None
        return known.receipts

    def abandon(self, request: wire.Abandon) -> None:
        """Delete a session here and at later edges, unless it was opened again."""
        known = self._open.get(request.session) or self._sealed.get(request.session)
        if known is None or request.incarnation in ("", known.incarnation):
            self.forget(request.session)
            if known is not None and known.onward is not None:
                known.onward.abandon()

    def release(self, round_number: int, ended: Iterable[str] = ()) -> None:
        """Delete this round's and earlier sessions, and those that ended later.

        A sealed one of a later round stays known: it may be asked to seal again.
        """
        for name, session in list(self._open.items()):
            if session.opened.round_number <= round_number:
                self.forget(name)
        for name, sealed in list(self._sealed.items()):
            if sealed.round_number <= round_number:
                self._sealed.pop(name, None)
        for name in ended:
            self.forget(name)

    def close(self) -> None:
        """Delete all sessions."""
        for name in (*self._open, *self._sealed):
            self.forget(name)
        self._admission.recount({})

    def forget(self, name: str) -> None:
        """Delete a session and its tail, and free what it reserved."""
        self._open.pop(name, None)
        self._sealed.pop(name, None)
        self._store.drop_tail(name)
        self._admission.free(name)

    def _stale(self, name: str, opening: str) -> StaleSession:
        shown = opening.partition(":")[0]  # What follows is a secret.
        return StaleSession(
            f"session {name:.400} of incarnation {shown!r:.40} is not open at this "
            f"edge (incarnation {self._incarnation!r}): the edge restarted or the "
            "session ended. This client sits the round out.",
            session=name,
        )
