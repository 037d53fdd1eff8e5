"""Moments of a run, and what is made to happen when they come.

A process passes moments by name. A trap waits for one of them, and acts once in a run,
even if processes start again. Everything that processes must know of each other lies
in the stage's folder: who has which pid, which trap has acted, what is ordered.
"""

import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import opening_in
from flwr_smartsplit.edge.hosts.grpc import GrpcHost
from flwr_smartsplit.edge.protocol import ReplyT, Request
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.types import EdgeProfile

EDGE, STRATEGY = "edge", "strategy"
IN_STEP = "in step"
_MOST_SECONDS = 10.0
_PAUSE_SECONDS = 0.01

Action = Callable[[Path], None]
"""``action(folder)`` does something to a stage, given its folder."""


@dataclass(frozen=True, slots=True)
class Trap:
    """Act when a process passes a moment for the n-th time in a round."""

    who: str
    moment: str
    action: Action
    nth: int = 1
    round_number: int | None = 2  # None: any


@dataclass
class Here:
    """Who a process is, and the traps of its stage."""

    folder: Path
    who: str
    traps: Sequence[Trap] = ()
    _seen: Counter[tuple[int, int | None]] = field(default_factory=Counter)

    def passed(self, moment: str, round_number: int | None = None) -> None:
        """Act, if a trap waits for this."""
        for index, trap in enumerate(self.traps):
            if (trap.who, trap.moment) != (self.who, moment):
                continue
            if trap.round_number not in {None, round_number}:
                continue
            self._seen[index, round_number] += 1
            if self._seen[index, round_number] >= trap.nth and self._is_first(index):
                trap.action(self.folder)

    def _is_first(self, index: int) -> bool:
        try:
            (self.folder / f"fired.{index}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def watch_steps(here: Here) -> None:
    """Pass a moment in this edge's next step after a client has armed it.

    The step is computed then, and not answered.
    """
    usual: Any = SegmentRunner.finish

    def finish(self: SegmentRunner, *args: Any, **kwargs: Any) -> Any:
        done = usual(self, *args, **kwargs)
        with suppress(FileNotFoundError):
            (here.folder / "armed").unlink()
            here.passed(IN_STEP, 0)
        return done

    SegmentRunner.finish = finish  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class WatchedHost:
    """Reach edges, and pass a moment before and after each request."""

    inner: GrpcHost
    here: Here

    def start(self, task: Task, profile: EdgeProfile) -> str:
        """Return the edge's address."""
        return self.inner.start(task, profile)

    def connect(self, address: str) -> "_Watched":
        """Reach the edge."""
        return _Watched(self.inner.connect(address), self.here)

    def stop(self, address: str) -> None:
        """Leave it running."""
        self.inner.stop(address)


@dataclass(frozen=True, slots=True)
class _Watched:
    inner: wire.Transport
    here: Here

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Send between two moments."""
        what, number = type(request).__name__, _round_of(request)
        self.here.passed(f"before {what}", number)
        reply = self.inner.send(request)
        self.here.passed(f"after {what}", number)
        return reply


def _round_of(request: Any) -> int | None:
    if isinstance(request, wire.OpenSigned | wire.OpenSession):
        return opening_in(request).round_number
    if session := getattr(request, "session", ""):
        return int(session.partition(".")[0])
    return getattr(request, "round_number", None)


# --- actions --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signal:
    """Send a process a signal, and wait until it has taken effect."""

    whom: str
    number: int

    def __call__(self, folder: Path) -> None:
        """Do it."""
        pid = pid_of(folder, self.whom)
        if self.number == signal.SIGSTOP:
            (folder / f"stopped.{self.whom}").touch()
        os.kill(pid, self.number)
        if pid == os.getpid():
            return
        wanted = {int(signal.SIGKILL): "XZ", int(signal.SIGSTOP): "T"}
        if self.number in wanted:
            _wait_for(lambda: _status_of(pid) in wanted[self.number])


@dataclass(frozen=True, slots=True)
class Arm:
    """Let the next step at the edge be the one in which something happens."""

    def __call__(self, folder: Path) -> None:
        """Do it."""
        (folder / "armed").touch()


@dataclass(frozen=True, slots=True)
class Order:
    """Have the stage do something, and wait until it is done."""

    words: str

    def __call__(self, folder: Path) -> None:
        """Do it."""
        path = folder / f"order.{time.monotonic_ns()}"
        path.with_suffix(".new").write_text(self.words)
        order = path.with_suffix(".new").rename(path)
        _wait_for(lambda: not order.exists())


@dataclass(frozen=True, slots=True)
class LimitFiles:
    """Let a process write no file longer than this, as on a disk that is full."""

    whom: str
    most_bytes: int = resource.RLIM_INFINITY

    def __call__(self, folder: Path) -> None:
        """Do it."""
        limits = self.most_bytes, resource.RLIM_INFINITY
        resource.prlimit(pid_of(folder, self.whom), resource.RLIMIT_FSIZE, limits)


@dataclass(frozen=True, slots=True)
class JumpClock:
    """Set this process's wall clock forward, or back."""

    seconds: float

    def __call__(self, folder: Path) -> None:
        """Do it."""
        del folder
        usual, seconds = time.time, self.seconds
        time.time = lambda: usual() + seconds


@dataclass(frozen=True, slots=True)
class Both:
    """Do one thing, then another."""

    first: Action
    second: Action

    def __call__(self, folder: Path) -> None:
        """Do them."""
        self.first(folder)
        self.second(folder)


@dataclass(frozen=True, slots=True)
class Hang:
    """Never go on; the stage must notice."""

    def __call__(self, folder: Path) -> None:
        """Do it."""
        del folder
        while True:
            time.sleep(1)


def write_pid(folder: Path, who: str, pid: int) -> None:
    """Let others know which process somebody is."""
    new = folder / f"{who}.pid.new"
    new.write_text(str(pid))
    new.rename(folder / f"{who}.pid")


def pid_of(folder: Path, who: str) -> int:
    """Find somebody's process."""
    return int((folder / f"{who}.pid").read_text())


def _status_of(pid: int) -> str:
    """Return a process's state as the kernel calls it; X if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return "X"
    return text.rpartition(")")[2].split()[0]


def _wait_for(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + _MOST_SECONDS
    while not is_so() and time.monotonic() < until:
        time.sleep(_PAUSE_SECONDS)
