"""Sealed tails and held states on disk: memory is only for open sessions.

Files are in the safetensors format (no pickle), written whole or not at all. A tail is
merged only if its digest is still the same.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import EdgeError, StateNotHeld, TailLost

_STATE = ".state.safetensors"
_TAIL = ".tail.safetensors"
_UNFINISHED = ".unfinished"
_ROUND = "round"
_SESSION = "session"


class StateStore:
    """One edge's folder of states and sealed tails; made if missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def hold(self, digest: str, state: State) -> None:
        """Write a global state under its digest."""
        _write(self._state_path(digest), state)

    def holds(self, digest: str) -> bool:
        """Return whether a global state is held."""
        return self._state_path(digest).exists()

    def read_state(self, digest: str, names: tuple[str, ...]) -> State:
        """Read some names of a held state.

        Raises ``StateNotHeld`` if the state is missing or damaged, ``EdgeError`` if it
        lacks names, and ``OSError`` if it cannot be read just now.
        """
        path = self._state_path(digest)
        try:
            return _read(path, names)
        except (FileNotFoundError, SafetensorError) as error:
            missing = _missing(path, names)
            if missing:
                raise EdgeError(
                    f"the global state {digest[:12]} lacks {', '.join(missing[:3])}: "
                    "give strategy and edges the same task."
                ) from error
            path.unlink(missing_ok=True)  # So that it is sent again.
            raise StateNotHeld(
                f"no global state {digest[:12]} is held here: send HoldState first.",
                digest=digest,
            ) from error

    def put_tail(self, session: str, round_number: int, state: State) -> str:
        """Write a sealed tail; return its digest."""
        digest = state_digest(state)
        about = {_ROUND: str(round_number), _SESSION: session}
        _write(self._tail_path(session), state, about)
        return digest

    def verify(self, digests: Mapping[str, str]) -> None:
        """Raise ``TailLost`` with every session whose tail is missing or changed."""
        lost = tuple(s for s, digest in digests.items() if not self._fits(s, digest))
        if lost:
            raise TailLost(
                f"sealed tails of {', '.join(lost)} are missing or changed: "
                "drop these clients from the round.",
                sessions=lost,
            )

    def read_tail(self, session: str) -> State:
        """Read a sealed tail, or raise ``TailLost``."""
        try:
            return _read(self._tail_path(session))
        except (OSError, SafetensorError) as error:
            raise TailLost(
                f"the sealed tail of {session} cannot be read: {error}",
                sessions=(session,),
            ) from error

    def read_tails(self, weights: Mapping[str, int]) -> Iterator[tuple[State, int]]:
        """Read tails with their weights by session, one in memory at a time."""
        for session, weight in weights.items():
            yield self.read_tail(session), weight

    def drop_tail(self, session: str) -> None:
        """Delete a sealed tail, if there is one."""
        self._tail_path(session).unlink(missing_ok=True)

    def tail_bytes(self) -> dict[str, int]:
        """Return the size of each sealed tail's file, by session."""
        return {
            _about(path).get(_SESSION, path.name): path.stat().st_size
            for path in self._folder.glob(f"*{_TAIL}")
        }

    def release(self, round_number: int, keep_digest: str) -> None:
        """Delete the tails of this and earlier rounds, and all states but one."""
        find, kept = self._folder.glob, self._state_path(keep_digest)
        tails = [path for path in find(f"*{_TAIL}") if _round_of(path) <= round_number]
        states = [path for path in find(f"*{_STATE}") if path != kept]
        for path in (*tails, *find(f"*{_UNFINISHED}"), *states):
            path.unlink(missing_ok=True)

    def _fits(self, session: str, digest: str) -> bool:
        try:
            return state_digest(self.read_tail(session)) == digest
        except TailLost:
            return False

    def _state_path(self, digest: str) -> Path:
        return self._folder / f"{_file_name(digest)}{_STATE}"

    def _tail_path(self, session: str) -> Path:
        return self._folder / f"{_file_name(session)}{_TAIL}"


def _file_name(text: str) -> str:
    """Name a file after any text, such as a user's client_key in a session's name."""
    return hashlib.sha256(repr(text).encode()).hexdigest()


def _read(path: Path, names: tuple[str, ...] | None = None) -> State:
    with safe_open(path, framework="numpy") as archive:
        names = tuple(archive.keys()) if names is None else names
        return {name: archive.get_tensor(name) for name in names}


def _missing(path: Path, names: tuple[str, ...]) -> list[str]:
    """List the names that a file lacks; none if it is unreadable."""
    try:
        with safe_open(path, framework="numpy") as archive:
            found = set(archive.keys())
    except (OSError, SafetensorError):
        return []
    return [name for name in names if name not in found]


def _round_of(path: Path) -> int:
    """Return a tail's round; 0 if the file is damaged."""
    return int(_about(path).get(_ROUND, 0))


def _about(path: Path) -> Mapping[str, str]:
    """Return what was written about a file's state; nothing if it is damaged."""
    try:
        with safe_open(path, framework="numpy") as archive:
            return archive.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _write(path: Path, state: State, about: Mapping[str, str] | None = None) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_suffix(_UNFINISHED)
    # safetensors writes an array's memory in order, whatever its strides.
    arrays = {n: np.require(a, requirements=["C"]) for n, a in state.items()}
    try:
        save_file(arrays, unfinished, metadata=dict(about or {}))
    except SafetensorError as error:
        raise OSError(f"{unfinished.name} cannot be written: {error}") from error
    unfinished.replace(path)
