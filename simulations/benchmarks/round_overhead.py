"""What a round costs besides training.

``python -m simulations.benchmarks.round_overhead``.

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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from cProfile import Profile
from dataclasses import asdict, dataclass
from pathlib import Path
from pstats import Stats
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from flwr.app import Context
from flwr.server import SimpleClientManager
from flwr.server import strategy as legacy
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Table

from flwr_smartsplit import LegacySmartSplit, Planning, Route, SmartSplit
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.edge.weighted_mean import add_states, merge
from flwr_smartsplit.flower import messages
from flwr_smartsplit.flower.journal.journal import Journal
from flwr_smartsplit.flower.legacy_registry import LegacyFleet
from flwr_smartsplit.flower.registry import Fleet
from flwr_smartsplit.flower.round_exchange import Dispatch
from flwr_smartsplit.plan.rounds import plan_round
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.server.acceptance import check_reply
from simulations.benchmarks.driven_rounds import (
    LegacyRounds,
    MessageRounds,
    Rounds,
    RoundTime,
    timed_round,
)
from simulations.benchmarks.trivial_clients import (
    EDGES,
    PLAIN,
    build_app,
    build_task,
    initial_state,
)
from simulations.experiments.runner import quiet_libraries

PLAIN_FEDAVG = "FedAvg, plain client"
FEDAVG = "FedAvg"
SMARTSPLIT = "SmartSplit"
ALL_SPLIT = "SmartSplit, all split"
APIS = ("message", "legacy")
MIN_CLIENTS = 2

PARTS: dict[str, tuple[Callable[..., Any], ...]] = {
    "who is there": (Fleet.members, LegacyFleet.clients),
    "planning": (plan_round,),
    "writing messages": (messages.written, LegacySmartSplit._written),
    "reading replies": (Dispatch.collect,),
    "checking": (check_reply,),
    "merging": (add_states, merge),
    "journal": (Journal.write,),
    "all digests": (state_digest,),
}
"""What the time in the strategy is told apart by; digests are part of reading, too."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """The rounds of one API with one number of clients.

    Parameters
    ----------
    api : str
        One of Flower's two.
    num_clients : int
        How many take part in each round.
    load : float
        Of the machine, at the end.
    rounds : dict[str, list[RoundTime]]
        The steady rounds of each way.
    parts : dict[str, float]
        Fractions of the time in SmartSplit's own code, from a profiled round.
    """

    api: str
    num_clients: int
    load: float
    rounds: dict[str, list[RoundTime]]
    parts: dict[str, float]

    def median(self, way: str, name: str = "seconds") -> float:
        """Return a way's median of one of the times."""
        return float(statistics.median(getattr(t, name) for t in self.rounds[way]))

    def ratio(self, way: str = SMARTSPLIT, base: str = FEDAVG) -> float:
        """Divide two ways' medians of the time of a round."""
        return self.median(way) / self.median(base)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one simulation measures.

    Parameters
    ----------
    num_clients, num_rounds, num_workers, num_hidden : int
        Steady rounds per way, clients at once, and the size of the model.
    apis : tuple[str, ...]
        Some of Flower's two.
    has_split : bool
        Whether a way is measured in which every client is split.
    folder : Path
        Where journals go.
    """

    num_clients: int
    num_rounds: int
    num_workers: int
    num_hidden: int
    apis: tuple[str, ...]
    has_split: bool
    folder: Path


def message_ways(setting: Setting, grid: Grid) -> dict[str, Rounds]:
    """Set the ways up in the Message API."""
    task, state = build_task(setting.num_hidden), initial_state(setting.num_hidden)
    shared: dict[str, Any] = {
        "min_available_nodes": setting.num_clients,
        "fraction_evaluate": 0.0,
    }
    ours, split = (
        setting.folder / f"message-{way}.jsonl" for way in ("whole", "split")
    )
    strategies = {
        PLAIN_FEDAVG: FedAvg(**shared),
        FEDAVG: FedAvg(**shared),
        SMARTSPLIT: SmartSplit(task, strategy=FedAvg(**shared), journal=ours),
        ALL_SPLIT: SmartSplit(
            task,
            EDGES,
            strategy=FedAvg(**shared),
            planning=Planning(choose_route=first_cut),
            journal=split,
        ),
    }
    return {
        name: MessageRounds(strategy, grid, state, config_of(name))
        for name, strategy in strategies.items()
    }


def legacy_ways(setting: Setting, grid: Grid) -> dict[str, Rounds]:
    """Set the ways up in the legacy API."""
    task, state = build_task(setting.num_hidden), initial_state(setting.num_hidden)
    shared: dict[str, Any] = {
        "min_available_clients": setting.num_clients,
        "fraction_evaluate": 0.0,
    }
    ours, split = (setting.folder / f"legacy-{way}.jsonl" for way in ("whole", "split"))
    strategies: dict[str, legacy.Strategy] = {
        PLAIN_FEDAVG: legacy.FedAvg(
            on_fit_config_fn=lambda _: config_of(PLAIN_FEDAVG), **shared
        ),
        FEDAVG: legacy.FedAvg(**shared),
        SMARTSPLIT: LegacySmartSplit(
            task, strategy=legacy.FedAvg(**shared), journal=ours
        ),
        ALL_SPLIT: LegacySmartSplit(
            task,
            EDGES,
            strategy=legacy.FedAvg(**shared),
            planning=Planning(choose_route=first_cut),
            journal=split,
        ),
    }
    clients = SimpleClientManager()
    for node in grid.get_node_ids():
        clients.register(GridClientProxy(node, grid, grid.run.run_id))
    return {
        name: LegacyRounds(strategy, clients, state)
        for name, strategy in strategies.items()
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
    profile = Profile()
    try:
        for number in range(1, setting.num_rounds + 2):
            for name in order:
                seen[name].append(timed_round(ways[name], number))
                on_round()
            order = order[1:] + order[:1]
        timed_round(ways[SMARTSPLIT], setting.num_rounds + 2, profile)
    finally:
        for rounds in ways.values():
            rounds.close()
    return Overhead(
        api=api,
        num_clients=setting.num_clients,
        load=os.getloadavg()[0],
        rounds={name: times[1:] for name, times in seen.items()},
        parts=parts_of(profile),
    )


def parts_of(profile: Profile) -> dict[str, float]:
    """Say which fraction of the profiled time each part took."""
    profile.create_stats()
    stats: Any = Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in stats.values())
    seconds = {code: whole for code, (_, _, _, whole, _) in stats.items()}

    def fraction(function: Callable[..., Any]) -> float:
        code = function.__code__
        key = (code.co_filename, code.co_firstlineno, code.co_name)
        return float(seconds.get(key, 0.0))

    return {
        part: sum(map(fraction, functions)) / total for part, functions in PARTS.items()
    }


def simulate(setting: Setting, *, on_round: Callable[[], None]) -> list[Overhead]:
    """Measure every API in one simulation."""
    found: list[Overhead] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        while len(list(grid.get_node_ids())) < setting.num_clients:
            time.sleep(0.1)
        for api in setting.apis:
            found.append(measure(api, setting, grid, on_round=on_round))

    run_simulation(
        server_app=server_app,
        client_app=build_app(setting.num_hidden),
        num_supernodes=setting.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "address": "local",
                "num_cpus": setting.num_workers,
                "include_dashboard": False,
                "log_to_driver": False,
            },
        },
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


def parts_table(found: list[Overhead]) -> Table:
    """Lay out where SmartSplit's time in the strategy goes, for people."""
    title = "parts of SmartSplit's time in the strategy, profiled"
    table = Table("", title=title, title_justify="left", box=None)
    for each in found:
        table.add_column(f"{each.num_clients} {each.api}", justify="right")
    for part in PARTS:
        table.add_row(part, *(f"{each.parts[part]:.0%}" for each in found))
    return table


def as_values(each: Overhead) -> dict[str, Any]:
    """Turn what was found into JSON values, medians and ratio first."""
    return {
        "seconds_per_round": {way: each.median(way) for way in each.rounds},
        "ratio": each.ratio(),
        **asdict(each),
    }


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
            with _progress(f"{size} clients", total) as advance:
                found += simulate(setting, on_round=advance)
    if as_json:
        sys.stdout.write(json.dumps([as_values(each) for each in found]) + "\n")
        return
    console = Console()
    console.print(overhead_table(found))
    console.print(parts_table(found))


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


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda: progress.advance(bar)


if __name__ == "__main__":
    typer.run(main)
