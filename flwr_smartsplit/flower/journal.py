"""One JSON line per client and round, written whatever happens."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

OnRow = Callable[[Mapping[str, object]], None]
"""``on_row(row)`` is told each line of a journal."""


class Journal:
    """Append rows to a file of JSON lines, and tell others of them.

    Parameters
    ----------
    path : str or Path or None
        The file; rows are added at its end. None writes nothing.
    on_row : Sequence[Callable[[Mapping], None]]
        Told each row, such as ``TensorBoardRows`` and ``WandbRows``.
    """

    def __init__(self, path: str | Path | None, on_row: Sequence[OnRow] = ()) -> None:
        self._path = None if path is None else Path(path)
        self._on_row = tuple(on_row)
        self._lock = threading.Lock()
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()

    def write(self, row: Mapping[str, object]) -> None:
        """Append one row; it is on disk when this returns."""
        with self._lock:
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            for tell in self._on_row:
                tell(row)
