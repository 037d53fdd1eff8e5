"""The process and all that it started: their CPU time, and which one is which.

A child may end between being listed and being read; then it is left out.
"""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil


class TreeTimes(NamedTuple):
    """What this process and its children used so far."""

    user_seconds: float
    system_seconds: float
    page_faults: float


def tree_times() -> TreeTimes:
    """Add up seconds and page faults of this process and of all that it started."""
    rows = [(0.0, 0.0, 0.0)]
    for process in (psutil.Process(), *_children()):
        with suppress(psutil.Error, OSError):
            times, faults = process.cpu_times(), _page_faults(process.pid)
            user = times.user + times.children_user
            rows.append((user, times.system + times.children_system, faults))
    return TreeTimes(*map(sum, zip(*rows, strict=True)))


def cpu_seconds() -> float:
    """Read how long this process, and those that it started, computed so far."""
    user, system, _ = tree_times()
    return user + system


def child_pid(name: str) -> int | None:
    """Find a child whose command line has a name."""
    for process in _children():
        with suppress(psutil.Error):
            if name in "".join(process.cmdline()):
                return int(process.pid)
    return None


def _children() -> list[psutil.Process]:
    return list(psutil.Process().children(recursive=True))


def _page_faults(pid: int) -> float:
    """Read how often the system had to give a process a page."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return float(text.rpartition(")")[2].split()[7])
