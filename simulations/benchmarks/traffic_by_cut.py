"""What crosses each cut of a model with each codec, as a picture.

``python -m simulations.benchmarks.traffic_by_cut docs/images/traffic_by_cut.svg``: what
the planner counts, exactly, but for ``Packed``, which depends on the values. There two
clients train the quickstart's network for a round on each cut, and the journal says
what crossed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure

from flwr_smartsplit import (
    Float16,
    Integer,
    Packed,
    Raw,
    Route,
    RouteRequest,
    TopK,
)
from flwr_smartsplit.plan.coding import route_profile
from flwr_smartsplit.plan.timing import work_of
from flwr_smartsplit.types import ChainProfile, Codec
from simulations.experiments.clients import build_task
from simulations.experiments.experiment import Experiment
from simulations.experiments.local_grid import LocalGrid
from simulations.experiments.partitions import Iid
from simulations.experiments.rows import read_run
from simulations.experiments.runner import (
    Prepared,
    client_app_of,
    prepared_fleet,
    quiet_libraries,
    run_method,
)
from simulations.fleets.presets import unlimited
from simulations.methods.method import Method, Setting, split_strategy
from simulations.report.style import OTHER_COLOURS, WIDTH_INCHES, svg_of

CODECS: dict[str, Codec] = {
    "Raw": Raw(),
    "Packed": Packed(),
    "Float16": Float16(),
    "Integer, 8 bits": Integer(),
    "Integer, 4 bits": Integer(bits=4),
    "TopK, 10 %": TopK(fraction=0.1),
}

EXPERIMENT = Experiment(
    name="traffic_by_cut",
    methods=("smartsplit",),
    fleet=unlimited,
    partition=Iid(),
    num_clients=2,
    num_rounds=1,
    max_train_examples=64,
    max_test_examples=16,
    in_process=True,
)

ByCut = dict[str, list[float]]
"""For each codec bytes per example, both ways, from the first cut on."""


def cut_at(cut: int) -> Callable[[RouteRequest], Route]:
    """Return the rule that cuts everybody there."""
    return lambda request: Route.split(cut, edge=request.edge or "")


def priced(profile: ChainProfile, cut: int, codec: Codec) -> float:
    """Return the bytes that the planner counts for each example."""
    route = Route.split(cut)
    work = work_of(route_profile(profile, route, (codec,)), route)
    return (work.up_bytes + work.down_bytes) / profile.batch_size


def measured(prepared: Prepared, cut: int, codec: Codec, out: Path) -> float:
    """Train a round with one cut, and return what crossed it for each example."""
    setting = Setting(
        experiment=EXPERIMENT,
        task=build_task(EXPERIMENT),
        journal=out / f"{cut} {codec}.jsonl",
        devices=prepared.devices,
        clock=prepared.clock,
    )
    method = Method(
        name="one_cut",
        summary="everybody at one cut",
        strategy_fn=lambda setting: split_strategy(
            setting, more={"codec": codec}, choose_route=cut_at(cut)
        ),
    )
    grid = LocalGrid([client_app_of(EXPERIMENT, prepared)] * EXPERIMENT.num_clients)
    run_method(method, setting, grid, on_round=lambda name, row: None)
    rows = read_run(setting.journal).training()
    num_bytes = sum(row.edge_bytes_up + row.edge_bytes_down for row in rows)
    return num_bytes / sum(row.num_examples for row in rows)


def bytes_by_cut() -> tuple[list[str], ByCut]:
    """Return the names of the units before each cut, and what crosses there."""
    prepared = prepared_fleet(EXPERIMENT)
    profile = prepared.clock.profile
    cuts = range(1, len(profile.units))
    found = {
        name: [priced(profile, cut, codec) for cut in cuts]
        for name, codec in CODECS.items()
    }
    with TemporaryDirectory() as folder, quiet_libraries(verbose=False):
        found["Packed"] = [
            measured(prepared, cut, Packed(), Path(folder)) for cut in cuts
        ]
    return [unit.name for unit in profile.units[:-1]], found


def drawn(found: tuple[list[str], ByCut]) -> Figure:
    """Draw a line for each codec over the cuts."""
    units, by_codec = found
    figure = Figure(figsize=(WIDTH_INCHES, 4.2))
    axes = figure.subplots()
    colours = ("#6b7280", *OTHER_COLOURS)
    for (name, values), colour in zip(by_codec.items(), colours, strict=False):
        kilobytes = [value / 1000 for value in values]
        axes.plot(
            range(len(units)), kilobytes, "o-", color=colour, lw=1.6, ms=4, label=name
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(units)), units, rotation=35, ha="right")
    axes.set(xlabel="cut behind", ylabel="kB for each example, both ways")
    axes.set_title("What crosses each cut of the quickstart's network")
    figure.legend(loc="outside right center")
    return figure


def main() -> None:
    """Measure, print a table, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="where the SVG file goes")
    picture: Path = parser.parse_args().picture
    torch.set_num_threads(1)
    units, by_codec = bytes_by_cut()
    lines = [" | ".join(["cut behind", *by_codec])]
    for index, unit in enumerate(units):
        cells = [f"{values[index]:,.0f}" for values in by_codec.values()]
        lines.append(" | ".join([unit, *cells]))
    sys.stdout.write("".join(f"| {line} |\n" for line in lines))
    picture.write_text(svg_of(drawn, (units, by_codec)), encoding="utf-8")


if __name__ == "__main__":
    main()
