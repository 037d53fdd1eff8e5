"""What a step costs in all: ``python -m simulations.benchmarks.peers``.

Five clients train the same batches in a plain loop, as clients of Flower's FedAvg, and
with SmartSplit, all whole and all split over Ray: each in processes of its own, one
after the other, several times. CPU time is that of the whole process tree in the rounds
after the first, so start-up is left out. Only ratios within one run mean anything.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from flwr_smartsplit import Planning, Route, SmartSplit
from flwr_smartsplit.plan.routes import RouteRequest
from simulations.benchmarks.driven_rounds import MessageRounds, close, timed_round
from simulations.benchmarks.peers.jobs import (
    EDGES,
    JOBS,
    Job,
    build_app,
    task_of,
    train_plainly,
)
from simulations.benchmarks.trivial_clients import PLAIN
from simulations.experiments.errors import ExperimentError
from simulations.experiments.runner import quiet_libraries, simulate_app
from simulations.report.progress import progress_bar

LOOP = "plain loop"
FEDAVG = "FedAvg"
WHOLE = "SmartSplit, all whole"
SPLIT = "SmartSplit, all split"
WAYS = (LOOP, FEDAVG, WHOLE, SPLIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What some rounds took a step, in all processes."""

    wall_ms: float
    user_ms: float
    system_ms: float
    page_faults: float

    @property
    def cpu_ms(self) -> float:
        """All processor time."""
        return self.user_ms + self.system_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one process measures."""

    job: str
    num_clients: int
    num_rounds: int  # After the first
    num_workers: int

    @property
    def num_steps(self) -> int:
        """Steps of these rounds."""
        return self.num_rounds * self.num_clients * JOBS[self.job].num_batches


def tree_times() -> tuple[float, float, float]:
    """Add up seconds and page faults of this process and of all that it started."""
    own = psutil.Process()
    user, system, faults = 0.0, 0.0, 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            times, faults = process.cpu_times(), faults + _page_faults(process.pid)
        except psutil.NoSuchProcess:
            continue
        user += times.user + times.children_user
        system += times.system + times.children_system
    return user, system, faults


def _page_faults(pid: int) -> float:
    """Read how often the system had to give a process a page; 0 if it does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return float(text.rpartition(")")[2].split()[7])


def measure(way: str, plan: Plan) -> Spent:
    """Run the rounds of one way, and say what those after the first took a step."""
    job, marks = JOBS[plan.job], []

    def mark() -> None:
        marks.append((time.perf_counter(), *tree_times()))

    def rounds(run: Callable[[int], Any]) -> None:
        for number in range(1, plan.num_rounds + 2):
            run(number)
            if number in {1, plan.num_rounds + 1}:
                mark()

    def main(grid: Grid) -> None:
        while len(list(grid.get_node_ids())) < plan.num_clients:
            time.sleep(0.1)
        driven = _rounds(way, job, grid, plan.num_clients)
        try:
            rounds(partial(timed_round, driven))
        finally:
            close(driven.strategy)

    if way == LOOP:
        rounds(lambda _: _loop(job, plan.num_clients))
    else:
        simulate_app(
            build_app(job),
            main,
            num_clients=plan.num_clients,
            num_workers=plan.num_workers,
        )
    each = [(b - a) / plan.num_steps for a, b in zip(*marks, strict=True)]
    return Spent(
        wall_ms=1e3 * each[0],
        user_ms=1e3 * each[1],
        system_ms=1e3 * each[2],
        page_faults=each[3],
    )


def measure_apart(way: str, plan: Plan) -> Spent:
    """Measure one way in a process of its own."""
    arguments = (
        *("--job", plan.job, "--clients", str(plan.num_clients)),
        *("--rounds", str(plan.num_rounds), "--workers", str(plan.num_workers)),
    )
    done = subprocess.run(
        [sys.executable, "-m", __package__, "--only", way, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ExperimentError(f"{way} ends with {done.returncode}: {done.stderr}")
    return Spent(**json.loads(done.stdout.splitlines()[-1]))


def _loop(job: Job, num_clients: int) -> None:
    """Train as many steps as a round has, in this process."""
    for _ in range(num_clients):
        train_plainly(task_of(job).model_fn(), job)


def _rounds(way: str, job: Job, grid: Grid, num_clients: int) -> MessageRounds:
    flower = FedAvg(fraction_evaluate=0.0, min_available_nodes=num_clients)
    if way == FEDAVG:
        return MessageRounds(flower, grid, job.state(), {PLAIN: True})
    is_split = way == SPLIT
    strategy = SmartSplit(
        task_of(job),
        EDGES if is_split else (),
        strategy=flower,
        planning=Planning(choose_route=partial(_cut, job) if is_split else None),
        journal=None,
    )
    return MessageRounds(strategy, grid, job.state(), {})


def _cut(job: Job, request: RouteRequest) -> Route:
    """Split every client at the same unit."""
    if request.edge is None:
        return Route.whole()
    cut = max(1, round(job.cut_share * len(request.profile.units)))
    return Route.split(cut, edge=request.edge)


def table_of(job: str, found: dict[str, list[Spent]]) -> Table:
    """Lay out the medians of a step, for people; ratios are those within a repeat."""
    table = Table(job, box=None)
    columns = "CPU ms/step", "of it system", "page faults", "over loop", "over FedAvg"
    for column in (*columns, "wall ms/step"):
        table.add_column(column, justify="right")
    for way, spent in found.items():
        ratios = [
            statistics.median(
                one.cpu_ms / other.cpu_ms
                for one, other in zip(spent, found[base], strict=True)
            )
            for base in (LOOP, FEDAVG)
        ]
        names = "cpu_ms", "system_ms", "page_faults", "wall_ms"
        cpu, system, faults, wall = (
            statistics.median(getattr(each, name) for each in spent) for name in names
        )
        table.add_row(
            way,
            *(f"{cpu:.2f}", f"{system:.2f}", f"{faults:.0f}"),
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{wall:.2f}",
        )
    return table


def main(  # noqa: PLR0913 - one argument per option of the command line
    *,
    job: Annotated[str, typer.Option(help=f"{' or '.join(JOBS)}.")] = "digits",
    clients: Annotated[int, typer.Option(min=2)] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="After the first.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Of each way, in turn.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 1,
    only: Annotated[str, typer.Option(help="Measure this way here, as JSON.")] = "",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compare the CPU time of a training step in all processes."""
    if job not in JOBS:
        raise typer.BadParameter(f"--job is {job!r}: choose {' or '.join(JOBS)}.")
    torch.set_num_threads(1)
    plan = Plan(job=job, num_clients=clients, num_rounds=rounds, num_workers=workers)
    if only:
        with quiet_libraries(verbose=False):
            spent = measure(only, plan)
        sys.stdout.write(json.dumps(asdict(spent)) + "\n")
        return
    found: dict[str, list[Spent]] = {way: [] for way in WAYS}
    with progress_bar() as progress:
        bar = progress.add_task(job, total=len(WAYS) * repeats)
        for _ in range(repeats):
            for way in WAYS:
                found[way].append(measure_apart(way, plan))
                progress.advance(bar)
    if as_json:
        rows = {way: list(map(asdict, spent)) for way, spent in found.items()}
        load = os.getloadavg()[0]
        sys.stdout.write(json.dumps({"load": load, "ways": rows}) + "\n")
        return
    Console().print(table_of(job, found))


if __name__ == "__main__":
    typer.run(main)
