"""How rounds grow: ``python -m simulations.benchmarks.rounds.growth``.

All clients are split over Ray. First, rounds of the quickstart's small network with
more and more clients: what a client takes should stay. Then, ResNet-18 cut so early
that an edge does nearly all of the work: two edges should take half as long, as long as
there are cores. Rounds of one edge and of two take turns.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
import typer
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from flwr_smartsplit import Planning, RayEdge, SmartSplit
from flwr_smartsplit.edge.hosts.edge import Edge
from simulations.benchmarks.peers.jobs import (
    JOBS,
    Job,
    build_app,
    split_at,
    task_of,
)
from simulations.benchmarks.rounds.driven_rounds import (
    MessageRounds,
    close,
    timed_round,
)
from simulations.experiments.local_grid import awaited_nodes
from simulations.experiments.runner import quiet_libraries, simulate_app
from simulations.report.progress import progress_bar

EDGES = (RayEdge(name="one"), RayEdge(name="two"))
LIGHT = replace(JOBS["digits"], num_batches=4)
# Behind the first max-pool: a tenth of the work, and the smallest boundary.
HEAVY = replace(JOBS["resnet18"], num_batches=2, cut_share=3 / 14)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """The rounds of one number of clients, workers and edges."""

    num_clients: int
    num_workers: int
    num_edges: int
    seconds: float  # Of a round, the median

    @property
    def client_ms(self) -> float:
        """What one client more takes."""
        return 1e3 * self.seconds / self.num_clients


def strategy_of(job: Job, edges: tuple[Edge, ...], share: float) -> SmartSplit:
    """Make a strategy that samples a share of all clients, and splits each."""
    return SmartSplit(
        task_of(job),
        edges,
        strategy=FedAvg(
            fraction_train=share,
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_available_nodes=1,
        ),
        planning=Planning(choose_route=partial(split_at, job)),
        journal=None,
    )


def share_of(size: int, most: int) -> float:
    """Return a fraction of which Flower, which rounds down, makes so many."""
    return min(1.0, (size + 0.5) / most)


def measure(
    job: Job,
    sizes: list[int],
    num_workers: int,
    num_rounds: int,
    *,
    on_round: Callable[[], None],
) -> list[Grown]:
    """Run rounds of every size, after a first one each, over one edge and over two."""
    found: list[Grown] = []

    def main(grid: Grid) -> None:
        awaited_nodes(grid, max(sizes))
        for size in sizes:
            strategies = [
                strategy_of(job, EDGES[:count], share_of(size, max(sizes)))
                for count in range(1, len(EDGES) + 1)
            ]
            ways = [MessageRounds(s, grid, job.state(), {}) for s in strategies]
            times = _in_turn(ways, num_rounds, on_round)
            found.extend(
                Grown(
                    num_clients=size,
                    num_workers=num_workers,
                    num_edges=count,
                    seconds=statistics.median(taken),
                )
                for count, taken in enumerate(times, start=1)
            )

    app = build_app(job, EDGES)
    simulate_app(app, main, num_clients=max(sizes), num_workers=num_workers)
    return found


def _in_turn(
    ways: list[MessageRounds], num_rounds: int, on_round: Callable[[], None]
) -> list[list[float]]:
    """Time the rounds of each way, but for the first, and end it."""
    times: list[list[float]] = [[] for _ in ways]
    try:
        for number in range(1, num_rounds + 2):
            for way, taken in zip(ways, times, strict=True):
                taken.append(timed_round(way, number).seconds)
                on_round()
    finally:
        for way in ways:
            close(way.strategy)
    return [taken[1:] for taken in times]


def growth_table(title: str, found: list[Grown]) -> Table:
    """Lay out a row for each number of clients and workers."""
    table = Table("clients", "workers", title=title, title_justify="left", box=None)
    for count in range(1, len(EDGES) + 1):
        for column in ("s/round", "ms/client"):
            edges = "1 edge" if count == 1 else f"{count} edges"
            table.add_column(f"{edges}, {column}", justify="right")
    table.add_column("faster", justify="right")
    rows: dict[tuple[int, int], dict[int, Grown]] = {}
    for each in found:
        row = rows.setdefault((each.num_clients, each.num_workers), {})
        row[each.num_edges] = each
    for (num_clients, num_workers), by_edges in rows.items():
        times = [
            text
            for each in by_edges.values()
            for text in (f"{each.seconds:.2f}", f"{each.client_ms:.1f}")
        ]
        one, two = by_edges[1].seconds, by_edges[2].seconds
        table.add_row(str(num_clients), str(num_workers), *times, f"{one / two:.2f}x")
    return table


def main(
    *,
    clients: Annotated[str, typer.Option(help="With commas.")] = "10,30,100,300",
    workers: Annotated[str, typer.Option(help="Clients at once.")] = "1,2,4",
    rounds: Annotated[int, typer.Option(min=1, help="After the first.")] = 3,
    heavy_clients: Annotated[int, typer.Option(min=2)] = 8,
) -> None:
    """Time rounds with more and more clients, workers and edges."""
    sizes, crews = (
        [int(part) for part in text.split(",")] for text in (clients, workers)
    )
    torch.set_num_threads(1)
    jobs = {
        "small steps, cut in the middle": (LIGHT, sizes, crews),
        "an edge with nearly all of the work": (HEAVY, [heavy_clients], [max(crews)]),
    }
    console = Console()
    for title, (job, counts, at_once) in jobs.items():
        found: list[Grown] = []
        with quiet_libraries(verbose=False), progress_bar() as progress:
            total = len(at_once) * len(counts) * len(EDGES) * (rounds + 1)
            bar = progress.add_task(title, total=total)
            step = partial(progress.advance, bar)
            for crew in at_once:
                found += measure(job, counts, crew, rounds, on_round=step)
        console.print(growth_table(title, found))
    console.print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    typer.run(main)
