"""One JSON line per client and round, written whatever happens."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path


class Journal:
    """Append rows to a file of JSON lines.

    Parameters
    ----------
    path : str or Path or None
        The file; rows are added at its end. None writes nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()

    def write(self, row: Mapping[str, object]) -> None:
        """Append one row; it is on disk when this returns."""
        if self._path is not None:
            with self._lock, self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
