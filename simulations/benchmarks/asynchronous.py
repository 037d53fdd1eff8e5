"""Time to accuracy of asynchronous and synchronous runs on phones, in simulated time.

``python -m simulations.benchmarks.asynchronous --seeds 0 1 2``: digits, Dirichlet 0.1,
10 of 20 phones at once. All rules go on until as many replies are merged as in 60
synchronous rounds; they are compared at the time at which 20 of those end, and by when
they first have the accuracy that those end with.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import (
    AsyncSmartSplit,
    DynamicStaleness,
    Planning,
    PolynomialStaleness,
)
from flwr_smartsplit.server.aggregation import Mixing, Replace
from simulations.experiments.clients import build_task, edges_of
from simulations.experiments.data import evaluation_loader, load_images
from simulations.experiments.experiment import Experiment
from simulations.experiments.local_grid import LocalGrid
from simulations.experiments.models import model_fn
from simulations.experiments.partitions import Dirichlet
from simulations.experiments.runner import (
    client_app_of,
    evaluation_row,
    initial_model,
    prepared_fleet,
    quiet_libraries,
)
from simulations.fleets.presets import phones_near_edge
from simulations.fleets.virtual_grid import VirtualGrid, seconds_by

AT_ONCE = 10
SYNCHRONOUS = "synchronous"
ROUNDS_COMPARED = 20
MORE = 3
"""How many times the work of the rounds compared is done in all."""

EXPERIMENT = Experiment(
    name="asynchronous",
    methods=("smartsplit",),
    fleet=phones_near_edge,
    partition=Dirichlet(alpha=0.1),
    num_rounds=ROUNDS_COMPARED,
    in_process=True,
)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a run merges."""

    merge_every: int
    mixing: Mixing


RULES = {
    SYNCHRONOUS: Rule(AT_ONCE, Replace()),
    "FedAsync": Rule(1, PolynomialStaleness()),
    "FedBuff, 5": Rule(5, PolynomialStaleness(alpha=1.0)),
    "FedASMU, as published": Rule(1, DynamicStaleness.as_published()),
    "FedASMU, iota 0.3": Rule(1, DynamicStaleness()),
}


@dataclass(frozen=True, slots=True)
class Point:
    """The model after a round: when in simulated seconds, and its accuracy."""

    seconds: float
    accuracy: float


def measured(experiment: Experiment, rule: Rule, *, num_rounds: int) -> list[Point]:
    """Run one rule; return a point after each round, the initial model first."""
    prepared = prepared_fleet(experiment)
    apps = [client_app_of(experiment, prepared)] * experiment.num_clients
    grid = VirtualGrid(LocalGrid(apps), seconds_by(prepared.clock))
    model = initial_model(model_fn(experiment), experiment.seed)
    loader = evaluation_loader(experiment)
    num_classes = load_images(experiment).num_classes
    points: list[Point] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        model.load_state_dict(arrays.to_torch_state_dict())
        batches = [(model.eval()(x).detach(), y) for x, y in loader]
        row = evaluation_row(number, batches, num_classes=num_classes)
        points.append(Point(grid.seconds(), row.accuracy))
        return None

    strategy = AsyncSmartSplit(
        build_task(experiment),
        edges_of(experiment),
        clients_at_once=min(AT_ONCE, experiment.num_clients),
        merge_every=rule.merge_every,
        mixing=rule.mixing,
        strategy=FedAvg(
            fraction_evaluate=0.0, min_available_nodes=experiment.num_clients
        ),
        planning=Planning(client_seconds=prepared.clock.client_seconds),
        seed=experiment.seed,
        journal=None,
    )
    first = ArrayRecord(model.state_dict())
    strategy.start(grid, first, num_rounds=num_rounds, evaluate_fn=evaluate)
    return points


def at(points: Sequence[Point], seconds: float) -> float:
    """Return the accuracy of the newest model at a time."""
    return [point.accuracy for point in points if point.seconds <= seconds][-1]


def reached(points: Sequence[Point], accuracy: float) -> float | None:
    """Return when a model first had an accuracy; None if none had."""
    times = (point.seconds for point in points if point.accuracy >= accuracy)
    return next(times, None)


def table(experiment: Experiment) -> list[str]:
    """Run all rules with one seed, and write their lines."""
    rounds = experiment.num_rounds
    runs = {
        name: measured(experiment, rule, num_rounds=MORE * rounds)
        for name, rule in RULES.items()
    }
    end = runs[SYNCHRONOUS][rounds]
    lines = [f"seed {experiment.seed}: {rounds} rounds end at {end.seconds:.0f} s"]
    for name, points in runs.items():
        replies = AT_ONCE * sum(0 < p.seconds <= end.seconds for p in points)
        when = reached(points, end.accuracy)
        share = "never" if when is None else f"{when / end.seconds:.2f} of the time"
        lines.append(
            f"{name:22} {at(points, end.seconds):.3f} after about {replies} replies; "
            f"{points[rounds].accuracy:.3f} after {AT_ONCE * rounds}; "
            f"{end.accuracy:.3f} after {share}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS_COMPARED)
    given = parser.parse_args(arguments)
    with quiet_libraries(verbose=False):
        for seed in given.seeds:
            asked = replace(EXPERIMENT, seed=seed, num_rounds=given.rounds)
            sys.stdout.write("\n".join(table(asked)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
