"""One JSON line per client and round, written whatever happens."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from logging import INFO, WARNING, getLogger
from math import isfinite
from pathlib import Path
from typing import Any

from flwr_smartsplit.types.sizes import plain

NUMBER = "{number}"
"""In a journal's name, becomes the first number that is free."""

DEFAULT_JOURNAL = f"smartsplit-{NUMBER}.jsonl"

OnRow = Callable[[Mapping[str, object]], None]
"""``on_row(row)`` is called with each line of a journal."""

_log = getLogger("flwr")


class Journal:
    """Append rows to a file of JSON lines, and call each ``on_row`` with them.

    With ``{number}`` in the path's name, the first row makes a new file; without a
    path, there is none. Numbers that are not finite are null in the file, since JSON
    has none. If the file cannot be written any more or an ``on_row`` raises, a warning
    is logged once, and the run goes on.
    """

    def __init__(self, path: str | Path | None, on_row: Sequence[OnRow] = ()) -> None:
        self._path = None if path is None else Path(path)
        self._on_row = tuple(on_row)
        self._failed: set[str] = set()
        self._lock = threading.Lock()
        if self._path is not None and NUMBER not in self._path.name:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()

    def write(self, row: Mapping[str, object]) -> None:
        """Append one row; it is on disk when this returns."""
        with self._lock:
            if self._path is not None and NUMBER in self._path.name:
                self._path = _numbered(self._path)
            if self._path is not None:
                self._watch(
                    f"the journal {self._path}", partial(_append, self._path), row
                )
            for index, on_row in enumerate(self._on_row):
                name = getattr(on_row, "__qualname__", type(on_row).__name__)
                self._watch(f"on_row {index}: {name}", on_row, row)

    def _watch(self, name: str, on_row: OnRow, row: Mapping[str, object]) -> None:
        try:
            on_row(row)
        except Exception:  # It only watches, so its errors must not end the run.
            if name not in self._failed:
                self._failed.add(name)
                _log.warning(
                    "%s fails; the run goes on, and further failures of it are not "
                    "logged.",
                    name,
                    exc_info=True,
                )


def _append(path: Path, row: Mapping[str, object]) -> None:
    """Append a row whole, or nothing."""
    line = json.dumps(_as_json(row), allow_nan=False).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(f"{path}: only a part of a row could be written.")
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def _as_json(value: Any) -> Any:
    """Turn a row into what JSON has: numbers of Python's own, the finite ones."""
    value = plain(value)
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return list(map(_as_json, value)) if isinstance(value, tuple) else value


def _numbered(pattern: Path) -> Path | None:
    """Make the first free file; None if the default journal cannot be written here."""
    try:
        pattern.parent.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            path = pattern.with_name(pattern.name.replace(NUMBER, str(number)))
            try:
                path.open("x").close()
            except FileExistsError:  # Also if another process was faster.
                continue
            _log.log(INFO, "The journal is %s", path)
            return path
    except OSError as error:
        if str(pattern) != DEFAULT_JOURNAL:
            raise
        _log.log(WARNING, "No journal is written (%s): name one by journal=.", error)
    return None
