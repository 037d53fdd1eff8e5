"""One JSON line per client and round, written whatever happens."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from logging import INFO, WARNING, getLogger
from pathlib import Path

NUMBER = "{number}"
"""In a journal's name, becomes the first number that is free."""

DEFAULT_JOURNAL = f"smartsplit-{NUMBER}.jsonl"

OnRow = Callable[[Mapping[str, object]], None]
"""``on_row(row)`` is called with each line of a journal."""

_log = getLogger("flwr")


class Journal:
    """Append rows to a file of JSON lines, and call each ``on_row`` with them.

    With ``{number}`` in the path's name, the first row makes a new file; without a
    path, there is none. If an ``on_row`` raises, a warning is logged once, and the run
    goes on.
    """

    def __init__(self, path: str | Path | None, on_row: Sequence[OnRow] = ()) -> None:
        self._path = None if path is None else Path(path)
        self._on_row = tuple(on_row)
        self._failed: set[int] = set()
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
                with self._path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            for index, on_row in enumerate(self._on_row):
                self._call(index, on_row, row)

    def _call(self, index: int, on_row: OnRow, row: Mapping[str, object]) -> None:
        try:
            on_row(row)
        except Exception:  # It only watches, so its errors must not end the run.
            if index not in self._failed:
                self._failed.add(index)
                _log.warning(
                    "on_row: %s fails; the run goes on, and further failures of it "
                    "are not logged.",
                    getattr(on_row, "__qualname__", type(on_row).__name__),
                    exc_info=True,
                )


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
