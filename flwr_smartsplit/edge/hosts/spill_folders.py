"""The folders of edges on disk, and those that killed processes left behind.

Whoever uses a folder holds a lock on a file in it. The system frees the lock when the
process ends, however it ends, so a folder with a free lock is nobody's.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

fcntl: Any
try:
    import fcntl
except ImportError:  # On Windows: what is left there stays.
    fcntl = None

PREFIX = "smartsplit-"
_LOCK = "in-use.lock"


def claim(folder: Path) -> BinaryIO:
    """Make a folder, or share it, until the returned file is closed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # It was deleted at this moment.
            file = (folder / _LOCK).open("ab")
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH)
            if _is_there(file):
                return file
            file.close()


def delete_abandoned(parent: Path) -> None:
    """Delete the folders in ``parent`` that nobody uses any more."""
    for path in parent.glob(f"{PREFIX}*/{_LOCK}") if fcntl is not None else ():
        # Another user's, or one that is in use.
        with suppress(OSError), path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)


def _is_there(file: BinaryIO) -> bool:
    """Tell whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())
    except FileNotFoundError:
        return False
