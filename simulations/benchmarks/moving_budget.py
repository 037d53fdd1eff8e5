"""A budget that falls and rises in one epoch.

``python -m simulations.benchmarks.moving_budget``.

One client trains the same batches twice, along a route that its first budget allows:
once without any budget, and once while the budget falls to a fraction and comes back.
Every metered step is compared with the budget of that step, and every loss with the
other run's.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from flwr_smartsplit import MemoryBudget, Route, predicted_peak_bytes
from flwr_smartsplit.device.budget_adapter import Adapter
from flwr_smartsplit.device.local_training import Conditions, Outcome, train_locally
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.protocol import HoldState
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import bytes_text
from flwr_smartsplit.memory.budget import as_budget
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ClientPlan
from simulations.experiments.clients import build_task
from simulations.experiments.data import whole_train_loader
from simulations.experiments.experiment import Experiment
from simulations.studies.quickstart import quickstart

LEVELS = (1.0, 0.9, 0.75, 0.5, 0.3, 0.15, 0.3, 0.6, 1.0, 1.1)
"""The budget as parts of what the planned route needs, each for as many steps."""


@dataclass(frozen=True)
class Wave(MemoryBudget):
    """A budget that goes through ``LEVELS`` over so many steps."""

    full_bytes: int
    num_steps: int

    def read(self, *, step: int, live_bytes: int) -> int:
        """Say what the tensors may take at a step."""
        del live_bytes
        index = min(step * len(LEVELS) // self.num_steps, len(LEVELS) - 1)
        return int(self.full_bytes * LEVELS[index])


class Followed:
    """One run: each step's loss, budget, peak and CPU time, and the outcome.

    It looks at each step of a route, and adapts it first if there is a budget.
    """

    outcome: Outcome

    def __init__(self, adapter: Adapter | None) -> None:
        self._adapter = adapter
        self.losses: list[float] = []
        self.budgets: list[int] = []
        self.peaks: list[int] = []
        self.times: list[float] = []

    def __call__(self, runner: RouteRunner) -> None:
        """Note how the last step went; then adapt."""
        self.losses.append(runner.metrics.loss_sum)
        self.peaks.append(runner.cap.peak_bytes)
        if self._adapter is not None:
            self._adapter(runner)
        self.budgets.append(runner.cap.meter.budget_bytes or 0)
        runner.cap.meter.peak_bytes = 0  # Each step has a peak of its own.
        self.times.append(time.process_time())

    def end(self, outcome: Outcome) -> None:
        """Leave out what was noted before the first step."""
        self.outcome = outcome
        del self.losses[0], self.peaks[0]
        self.times.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        """CPU time of each step."""
        return [after - before for before, after in pairwise(self.times)]


@dataclass(frozen=True)
class Course:
    """A task, its batches, its first state, and the planned route."""

    task: Task
    batches: list[Any]
    route: Route

    def run(self, budget: MemoryBudget | None) -> Followed:
        """Train over all batches, with or without a budget."""
        batch_size = len(self.batches[0][1])
        adapter = None
        if budget is not None:
            adapter = Adapter(as_budget(budget), self.task, batch_size=batch_size)
        followed = Followed(adapter)
        edge = LocalEdge()
        address = edge.start(self.task)
        try:
            followed.end(self._trained(edge, address, followed))
        finally:
            edge.stop(address)
        return followed

    def _trained(self, edge: Edge, address: str, followed: Followed) -> Outcome:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            state = state_of(self.task.model_fn())
        digest = state_digest(state)
        edge.connect(address).send(HoldState(digest, state))
        plan = ClientPlan(
            client_key="0",
            round_number=1,
            route=self.route,
            seed=0,
            state_digest=digest,
            edge_addresses={"edge": address},
            predicted_peak_bytes=self.needed_bytes,
        )
        names = build_chain(self.task).state_names(0, self.route.cuts[0])
        conditions = Conditions(
            task=self.task,
            connect=lambda place, address: edge.connect(address),
            cap_mode="strict",
            between_steps=followed,
        )
        part = {name: state[name] for name in names}
        return train_locally(plan, part, self.batches, conditions)

    @property
    def needed_bytes(self) -> int:
        """What the planned route needs if nothing runs twice."""
        profile = profile_of(self.task, batch_size=len(self.batches[0][1]))
        return predicted_peak_bytes(profile, self.route)


def make_course(experiment: Experiment, *, cut: int | None, num_steps: int) -> Course:
    """Take whole batches of the training set, and a cut at two thirds of the model."""
    task = build_task(experiment)
    loader = whole_train_loader(experiment)
    passes = chain.from_iterable(repeat(loader))
    batches = list(islice(passes, num_steps))
    size = len(build_chain(task))
    return Course(task, batches, Route.split(cut or size * 2 // 3))


def summarised(course: Course, plain: Followed, moved: Followed) -> dict[str, Any]:
    """Compare the two runs."""
    report = moved.outcome.report
    over = [
        peak - budget
        for peak, budget in zip(moved.peaks, moved.budgets, strict=False)
        if peak > budget
    ]
    return {
        "route": str(course.route),
        "needed_bytes": course.needed_bytes,
        "num_steps": report.num_steps,
        "status": report.status.value,
        "message": report.message,
        "least_budget_bytes": min(moved.budgets),
        "steps_over_budget": len(over),
        "most_over_bytes": max(over, default=0),
        "losses_equal": moved.losses == plain.losses,
        "final_loss_equal": report.loss == plain.outcome.report.loss,
        "state_equal": _same_state(plain.outcome, moved.outcome),
        "seconds_ratio": sum(moved.seconds) / sum(plain.seconds),
        "seconds_ratio_median": _median_ratio(plain, moved),
        "moves": [asdict(move) for move in report.moves],
        "replans": [asdict(replan) for replan in report.replans],
    }


def _same_state(one: Outcome, other: Outcome) -> bool:
    """Compare the device's states and, by digest, the edges'."""
    names = one.state.keys() & other.state.keys()
    device = all(one.state[n].tobytes() == other.state[n].tobytes() for n in names)
    edges = [r.digest for r in one.receipts] == [r.digest for r in other.receipts]
    return bool(names) and device and edges


def _median_ratio(plain: Followed, moved: Followed) -> float:
    pairs = zip(moved.seconds, plain.seconds, strict=True)
    return statistics.median(own / other for own, other in pairs)


def shown(summary: dict[str, Any]) -> Table:
    """List every change, and what it was for."""
    table = Table("step", "change", "why", box=None)
    changes = [
        (m["step"], f"cut {m['before']} to {m['after']}", m["reason"])
        for m in summary["moves"]
    ] + [
        (r["step"], f"recompute {r['before']} to {r['after']}", r["reason"])
        for r in summary["replans"]
    ]
    for step, change, why in sorted(changes):
        table.add_row(str(step), change, why)
    return table


def main(  # noqa: PLR0913 - one argument per option of the command line
    *,
    data: Annotated[str, typer.Option(help="digits, cifar10 or FILE.npz.")] = "digits",
    data_dir: Annotated[Path, typer.Option(help="Where data sets are.")] = Path("data"),
    model: Annotated[str, typer.Option(help="small or torchvision:NAME.")] = "small",
    batch_size: int = 16,
    steps: int = 200,
    cut: Annotated[int | None, typer.Option(help="The planned cut.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Train under a budget that falls and rises, and compare with a run without."""
    torch.set_num_threads(1)
    experiment = replace(
        quickstart(data), model=model, batch_size=batch_size, data_dir=data_dir
    )
    course = make_course(experiment, cut=cut, num_steps=steps)
    plain = course.run(None)
    moved = course.run(Wave(course.needed_bytes, steps))
    summary = summarised(course, plain, moved)
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")
        return
    console = Console()
    console.print(shown(summary))
    console.print(
        f"{summary['route']} needs {bytes_text(summary['needed_bytes'])}; the budget "
        f"falls to {bytes_text(summary['least_budget_bytes'])}. Status "
        f"{summary['status']} {summary['message']}. Steps over the budget: "
        f"{summary['steps_over_budget']}. Losses of all steps equal: "
        f"{summary['losses_equal']}; final states equal: {summary['state_equal']}. "
        f"CPU time, the edge's included: {summary['seconds_ratio']:.2f} of the run "
        "without a budget."
    )


if __name__ == "__main__":
    typer.run(main)
