"""Outstanding: the phases whose clients have not all answered, and what edges keep.

In rounds there is one at a time. In an asynchronous run each client of a phase answers
when it can, and several phases are joined into what is merged.
"""

from collections.abc import Sequence

from flwr_smartsplit.edge.protocol import Release
from flwr_smartsplit.flower.rounds.exchange import Dispatch, joined
from flwr_smartsplit.server.global_state import GlobalState
from flwr_smartsplit.split.chain import Chain

_Name = tuple[int, bool, str]
"""Version, whether it trains, and the client, if it is settled alone; else ""."""


class Outstanding:
    """Hold phases from when they are begun until they are taken to be settled."""

    def __init__(self) -> None:
        self._phases: dict[_Name, Dispatch] = {}

    def clear(self) -> None:
        """Drop all."""
        self._phases.clear()

    def add(self, dispatch: Dispatch) -> None:
        """Hold a phase that was begun."""
        # Flower's legacy server does not aggregate a phase without clients.
        waiting = {name: each for name, each in self._phases.items() if each.sent}
        self._phases = {**waiting, _name_of(dispatch): dispatch}

    def take(self, version: int, *, is_train: bool) -> Dispatch | None:
        """Return a phase and forget it; None if there is none."""
        return self._phases.pop((version, is_train, ""), None)

    def one_by_one(self, dispatch: Dispatch) -> dict[str, Dispatch]:
        """Divide a phase whose messages are written: each client answers when it can.

        They stay until ``join`` takes them into a phase that is settled.
        """
        self._phases.pop(_name_of(dispatch), None)
        parts = {key: dispatch.of_client(key) for key in dispatch.sent}
        self._phases |= {_name_of(part, key): part for key, part in parts.items()}
        return parts

    def join(
        self, parts: Sequence[Dispatch], *, round_number: int, like: Dispatch
    ) -> Dispatch:
        """Make one phase of clients that were asked one by one."""
        for each in parts:
            for key in each.sent:
                self._phases.pop(_name_of(each, key), None)
        return joined(parts, round_number=round_number, like=like)

    def over(
        self,
        ended: Dispatch,
        state: GlobalState,
        *,
        newest: int,
        phase: int,
        chain: Chain,
    ) -> Release:
        """Say what edges may delete, now that a phase has ended.

        ``state`` is the newest, ``newest`` the last round or merge that was begun, and
        ``phase`` the edges' last.
        """
        kept = state.digest, state.rest
        waiting = [each for each in self._phases.values() if each.sent]
        if not waiting:
            return Release(max(newest, ended.round_number), *kept, phase=phase)
        digests = {d for each in waiting for d in (each.digest, each.rest)}
        return Release(
            min(each.version for each in waiting) - 1,
            *kept,
            phase=min(each.edge_phase for each in waiting) - 1,
            keep_more=tuple(sorted(digests - {"", *kept})),
            ended=ended.ended_sessions(chain),
        )


def _name_of(dispatch: Dispatch, key: str = "") -> _Name:
    return dispatch.version, dispatch.is_train, key
