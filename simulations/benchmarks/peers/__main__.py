"""What a step costs in all: ``python -m simulations.benchmarks.peers``.

Five clients train the same batches in a plain loop, as clients of Flower's FedAvg, and
with SmartSplit, all whole and all split over Ray; and, from copies that are named, with
SplitFed V1 and slower. The plain loop also runs with pauses: a core that waits between
two steps comes back slower. "Two bare processes" are the least that a split step takes:
torch and a socket. Each runs in processes of its own, one after the other,
several times. CPU time is that of the whole process tree in the rounds
after the first, so start-up is left out. Only ratios within one run mean anything.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from flwr_smartsplit import Planning, RayEdge, SmartSplit
from simulations.benchmarks.peers.bare_split import bare_split
from simulations.benchmarks.peers.jobs import (
    JOBS,
    Job,
    batches_of,
    build_app,
    halves_of,
    split_at,
    task_of,
    train_plainly,
)
from simulations.benchmarks.peers.splitfed import SplitFed
from simulations.benchmarks.peers.work import Marks, Spent
from simulations.benchmarks.rounds.driven_rounds import (
    MessageRounds,
    close,
    timed_round,
)
from simulations.benchmarks.rounds.trivial_clients import PLAIN
from simulations.experiments.errors import ExperimentError
from simulations.experiments.local_grid import awaited_nodes
from simulations.experiments.runner import quiet_libraries, simulate_app
from simulations.report.progress import progress_bar

EDGES = (RayEdge(),)
LOOP = "plain loop"
PAUSING = "plain loop, pausing"
BARE = "two bare processes"
FEDAVG = "FedAvg"
WHOLE = "SmartSplit, all whole"
SPLIT = "SmartSplit, all split"
SPLITFED = "SplitFed V1"
SLOWER = "slower"
SLOWER_MODULE = f"{__package__}.slower"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one process measures."""

    job: str
    num_clients: int
    num_rounds: int  # After the first
    num_workers: int
    splitfed: Path | None = None
    slower: Path | None = None

    @property
    def ways(self) -> list[str]:
        """What is compared: the copies only if there are some."""
        copies = {SPLITFED: self.splitfed, SLOWER: self.slower}
        named = [way for way, path in copies.items() if path is not None]
        return [LOOP, PAUSING, BARE, *named, FEDAVG, WHOLE, SPLIT]

    @property
    def num_steps(self) -> int:
        """Steps of these rounds."""
        return self.num_rounds * self.num_clients * JOBS[self.job].num_batches


def measure(way: str, plan: Plan) -> Spent:
    """Run the rounds of one way, and say what those after the first took a step."""
    job, marks = JOBS[plan.job], Marks(plan.num_rounds)

    def rounds(run: Callable[[int], Any]) -> None:
        for number in range(1, plan.num_rounds + 2):
            run(number)
            marks.ended(number)

    def main(grid: Grid) -> None:
        awaited_nodes(grid, plan.num_clients)
        driven = _rounds(way, job, grid, plan.num_clients)
        try:
            rounds(partial(timed_round, driven))
        finally:
            close(driven.strategy)

    if way in {LOOP, PAUSING}:
        rounds(lambda _: _loop(job, plan.num_clients, pauses=way == PAUSING))
    elif way == BARE:
        with bare_split(halves_of(job), batches_of(job)) as train:
            rounds(lambda _: [train() for _ in range(plan.num_clients)])
    elif way == SPLITFED and plan.splitfed is not None:
        splitfed = SplitFed(plan.splitfed, plan.num_clients, batches_of(job))
        rounds(lambda _: splitfed.round())
    else:
        simulate_app(
            build_app(job, EDGES),
            main,
            num_clients=plan.num_clients,
            num_workers=plan.num_workers,
        )
    return marks.spent(plan.num_steps)


def measure_apart(way: str, plan: Plan) -> Spent:
    """Measure one way in processes of its own."""
    job, python = JOBS[plan.job], sys.executable
    arguments = ["--clients", plan.num_clients, "--rounds", plan.num_rounds]
    if way == SLOWER:
        python, module = str(plan.slower), SLOWER_MODULE
        arguments += ["--batch-size", job.batch_size, "--batches", job.num_batches]
        arguments += ["--side", job.input_shape[-1]]
    else:
        module = str(__package__)
        arguments += ["--only", way, "--job", plan.job, "--workers", plan.num_workers]
        arguments += ["--splitfed", plan.splitfed] if way == SPLITFED else []
    done = subprocess.run(
        [python, "-m", module, *map(str, arguments)],
        # Else an error takes minutes: all tensors around it are printed.
        env=os.environ | {"TYPER_STANDARD_TRACEBACK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ExperimentError(f"{way} ends with {done.returncode}: {done.stderr}")
    return Spent(**json.loads(done.stdout.splitlines()[-1]))


def _loop(job: Job, num_clients: int, *, pauses: bool = False) -> None:
    """Train as many steps as a round has, in this process."""
    for _ in range(num_clients):
        train_plainly(task_of(job).model_fn(), job, pauses=pauses)


def _rounds(way: str, job: Job, grid: Grid, num_clients: int) -> MessageRounds:
    flower = FedAvg(fraction_evaluate=0.0, min_available_nodes=num_clients)
    if way == FEDAVG:
        return MessageRounds(flower, grid, job.state(), {PLAIN: True})
    is_split = way == SPLIT
    strategy = SmartSplit(
        task_of(job),
        EDGES if is_split else (),
        strategy=flower,
        planning=Planning(choose_route=partial(split_at, job) if is_split else None),
        journal=None,
    )
    return MessageRounds(strategy, grid, job.state(), {})


def in_turn(plan: Plan, repeats: int) -> dict[str, list[Spent]]:
    """Measure all ways, one after the other, several times."""
    found: dict[str, list[Spent]] = {way: [] for way in plan.ways}
    with progress_bar() as progress:
        bar = progress.add_task(plan.job, total=len(found) * repeats)
        for _ in range(repeats):
            for way, each in found.items():
                each.append(measure_apart(way, plan))
                progress.advance(bar)
    return found


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
    splitfed: Annotated[
        Path | None, typer.Option(help="A copy of SFLV1_ResNet_HAM10000.py.")
    ] = None,
    slower: Annotated[
        Path | None, typer.Option(help="A Python with Flower 1.9, and slower.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compare the CPU time of a training step in all processes."""
    if job not in JOBS:
        raise typer.BadParameter(f"--job is {job!r}: choose {' or '.join(JOBS)}.")
    if (splitfed or slower) and job != "resnet18":
        raise typer.BadParameter("the copies train --job resnet18 only.")
    torch.set_num_threads(1)
    counts = {"num_clients": clients, "num_rounds": rounds, "num_workers": workers}
    plan = Plan(job=job, splitfed=splitfed, slower=slower, **counts)
    if only:
        with quiet_libraries(verbose=False):
            spent = measure(only, plan)
        sys.stdout.write(json.dumps(asdict(spent)) + "\n")
        return
    found = in_turn(plan, repeats)
    if as_json:
        rows = {way: list(map(asdict, spent)) for way, spent in found.items()}
        report = {"load": os.getloadavg()[0], "ways": rows}
        sys.stdout.write(json.dumps(report) + "\n")
        return
    Console().print(table_of(job, found))


if __name__ == "__main__":
    typer.run(main)
