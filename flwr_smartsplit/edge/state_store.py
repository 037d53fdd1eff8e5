"""Sealed tails and held states on disk: memory is only for open sessions.

Files are in the safetensors format (no pickle), written whole or not at all. A tail is
merged only if its digest is still the same.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flwr_smartsplit.edge.protocol import Entry, State
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import EdgeError, StateNotHeld, TailLost
from flwr_smartsplit.types import WHOLE, Variant

_STATE = ".state.safetensors"
_TAIL = ".tail.safetensors"
_UNFINISHED = ".unfinished"
_ROUND = "round"
_REST = "rest"
_VARIANT = "variant"
_SESSION = "session"


class StateStore:
    """One edge's folder of states and sealed tails; made if missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writing: set[Path] = set()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def held_bytes(self, *, without: str = "") -> int:
        """Add up the files of all held states but one."""
        paths = set(self._folder.glob(f"*{_STATE}")) - {self._state_path(without)}
        return sum(path.stat().st_size for path in paths)

    def hold(
        self, digest: str, state: State, *, rest: str = "", variant: Variant = WHOLE
    ) -> None:
        """Write a variant's state under its digest; a held ``rest`` has other names."""
        about = {_REST: rest, _VARIANT: "" if variant == WHOLE else _text(variant)}
        kept = {name: text for name, text in about.items() if text}
        self._write(self._state_path(digest), state, kept)

    def variant_of(self, digest: str) -> Variant:
        """Say what a held state is the state of."""
        text = _about(self._state_path(digest)).get(_VARIANT)
        return Variant(**json.loads(text)) if text else WHOLE

    def holds(self, digest: str) -> bool:
        """Return whether a global state is held, with its rest."""
        path = self._state_path(digest)
        rest = _names_and_rest(path)[1] if path.exists() else ""
        return path.exists() and (not rest or self.holds(rest))

    def read_state(self, digest: str, names: tuple[str, ...]) -> State:
        """Read some names of a held state.

        Raises ``StateNotHeld`` if the state is missing or damaged, ``EdgeError`` if it
        lacks names, and ``OSError`` if it cannot be read just now.
        """
        path = self._state_path(digest)
        found, rest = _names_and_rest(path)
        if rest:
            own = self._read_part(digest, tuple(n for n in names if n in found))
            others = tuple(n for n in names if n not in found)
            state = {**own, **self._read_part(rest, others)}
            return {name: state[name] for name in names}
        return self._read_part(digest, names)

    def _read_part(self, digest: str, names: tuple[str, ...]) -> State:
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
        self._write(self._tail_path(session), state, about)
        return digest

    def read_tails(self, entries: Iterable[Entry]) -> Iterator[tuple[State, int]]:
        """Read tails with their weights, in order, one in memory at a time.

        Each is the very bytes that fit its digest. Raises ``TailLost`` at the end, with
        every session whose tail is missing or changed.
        """
        lost: list[str] = []
        for entry in entries:
            state = self._proved(entry)
            if state is None:
                lost.append(entry.session)
            elif not lost:  # Else nothing is merged.
                yield state, entry.weight
            del state  # Before the next one is read
        if lost:
            raise TailLost(
                f"sealed tails of {', '.join(lost)} are missing or changed: "
                "drop these clients from the round.",
                sessions=tuple(lost),
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

    def _proved(self, entry: Entry) -> State | None:
        """Read a tail, if it is there and fits its digest."""
        try:
            state = self.read_tail(entry.session)
        except TailLost:
            return None
        return state if state_digest(state) == entry.digest else None

    def drop_tail(self, session: str) -> None:
        """Delete a sealed tail, if there is one."""
        self._tail_path(session).unlink(missing_ok=True)

    def tail_bytes(self) -> dict[str, int]:
        """Return the size of each sealed tail's file, by session."""
        return {
            _about(path).get(_SESSION, path.name): path.stat().st_size
            for path in self._folder.glob(f"*{_TAIL}")
        }

    def release(self, round_number: int, *keep_digests: str) -> None:
        """Delete the tails of this and earlier rounds, and all states but these.

        A file that another thread is writing stays.
        """
        find, kept = self._folder.glob, set(map(self._state_path, keep_digests))
        tails = [path for path in find(f"*{_TAIL}") if _round_of(path) <= round_number]
        states = [path for path in find(f"*{_STATE}") if path not in kept]
        left = set(find(f"*{_UNFINISHED}")) - self._writing
        for path in (*tails, *left, *states):
            path.unlink(missing_ok=True)

    def _write(self, path: Path, state: State, about: Mapping[str, str]) -> None:
        unfinished = path.with_suffix(_UNFINISHED)
        self._writing.add(unfinished)
        try:
            _write(path, unfinished, state, about)
        finally:
            self._writing.discard(unfinished)

    def _state_path(self, digest: str) -> Path:
        return self._folder / f"{_file_name(digest)}{_STATE}"

    def _tail_path(self, session: str) -> Path:
        return self._folder / f"{_file_name(session)}{_TAIL}"


def _text(variant: Variant) -> str:
    return json.dumps(asdict(variant))


def _file_name(text: str) -> str:
    """Name a file after any text, such as a user's client_key in a session's name."""
    return hashlib.sha256(repr(text).encode()).hexdigest()


def _read(path: Path, names: tuple[str, ...] | None = None) -> State:
    with safe_open(path, framework="numpy") as archive:
        names = tuple(archive.keys()) if names is None else names
        return {name: archive.get_tensor(name) for name in names}


def _names_and_rest(path: Path) -> tuple[frozenset[str], str]:
    """Read which names a state has, and the digest of its rest; nothing if damaged."""
    try:
        with safe_open(path, framework="numpy") as archive:
            about = archive.metadata() or {}
            return frozenset(archive.keys()), about.get(_REST, "")
    except (FileNotFoundError, SafetensorError):
        return frozenset(), ""


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


def _write(
    path: Path, unfinished: Path, state: State, about: Mapping[str, str]
) -> None:
    """Write a file whole or not at all."""
    # safetensors writes an array's memory in order, whatever its strides.
    arrays = {n: np.require(a, requirements=["C"]) for n, a in state.items()}
    try:
        save_file(arrays, unfinished, metadata=dict(about))
    except SafetensorError as error:
        raise OSError(f"{unfinished.name} cannot be written: {error}") from error
    unfinished.replace(path)
