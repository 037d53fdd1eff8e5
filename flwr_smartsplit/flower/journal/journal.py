"""One JSON line per client and round, written whatever happens."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from logging import INFO, WARNING, getLogger
from pathlib import Path

NUMBER = "{number}"
"""In a journal's name, stands for the first number that no other file has."""

DEFAULT_JOURNAL = f"smartsplit-{NUMBER}.jsonl"

OnRow = Callable[[Mapping[str, object]], None]
"""``on_row(row)`` is told each line of a journal."""

_log = getLogger("flwr")


class Journal:
    """Append rows to a file of JSON lines, and tell others of them.

    Parameters
    ----------
    path : str or Path or None
        The file; rows are added at its end. With ``{number}`` in its name, a new file
        is made for the first row. None writes nothing.
    on_row : Sequence[Callable[[Mapping], None]]
        Told each row, such as ``TensorBoardRows`` and ``WandbRows``. If one raises, a
        warning is logged once, and the run goes on.
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
            for index, tell in enumerate(self._on_row):
                self._tell(index, tell, row)

    def _tell(self, index: int, tell: OnRow, row: Mapping[str, object]) -> None:
        try:
            tell(row)
        except Exception:  # It only watches: what it does wrong ends no run.
            if index not in self._failed:
                self._failed.add(index)
                name = getattr(tell, "__qualname__", type(tell).__name__)
                _log.warning(
                    "on_row: %s fails; the run goes on, and further failures of it "
                    "are not logged.",
                    name,
                    exc_info=True,
                )


def _numbered(pattern: Path) -> Path | None:
    """Make a journal's file, unless nobody asked for it and the folder allows none."""
    try:
        path = _first_free(pattern)
    except OSError as error:
        if str(pattern) != DEFAULT_JOURNAL:
            raise
        _log.log(WARNING, "No journal is written (%s): name one by journal=.", error)
        return None
    _log.log(INFO, "The journal is %s", path)
    return path


def _first_free(pattern: Path) -> Path:
    """Make a file under the first number that is free, however many try at once."""
    pattern.parent.mkdir(parents=True, exist_ok=True)
    numbers = count(1)
    while True:
        name = pattern.name.replace(NUMBER, str(next(numbers)))
        path = pattern.with_name(name)
        try:
            path.open("x").close()
        except FileExistsError:
            continue
        return path
