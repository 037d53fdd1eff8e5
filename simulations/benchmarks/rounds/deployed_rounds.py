"""What a round costs in a deployment.

``python -m simulations.benchmarks.rounds.deployed_rounds``.

``examples/existing_fedavg_app``, ``before`` and ``after`` in turn, on the same
SuperLink and SuperNodes, with an edge, all of which ``examples/deployment`` starts.
Flower starts a process for each message, and what it imports is most of what a round
takes.
"""

import json
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from simulations.faults.deployment import EXAMPLE, launched, launcher

BEFORE, AFTER = "before", "after"
_TASK = "fedavg_app.task:build_task"
_ANSWERED = "Sent successfully"
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What one run took."""

    app: str
    round_seconds: tuple[float, ...]
    num_messages: int
    client_cpu_seconds: float

    @property
    def cpu_seconds_per_message(self) -> float:
        """Return the CPU time of a client's process, on average."""
        return self.client_cpu_seconds / self.num_messages


class Deployment:
    """The example's processes, and copies of both apps that note when rounds end."""

    def __init__(self, started: Any, folder: Path) -> None:
        self._started = started
        self._folder = folder
        edge = (
            f'GrpcEdge("127.0.0.1:{started.edge}", insecure=True, '
            f'admin_secret_file="{started.folder / "edge.secret"}")'
        )
        for app in (BEFORE, AFTER):
            self._change(app, "server_app", "    model = Net()\n", self._noting(app))
        self._change(AFTER, "server_app", "RayEdge,", "GrpcEdge,")
        self._change(AFTER, "server_app", "RayEdge()", edge)
        self._change(AFTER, "client_app", "        edges=(RayEdge(),),\n", "")
        self._change(AFTER, "client_app", "RayEdge, ", "")

    def _noting(self, app: str) -> str:
        """Return lines for the server's evaluation, which ends each round."""
        return (
            f'    with open("{self._folder / app}.times", "a") as times:\n'
            "        print(__import__('time').time(), file=times)\n    model = Net()\n"
        )

    def _change(self, app: str, module: str, old: str, new: str) -> None:
        """Change a copied file in one place."""
        file = self._folder / app / "fedavg_app" / f"{module}.py"
        text = file.read_text("utf-8")
        if old not in text:
            raise RuntimeError(f"{app}/{module}.py has no {old!r}: change this file.")
        head, tail = text.rsplit(old, 1)
        file.write_text(head + new + tail, "utf-8")

    def wait_for_nodes(self) -> None:
        """Wait until all SuperNodes are online."""
        words = ("supernode", "list", "deployment", "--format", "json")
        until = time.monotonic() + 60.0
        while time.monotonic() < until:
            text = self._started.flwr(*words)
            if text.count('"online"') == len(self._started.nodes):
                return
            time.sleep(1.0)
        raise RuntimeError(f"not all SuperNodes are online: {text}")

    def run(self, app: str, num_rounds: int) -> RunCost:
        """Run one of the apps to its end."""
        times = self._folder / f"{app}.times"
        times.unlink(missing_ok=True)
        messages = self._num_messages()
        nodes = [p.pid for n, p in self._started.processes if "supernode" in n]
        watch = _CpuWatch(nodes)
        watch.start()
        words = ["run", str(self._folder / app), "deployment", "--stream"]
        words += ["--run-config", f"num-server-rounds={num_rounds}"]
        log = self._started.flwr(*words)
        cpu_seconds = watch.ended()
        ends = [float(line) for line in times.read_text().split()]
        if len(ends) != num_rounds + 1:
            raise RuntimeError(f"{app} ends after {len(ends) - 1} rounds:\n{log}")
        return RunCost(
            app=app,
            round_seconds=tuple(b - a for a, b in pairwise(ends)),
            num_messages=self._num_messages() - messages,
            client_cpu_seconds=cpu_seconds,
        )

    def _num_messages(self) -> int:
        """Count what all SuperNodes have answered."""
        logs = self._started.folder.glob("supernode *.log")
        return sum(log.read_text(errors="replace").count(_ANSWERED) for log in logs)


class _CpuWatch(Thread):
    """Look at the processes that SuperNodes start, until each is gone.

    Flower does not wait for them, so the system adds their time to nobody's.
    """

    def __init__(self, parents: list[int]) -> None:
        super().__init__(daemon=True)
        self._parents = [psutil.Process(pid) for pid in parents]
        self._seconds: dict[tuple[int, float], float] = {}
        self._is_over = Event()

    def run(self) -> None:
        """Keep what each process had used when it was last seen."""
        while not self._is_over.wait(_LOOK_SECONDS):
            for parent in self._parents:
                for child in parent.children(recursive=True):
                    with suppress(psutil.Error):
                        times = child.cpu_times()
                        key = child.pid, child.create_time()
                        self._seconds[key] = times.user + times.system

    def ended(self) -> float:
        """Return the CPU seconds of all; up to one look is missing of each."""
        self._is_over.set()
        self.join()
        return sum(self._seconds.values())


def copy_apps(folder: Path) -> None:
    """Copy both apps, to change the copies."""
    for app in (BEFORE, AFTER):
        place = EXAMPLE.parent / "existing_fedavg_app" / app
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(place, folder / app, ignore=ignored)


@contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    """Start the deployment, and stop it."""
    copy_apps(folder)
    module = launcher()
    module.HERE, module.TASK = folder / AFTER, _TASK
    with launched(folder / "deployment") as started:
        made = Deployment(started, folder)
        made.wait_for_nodes()
        yield made


def shown(costs: list[RunCost]) -> Table:
    """Lay it out, for people."""
    table = Table("", box=None)
    for name in ("round 1, s", "later, s", "messages", "CPU of clients, s"):
        table.add_column(name, justify="right")
    table.add_column("a message, s", justify="right")
    for each in costs:
        first, *later = (f"{seconds:.1f}" for seconds in each.round_seconds)
        table.add_row(
            each.app,
            first,
            " ".join(later),
            str(each.num_messages),
            f"{each.client_cpu_seconds:.1f}",
            f"{each.cpu_seconds_per_message:.2f}",
        )
    return table


def ratios(costs: list[RunCost]) -> dict[str, float]:
    """Compare after with before, by medians over runs and rounds."""
    before, after = (
        _medians([each for each in costs if each.app == app]) for app in (BEFORE, AFTER)
    )
    return {name: after[name] / before[name] for name in before}


def _medians(costs: list[RunCost]) -> dict[str, float]:
    values = {
        "round 1": [each.round_seconds[0] for each in costs],
        "later rounds": [s for each in costs for s in each.round_seconds[1:]],
        "CPU a message": [each.cpu_seconds_per_message for each in costs],
        "messages": [float(each.num_messages) for each in costs],
    }
    return {name: statistics.median(found) for name, found in values.items()}


def main(
    rounds: Annotated[int, typer.Option(min=2, help="of each run")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each app")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Run both apps in turn on the same nodes."""
    with TemporaryDirectory(prefix="deployed-rounds-") as folder:
        with deployed(Path(folder)) as deployment:
            apps = [BEFORE, AFTER] * repeats
            costs = [deployment.run(app, rounds) for app in apps]
    found = ratios(costs)
    if as_json:
        rows = [asdict(each) for each in costs]
        typer.echo(json.dumps({"runs": rows, "ratios": found}))
        return
    console = Console()
    console.print(shown(costs))
    text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items())
    console.print(f"after / before: {text}")


if __name__ == "__main__":
    typer.run(main)
