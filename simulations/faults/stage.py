"""A stage: an edge, a strategy and its clients as processes, and one run of theirs.

The stage starts again what died, as a supervisor does, goes on with what was stopped,
and follows the orders that traps give. It waits for nothing without a limit.
"""

import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.cli.app import app
from simulations.faults import moments, run
from simulations.faults.grid import processes
from simulations.faults.moments import Here, Trap
from simulations.faults.proxy import Proxy
from simulations.faults.run import RunOptions

MODEL = "simulations.faults.task:build_task"
_FLOWERS_OWN = "Federated evaluation will be skipped"
_PAUSE_SECONDS = 0.02
_START_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the stage does after a fault."""

    edge_back_seconds: float | None = 0.3  # After it died, or was stopped; None: never
    client_back_seconds: float | None = 0.3  # After it was stopped
    strategy_is_back: bool = False  # Whether it is started again after it died
    has_proxy: bool = False
    lease_seconds: float = 120.0  # Until the edge deletes a run that is silent
    tidy_seconds: float = 4.0  # Until nothing may be left of the run
    most_seconds: float = 180.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a run left."""

    state: Mapping[str, npt.NDArray[Any]] | None  # None: it did not end well
    rows: list[dict[str, Any]]  # Of the journal
    log: str  # Flower's, of the strategy
    client_log: str
    seconds: float
    num_edge_starts: int
    left: list[str]  # Behind: threads, sessions, runs, files
    was_hung: bool = False

    @property
    def seen(self) -> list[str]:
        """List the warnings and errors in Flower's log, each once."""
        lines = re.findall(r"^(?:WARNING|ERROR)[ \t>]+(.*)$", self.log, re.MULTILINE)
        return [*dict.fromkeys(each for each in lines if _FLOWERS_OWN not in each)]

    @property
    def left_out(self) -> list[tuple[str, int, str, str]]:
        """List who did not count in which training round: key, round, status, why."""
        rows = [r for r in self.rows if r.get("phase") == "train" and "client_key" in r]
        return [
            (r["client_key"], r["round"], r["status"], r.get("cause") or "")
            for r in rows
            if r["status"] not in {"accepted", "not_sampled"}
            and not r["client_key"].startswith("edge ")
        ]


