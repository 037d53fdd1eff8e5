"""What a round costs besides training.

``python -m simulations.benchmarks.rounds.round_overhead``.

Clients with next to nothing to do take part in rounds of Flower's FedAvg and of
SmartSplit, in turn: the same clients, none with a budget, so that all train the whole
model. What SmartSplit adds is planning, checking, merging and its journal. Flower looks
for messages every 0.1 s, and its legacy server has a pool of min(32, CPUs + 4) threads:
both limit all rows alike.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from flwr.server import SimpleClientManager
from flwr.server import strategy as legacy
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from flwr_smartsplit import LegacySmartSplit, Planning, Route, SmartSplit
from flwr_smartsplit.plan.routes import RouteRequest
from simulations.benchmarks.rounds.driven_rounds import (
    LegacyRounds,
    MessageRounds,
    Rounds,
    RoundTime,
    close,
    timed_round,
)
from simulations.benchmarks.rounds.trivial_clients import (
    EDGES,
    PLAIN,
    build_app,
    build_task,
    initial_state,
)
from simulations.experiments.local_grid import awaited_nodes
from simulations.experiments.runner import quiet_libraries, simulate_app
from simulations.report.progress import progress_bar

PLAIN_FEDAVG = "FedAvg, plain client"
FEDAVG = "FedAvg"
SMARTSPLIT = "SmartSplit"
ALL_SPLIT = "SmartSplit, all split"
APIS = ("message", "legacy")
MIN_CLIENTS = 2


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """The steady rounds of each way, in one API; ``load`` is the machine's."""

    api: str
    num_clients: int
    load: float
    rounds: dict[str, list[RoundTime]]

    def median(self, way: str, name: str = "seconds") -> float:
        """Return a way's median of one of the times."""
        return float(statistics.median(getattr(t, name) for t in self.rounds[way]))

    def values(self) -> dict[str, Any]:
        """Return JSON values, medians and ratio first."""
        medians = {way: self.median(way) for way in self.rounds}
        return {"seconds_per_round": medians, "ratio": self.ratio(), **asdict(self)}

    def ratio(self, way: str = SMARTSPLIT, base: str = FEDAVG) -> float:
        """Divide two ways' medians of the time of a round."""
        return self.median(way) / self.median(base)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one simulation measures; ``num_rounds`` counts the steady ones of each."""

    num_clients: int
    num_rounds: int
    num_workers: int
    num_hidden: int
    apis: tuple[str, ...]
    has_split: bool
    folder: Path


def message_ways(setting: Setting, grid: Grid) -> dict[str, Rounds]:
    """Set the ways up in the Message API."""
    state = initial_state(setting.num_hidden)

    def flower() -> FedAvg:
        return FedAvg(fraction_evaluate=0.0, min_available_nodes=setting.num_clients)

    strategies = {
        PLAIN_FEDAVG: flower(),
        FEDAVG: flower(),
        **_ours(SmartSplit, flower, setting, api="message"),
    }
    return {
        name: MessageRounds(strategy, grid, state, config_of(name))
        for name, strategy in strategies.items()
    }


def legacy_ways(setting: Setting, grid: Grid) -> dict[str, Rounds]:
    """Set the ways up in the legacy API."""
    state = initial_state(setting.num_hidden)

    def flower(**config: Any) -> legacy.FedAvg:
        num_clients = setting.num_clients
        return legacy.FedAvg(
            fraction_evaluate=0.0, min_available_clients=num_clients, **config
        )

    strategies = {
        PLAIN_FEDAVG: flower(on_fit_config_fn=lambda _: config_of(PLAIN_FEDAVG)),
        FEDAVG: flower(),
        **_ours(LegacySmartSplit, flower, setting, api="legacy"),
    }
    clients = SimpleClientManager()
    for node in grid.get_node_ids():
        clients.register(GridClientProxy(node, grid, grid.run.run_id))
    return {
        name: LegacyRounds(strategy, clients, state)
        for name, strategy in strategies.items()
    }


def _ours(
    strategy_fn: Callable[..., Any],
    flower: Callable[[], Any],
    setting: Setting,
    *,
    api: str,
) -> dict[str, Any]:
    """Build our strategy around Flower's, whole and with every client split."""
    task, journal = build_task(setting.num_hidden), f"{api}-{{}}.jsonl".format
    return {
        SMARTSPLIT: strategy_fn(
            task, strategy=flower(), journal=setting.folder / journal("whole")
        ),
        ALL_SPLIT: strategy_fn(
            task,
            EDGES,
            strategy=flower(),
            planning=Planning(choose_route=first_cut),
            journal=setting.folder / journal("split"),
        ),
    }


