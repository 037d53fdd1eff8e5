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
_LOCK_ALONE = "edge.lock"


def claim(folder: Path) -> BinaryIO:
    """Make a folder, or share it, until the returned file is closed.

    Nobody else may look into it: its files tell who takes part.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # It was deleted at this moment.
            file = (folder / _LOCK).open("ab")
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH)
            if _is_there(file):
                return file
            file.close()


def claim_alone(folder: Path) -> BinaryIO | None:
    """Make a folder that outlives its process, and lock it; None if it is in use.

    Nobody deletes it: the next edge there goes on with what it finds.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    file = (folder / _LOCK_ALONE).open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


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
