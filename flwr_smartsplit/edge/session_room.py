"""SessionRoom: how much room a session needs, from its opening to its seal."""

from collections.abc import Mapping
from typing import Any

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.admission import Room
from flwr_smartsplit.edge.moving import MoveCut
from flwr_smartsplit.edge.session import Session
from flwr_smartsplit.errors import EdgeFull, RefusedMove
from flwr_smartsplit.plan.tail_memory import TailBytes, tail_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ChainProfile, EdgeProfile

_Needed = tuple[int, int]
"""Batch size and first unit."""
_UNKNOWN = (1, 0)


class SessionRoom:
    """Take room for sessions as they open, grow and move; none if nothing is limited.

    Parameters
    ----------
    task : Task
        What is trained; its dry run says what a session takes.
    profile : EdgeProfile
        The budgets.
    sealed : Mapping[str, int]
        Bytes of the tails that are on disk already, by session.
    """

    def __init__(
        self, task: Task, profile: EdgeProfile, *, sealed: Mapping[str, int]
    ) -> None:
        self._task = task
        self._room = Room(profile, sealed=sealed)
        self._profiles: dict[int, ChainProfile] = {}
        self._needed: dict[str, _Needed] = {}
        self.seal = self._room.seal
        self.recount = self._room.recount

    def open(self, request: wire.OpenSession) -> None:
        """Take all that a session will need, or say when to ask again.

        A device that does not know its batch size is taken at one example, and given
        more room at its first batch.

        Raises
        ------
        EdgeFull
            If there is not so much.
        """
        if self._room.is_limited:
            self._take(request, (request.batch_size or 1, request.start))

    def fit(self, session: Session, request: Any) -> None:
        """Have as much room as a batch needs, where the cut is by now.

        Raises
        ------
        EdgeFull
            If the batch is larger than those before, and there is no room for it.
        """
        if not self._room.is_limited:
            return
        opened = session.opened
        before = self._needed.get(opened.session, _UNKNOWN)
        num_examples = max(before[0], wire.num_examples_of(request))
        if (num_examples, session.start) != before:
            self._take(opened, (num_examples, session.start))

    def widen(self, session: Session, request: MoveCut) -> None:
        """Have room for a move, and still for the way back.

        Raises
        ------
        RefusedMove
            If the units that would come do not fit.
        """
        opened = session.opened
        if not self._room.is_limited or not 0 < request.start < opened.stop:
            return
        batch_size, _ = self._needed.get(opened.session, _UNKNOWN)
        try:
            self._room.widen(
                opened.session, self._need(opened, (batch_size, request.start))
            )
        except EdgeFull as error:
            raise RefusedMove(
                f"session {opened.session} cannot begin at {request.start} instead of "
                f"{session.start}: {error}"
            ) from error
        # The next step settles it; until then the units may come back.
        self._needed[opened.session] = (batch_size, 0)

    def free(self, session: str) -> None:
        """Give back all that a session has."""
        self._room.free(session)
        self._needed.pop(session, None)

    def _take(self, opened: wire.OpenSession, needed: _Needed) -> None:
        self._room.take(opened.session, self._need(opened, needed))
        self._needed[opened.session] = needed

    def _need(self, opened: wire.OpenSession, needed: _Needed) -> TailBytes:
        batch_size, start = needed
        if batch_size not in self._profiles:
            profile = profile_of(self._task, batch_size=batch_size)
            self._profiles[batch_size] = profile
        need = tail_bytes(self._profiles[batch_size], start, opened.stop)
        return need if opened.is_trained else need._replace(disk_bytes=0)