def _free_port() -> int:
    """Find a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Edge:
    """The process of ``smartsplit edge``, on a port that stays its own."""

    folder: Path
    traps: tuple[Trap, ...] = ()
    words: tuple[str, ...] = ()
    num_starts: int = 0
    process: Any = None
    port: int = field(default_factory=_free_port)
    metrics: int = field(default_factory=_free_port)

    def start(self) -> None:
        """Start it, and wait until it listens."""
        secret = self.folder / run.SECRET
        secret.write_text("s" * 64)
        words = [MODEL, "--insecure", "--port", str(self.port)]
        words += ["--admin-secret-file", str(secret), "--spill", str(self.spill)]
        words += ["--metrics-port", str(self.metrics), *self.words]
        here = Here(self.folder, moments.EDGE, self.traps)
        self.process = processes().Process(target=_serve_edge, args=(words, here))
        self.process.start()
        moments.write_pid(self.folder, moments.EDGE, self.process.pid)
        self.num_starts += 1
        until = time.monotonic() + _START_SECONDS
        while not _listens(self.port):
            if time.monotonic() > until or not self.process.is_alive():
                raise RuntimeError(f"the edge does not start: {self.log()[-2000:]}")
            time.sleep(_PAUSE_SECONDS)

    @property
    def spill(self) -> Path:
        """Its folder of states and tails, which outlives it."""
        return self.folder / "spill"

    def stop(self) -> None:
        """End it, whatever it does."""
        if self.process is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
        if self.process is not None:
            self.process.join()

    def present(self) -> dict[str, float]:
        """Ask it what there is; nothing if it does not answer."""
        try:
            url = f"http://127.0.0.1:{self.metrics}/metrics"
            with urllib.request.urlopen(url, timeout=2) as page:
                text = page.read().decode()
        except OSError:
            return {}
        pairs = re.findall(r"^smartsplit_edge_(\w+) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in pairs}

    def log(self) -> str:
        """Read what it has logged."""
        with suppress(FileNotFoundError):
            return (self.folder / "edge.log").read_text(errors="replace")
        return ""


class Stage:
    """One run with its traps, in a folder of its own."""

    def __init__(
        self,
        options: RunOptions,
        rules: Rules,
        *edge_words: str,
        target: Callable[[Any], None] = run.serve,
    ) -> None:
        options.folder.mkdir(parents=True, exist_ok=True)
        words = ("--grace", "1", "--lease", f"{rules.lease_seconds}")
        self.edge = Edge(options.folder, options.traps, (*words, *edge_words))
        self.proxy = Proxy(self.edge.port) if rules.has_proxy else None
        port = self.edge.port if self.proxy is None else self.proxy.port
        self._options = replace(
            options, address=f"127.0.0.1:{port}", metrics=self.edge.metrics
        )
        self._rules, self._target = rules, target
        self._strategy: Any = None
        self._due: dict[str, float] = {}  # When somebody is to go on
        self._wipes = False

    def play(self, *, during: Callable[[Any], object] = lambda _: None) -> Ended:
        """Run to the end, or to the limit; ``during`` is called with the strategy."""
        started = time.monotonic()
        until = started + self._rules.most_seconds
        try:
            self.edge.start()
            self._start_strategy()
            while self._is_going_on() and time.monotonic() < until:
                during(self._strategy)
                self._tend()
                time.sleep(_PAUSE_SECONDS)
            was_hung = bool(self._strategy.is_alive())
            seconds = time.monotonic() - started
            left = ["a strategy that hangs"] if was_hung else self._left()
            return self._ended(seconds, left, was_hung=was_hung)
        finally:
            self._stop()

    # --- while it runs ------------------------------------------------------------

    def _start_strategy(self) -> None:
        self._strategy = processes().Process(target=self._target, args=(self._options,))
        self._strategy.start()
        folder = self._options.folder
        moments.write_pid(folder, moments.STRATEGY, self._strategy.pid)

    def _is_going_on(self) -> bool:
        if self._strategy.is_alive():
            return True
        was_killed = self._strategy.exitcode == -signal.SIGKILL
        if was_killed and self._rules.strategy_is_back:
            self._start_strategy()
            return True
        return False

    def _tend(self) -> None:
        """Start again, go on, and do what was ordered."""
        folder, now = self._options.folder, time.monotonic()
        if not self.edge.process.is_alive() and self._is_due("dead edge", now):
            if self._wipes:
                shutil.rmtree(self.edge.spill, ignore_errors=True)
            self.edge.start()
        for mark in folder.glob("stopped.*"):
            who = mark.name.partition(".")[2]
            if self._is_due(who, now):
                mark.unlink()
                with suppress(ProcessLookupError):
                    os.kill(moments.pid_of(folder, who), signal.SIGCONT)
        for order in folder.glob("order.*[0-9]"):
            self._do(*order.read_text().split())
            order.unlink()

    def _is_due(self, who: str, now: float) -> bool:
        back = self._rules.client_back_seconds
        if who in {"dead edge", moments.EDGE}:
            back = self._rules.edge_back_seconds
        if back is None:
            return False
        if now < self._due.setdefault(who, now + back):
            return False
        del self._due[who]
        return True

    def _do(self, what: str, *numbers: str) -> None:
        given = [*map(float, numbers)]
        if what == "wipe":
            self._wipes = True
            return
        assert self.proxy is not None
        if what == "cut":
            self.proxy.cut(*given)
        elif what == "swallow":
            self.proxy.swallow()
        else:
            setattr(self.proxy, what, *given)

    # --- when it is over ----------------------------------------------------------

    def _left(self) -> list[str]:
        """List what is there that should be gone, after a short wait."""
        folder = self._options.folder
        with suppress(OSError, ValueError):
            os.kill(moments.pid_of(folder, moments.EDGE), signal.SIGCONT)
        until = time.monotonic() + self._rules.tidy_seconds
        while (left := self._at_edge()) and time.monotonic() < until:
            time.sleep(0.1)
        with suppress(FileNotFoundError):
            threads = json.loads((folder / "left.json").read_text())
            left += [f"thread {name}" for name in threads]
        return left

    def _at_edge(self) -> list[str]:
        if not self.edge.process.is_alive():
            return []
        present = self.edge.present()
        if not present:
            return ["an edge that does not answer"]
        names = ("sessions", "streams", "runs", "reserved_bytes")
        left = [f"{present[n]:g} {n}" for n in names if present.get(n)]
        files = [path for path in self.edge.spill.rglob("*") if path.is_file()]
        return left + [f"file {p.name}" for p in files if not p.name.endswith(".lock")]

    def _ended(self, seconds: float, left: list[str], *, was_hung: bool) -> Ended:
        folder = self._options.folder
        state = None
        if not was_hung and self._strategy.exitcode == 0:
            with np.load(folder / run.FINAL) as arrays:
                state = dict(arrays)
        journals = sorted(folder.glob("journal-*.jsonl"))
        lines = [line for each in journals for line in each.read_text().splitlines()]
        clients = [folder / f"{key}.log" for key in run.CLIENTS]
        return Ended(
            state=state,
            rows=[json.loads(line) for line in lines],
            log=_text_of(folder / "strategy.log"),
            client_log="".join(map(_text_of, clients)),
            seconds=seconds,
            num_edge_starts=self.edge.num_starts,
            left=left,
            was_hung=was_hung,
        )

    def _stop(self) -> None:
        if self._strategy is not None:
            self._strategy.kill()
            self._strategy.join()
        self.edge.stop()
        if self.proxy is not None:
            self.proxy.close()


def _serve_edge(words: list[str], here: Here) -> None:
    """Be ``smartsplit edge``."""
    with (here.folder / "edge.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)
    logging.getLogger().handlers[:] = []
    moments.watch_steps(here)
    app(["edge", *words], prog_name="smartsplit")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