def config_of(way: str) -> dict[str, Any]:
    """Say to which client a way's messages go."""
    return {PLAIN: True} if way == PLAIN_FEDAVG else {}


def first_cut(request: RouteRequest) -> Route:
    """Split every client after the first unit."""
    return Route.whole() if request.edge is None else Route.split(1, edge=request.edge)


WAYS = {"message": message_ways, "legacy": legacy_ways}


def measure(
    api: str, setting: Setting, grid: Grid, *, on_round: Callable[[], None]
) -> Overhead:
    """Run rounds of every way in turn; the order rotates, and the first is dropped."""
    ways = WAYS[api](setting, grid)
    order = [name for name in ways if setting.has_split or name != ALL_SPLIT]
    seen: dict[str, list[RoundTime]] = {name: [] for name in order}
    try:
        for number in range(1, setting.num_rounds + 2):
            for name in order:
                seen[name].append(timed_round(ways[name], number))
                on_round()
            order = order[1:] + order[:1]
    finally:
        for rounds in ways.values():
            close(rounds.strategy)
    return Overhead(
        api=api,
        num_clients=setting.num_clients,
        load=os.getloadavg()[0],
        rounds={name: times[1:] for name, times in seen.items()},
    )


def simulate(setting: Setting, *, on_round: Callable[[], None]) -> list[Overhead]:
    """Measure every API in one simulation."""
    found: list[Overhead] = []

    def main(grid: Grid) -> None:
        awaited_nodes(grid, setting.num_clients)
        for api in setting.apis:
            found.append(measure(api, setting, grid, on_round=on_round))

    simulate_app(
        build_app(setting.num_hidden),
        main,
        num_clients=setting.num_clients,
        num_workers=setting.num_workers,
    )
    return found


def overhead_table(found: list[Overhead]) -> Table:
    """Lay out the medians of a round, for people."""
    table = Table("clients", "way", box=None)
    for column in ("s/round", "ratio", "strategy ms", "CPU ms", "load"):
        table.add_column(column, justify="right")
    for each in found:
        for way in each.rounds:
            is_first = way == PLAIN_FEDAVG
            table.add_row(
                f"{each.num_clients} {each.api}" if is_first else "",
                way,
                f"{each.median(way):.3f}",
                f"{each.ratio(way):.2f}",
                f"{1e3 * each.median(way, 'server_seconds'):.1f}",
                f"{1e3 * each.median(way, 'cpu_seconds'):.1f}",
                f"{each.load:.1f}" if is_first else "",
            )
    return table


def main(  # noqa: PLR0913 - one argument per option of the command line
    *,
    clients: Annotated[
        str, typer.Option(help="Numbers of clients, with commas.")
    ] = "10,50,100",
    rounds: Annotated[int, typer.Option(min=1, help="Steady rounds of each.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 2,
    api: Annotated[str, typer.Option(help="message, legacy or both.")] = "both",
    hidden: Annotated[
        int, typer.Option(min=1, help="Size of the model: 13 numbers for each.")
    ] = 8,
    split: Annotated[bool, typer.Option(help="Also with every client split.")] = True,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compare rounds of FedAvg and of SmartSplit whose clients do next to nothing."""
    sizes = _sizes(clients)
    if api not in (*APIS, "both"):
        raise typer.BadParameter(f"--api is {api!r}: choose message, legacy or both.")
    apis = APIS if api == "both" else (api,)
    found: list[Overhead] = []
    ways = 4 if split else 3
    with TemporaryDirectory() as folder, quiet_libraries(verbose=False):
        for size in sizes:
            setting = Setting(
                num_clients=size,
                num_rounds=rounds,
                num_workers=workers,
                num_hidden=hidden,
                apis=apis,
                has_split=split,
                folder=Path(folder) / str(size),
            )
            total = len(apis) * ways * (rounds + 1)
            with progress_bar() as progress:
                bar = progress.add_task(f"{size} clients", total=total)
                found += simulate(setting, on_round=partial(progress.advance, bar))
    if as_json:
        sys.stdout.write(json.dumps([each.values() for each in found]) + "\n")
        return
    Console().print(overhead_table(found))


def _sizes(text: str) -> list[int]:
    """Read numbers of clients; a strategy wants two at least."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < MIN_CLIENTS:
        raise typer.BadParameter(
            f"--clients is {text!r}: give numbers of at least {MIN_CLIENTS}, with "
            "commas between them."
        )
    return sizes


if __name__ == "__main__":
    typer.run(main)
