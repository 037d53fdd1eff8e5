"""Kill Flower's own processes in ``examples/deployment``, and see what is lost.

Slow: each run starts a SuperLink, three SuperNodes and an edge, and Flower takes most
of a minute until it believes that a process is dead.
"""

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
from rich.table import Table
from safetensors.numpy import load_file

from simulations.faults.table import differences

EXAMPLE = Path(__file__).parents[2] / "examples/deployment"
ROUNDS, KILLED_IN = 3, 2
_RUN_SECONDS = 1800.0
_BACK_SECONDS = 3.0
_CHILD_SECONDS = 120.0
_FRAME = "─│╭╮╰╯"  # That Flower draws around an error


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a kill cost."""

    killed: str
    runs: list[str]  # How Flower says each `flwr run` ended
    left_out: list[str]
    weights: str
    seconds: float
    seen: list[str]


class _Play:
    """One deployment, and the runs of its app in it."""

    def __init__(self, deployment: Any, folder: Path) -> None:
        self.deployment = deployment
        self.folder = folder
        self.ends: list[str] = []

    def run(self) -> None:
        """Run the app to its end, and note how it went."""
        config = [f"num-server-rounds={ROUNDS}", "api='message'"]
        config += [f"journal='{self.folder}/journal-{{number}}.jsonl'"]
        config += [f"checkpoints='{self.folder}/run'"]
        try:
            is_good = self.deployment.run(config)
        except (SystemExit, Exception) as error:
            words = str(error).translate(dict.fromkeys(map(ord, _FRAME), " ")).split()
            self.ends.append(f"flwr run: {' '.join(words)[-80:]}")
        else:
            self.ends.append("completed" if is_good else "failed")

    def has_saved(self, number: int) -> bool:
        """Say whether a round is over."""
        return (self.folder / "run" / str(number)).is_dir()

    def process(self, name: str) -> Any:
        """Find the process of the launcher's list."""
        return next(p for n, p in self.deployment.processes if n == name)

    def forget(self, name: str) -> None:
        """Take a dead process off the list."""
        dead = self.process(name)
        dead.wait(10)
        self.deployment.processes.remove((name, dead))


def _kill_node(play: _Play) -> None:
    """Kill a SuperNode with its ClientApp, and start it again."""
    os.killpg(play.process("supernode 1").pid, signal.SIGKILL)
    play.forget("supernode 1")
    time.sleep(_BACK_SECONDS)
    play.deployment._start_node(1)


def _kill_client(play: _Play) -> None:
    """Kill the ClientApp that a SuperNode runs now."""
    _kill_child(play.process("supernode 1").pid, "flwr-clientapp", new=True)


def _kill_server_app(play: _Play) -> None:
    _kill_child(play.process("superlink").pid, "flwr-serverapp")


def _kill_superlink(play: _Play) -> None:
    """Kill the SuperLink alone, and start it again on its database."""
    play.process("superlink").kill()
    play.forget("superlink")
    time.sleep(_BACK_SECONDS)
    play.deployment._start_superlink()


def _kill_child(parent: int, name: str, *, new: bool = False) -> None:
    """Kill a process that Flower has started; a new one when it has loaded PyTorch."""
    before = {child.pid for child in _children(parent, name)} if new else set()
    until = time.monotonic() + _CHILD_SECONDS
    while time.monotonic() < until:
        for child in _children(parent, name):
            with suppress(psutil.Error):
                paths = (
                    [each.path for each in child.memory_maps()] if new else ["torch"]
                )
                if child.pid not in before and any("torch" in path for path in paths):
                    time.sleep(1.0)
                    child.kill()
                    return
        time.sleep(0.1)
    raise RuntimeError(f"no {name} runs.")


def _children(parent: int, name: str) -> list[Any]:
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.Error):
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


KILLS: Mapping[str, Callable[[_Play], None] | None] = {
    "nothing": None,
    "ClientApp": _kill_client,
    "SuperNode": _kill_node,
    "ServerApp": _kill_server_app,
    "SuperLink": _kill_superlink,
}
_RUN_ENDS = {"ServerApp", "SuperLink"}


def losses(only: str, *, on_loss: Callable[[Loss], object]) -> list[Loss]:
    """Kill each in a run of its own; the first is undisturbed."""
    names = [name for name in KILLS if KILLS[name] is None or only in name]
    folder = Path(tempfile.mkdtemp(prefix="deployment-faults-"))
    found: list[Loss] = []
    whole: dict[str, Any] = {}
    for name in names:
        place = folder / name
        start = time.monotonic()
        ends = _played(name, place)
        (newest,) = place.glob(f"run/{ROUNDS}/state.safetensors")
        state = load_file(newest)
        whole = whole or state
        left_out, seen = _left_out(place)
        same = "differs from" if differences(state, whole) else "bit-equal to"
        found.append(
            Loss(
                killed=name,
                runs=ends,
                left_out=left_out,
                weights=f"{same} the undisturbed run",
                seconds=round(time.monotonic() - start, 1),
                seen=seen,
            )
        )
        on_loss(found[-1])
    shutil.rmtree(folder)
    return found


def _played(name: str, folder: Path) -> list[str]:
    """Run, kill in the second round, and run again if the run ended by it."""
    folder.mkdir()
    with launched(folder / "deployment") as deployment:
        play = _Play(deployment, folder)
        kill = KILLS[name]
        run = Thread(target=play.run, daemon=True)
        run.start()
        until = time.monotonic() + _RUN_SECONDS
        while run.is_alive() and time.monotonic() < until:
            if kill is not None and play.has_saved(KILLED_IN - 1):
                time.sleep(1.0)  # Clients are asked, and load PyTorch.
                kill(play)
                kill = None
            time.sleep(0.1)
        if run.is_alive():
            raise RuntimeError(f"the run hangs after {name} was killed.")
        if name in _RUN_ENDS:
            play.run()
        return play.ends


@contextmanager
def launched(folder: Path, *, is_secure: bool = False) -> Iterator[Any]:
    """Start the example's deployment, and stop it, also if this process is to end."""
    folder.mkdir()
    deployment = launcher().Deployment(folder, is_secure=is_secure)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.stop()
        signal.signal(signal.SIGTERM, before)


def launcher() -> Any:
    """Import the example's ``deploy.py``."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        return importlib.import_module("deploy")
    finally:
        sys.path.remove(str(EXAMPLE))


def _left_out(folder: Path) -> tuple[list[str], list[str]]:
    """Read from the journals who did not count, and why."""
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("journal-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    bad = [
        row
        for row in rows
        if row["kind"] == "client"
        and row["phase"] == "train"
        and row["status"] not in {"accepted", "not_sampled"}
    ]
    out = [f"{r['client_key']} in round {r['round']}: {r['status']}" for r in bad]
    return out, [row["cause"] for row in bad]


def shown(found: list[Loss]) -> Table:
    """Lay it out, for people."""
    table = Table("killed in round 2", "runs", "left out", "final weights", box=None)
    table.add_column("s", justify="right")
    table.add_column("causes")
    for each in found:
        table.add_row(
            each.killed,
            "\n".join(each.runs),
            "\n".join(each.left_out) or "nobody",
            each.weights,
            f"{each.seconds:.0f}",
            "\n".join(each.seen),
        )
    return table
