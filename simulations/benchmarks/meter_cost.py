"""What metering costs in time: ``python -m simulations.benchmarks.meter_cost``.

Three clients train the same batches, one without a meter, one with a sampled and one
with a strict cap. They take their steps in turn, so that the machine's drift meets
all three; the order rotates. Times are CPU time with one torch thread.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from flwr_smartsplit import Task
from flwr_smartsplit.memory.cap import CapMode, MemoryCap
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.segment_runner import SegmentRunner
from simulations.experiments.models import image_task, torchvision_model
from simulations.report.progress import progress_bar

Batches = list[tuple[Tensor, Tensor]]

SHAPE = (3, 32, 32)
NUM_CLASSES = 10
BATCH_SIZE = 32
NUM_FIRST = 2
"""A sampled cap meters so many steps at the start."""
BUDGET_BYTES = 2**40
"""Is compared with, and never crossed."""


def lenet() -> nn.Sequential:
    """Build LeNet for colour images of 32 pixels: 62 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, NUM_CLASSES),
    )


@dataclass(frozen=True)
class Case:
    """A model, the steps of one epoch, and how many epochs are measured."""

    name: str
    model_fn: Callable[[], nn.Module]
    num_steps: int
    num_epochs: int

    @property
    def task(self) -> Task:
        """Train the model with momentum."""
        return image_task(self.model_fn)


def _large(name: str) -> Case:
    model_fn = partial(torchvision_model, name, num_classes=NUM_CLASSES)
    return Case(name, model_fn, num_steps=100, num_epochs=3)


CASES = {
    "lenet": Case("lenet", lenet, num_steps=150, num_epochs=9),
    "resnet18": _large("resnet18"),
    "mobilenet_v3_large": _large("mobilenet_v3_large"),
}


@dataclass(frozen=True)
class Cost:
    """What metering added to each epoch, as fractions of the unmetered epoch."""

    model: str
    num_steps: int
    num_metered: int
    off_seconds_per_step: float
    sampled: list[float]
    strict: list[float]

    @property
    def expected_sampled(self) -> float:
        """Strict's fraction of the steps that are metered: less noisy than sampled."""
        return statistics.median(self.strict) * self.num_metered / self.num_steps


def num_metered(num_steps: int, every: int) -> int:
    """Count the steps of one shape that a sampled cap meters.

    Examples
    --------
    >>> num_metered(100, every=50), num_metered(101, every=50), num_metered(1, every=50)
    (3, 4, 1)
    """
    return sum(step < NUM_FIRST or step % every == 0 for step in range(num_steps))


def epoch_steps(
    task: Task, batches: Batches, mode: CapMode, every: int
) -> Iterator[float]:
    """Train as a client does along the whole route; yield each step's seconds."""
    cap = MemoryCap(BUDGET_BYTES, name="client 0", mode=mode, every=every)
    chain = build_chain(task)
    with cap.building():
        segment = materialise(chain, 0, len(chain), state_of(task.model_fn()))
    runner = SegmentRunner(segment, task, streams=UnitStreams(0, 1, "0"))
    for step, (inputs, targets) in enumerate(batches):
        started = time.process_time()
        with cap.step((inputs, targets), segment, runner.optimizer):
            loss, _ = runner.finish(
                inputs, targets, step=step, inputs_are_boundary=False
            )
            float(loss)
        yield time.process_time() - started


def one_epoch(task: Task, batches: Batches, every: int) -> dict[CapMode, float]:
    """Let a client of each mode train an epoch, in turn; return their seconds."""
    clients = {mode: epoch_steps(task, batches, mode, every) for mode in CapMode}
    seconds = dict.fromkeys(CapMode, 0.0)
    order = list(CapMode)
    for _ in batches:
        for mode in order:
            seconds[mode] += next(clients[mode])
        order = order[1:] + order[:1]
    return seconds


def measure(
    case: Case, *, every: int, on_epoch: Callable[[], None] = lambda: None
) -> Cost:
    """Measure the epochs of a case, after a short one that warms caches up."""
    torch.manual_seed(0)
    batches = [
        (torch.randn(BATCH_SIZE, *SHAPE), torch.randint(0, NUM_CLASSES, (BATCH_SIZE,)))
        for _ in range(case.num_steps)
    ]
    task = case.task
    one_epoch(task, batches[: NUM_FIRST + 1], every)
    epochs = []
    for _ in range(case.num_epochs):
        epochs.append(one_epoch(task, batches, every))
        on_epoch()
    off = [epoch[CapMode.OFF] for epoch in epochs]
    return Cost(
        model=case.name,
        num_steps=case.num_steps,
        num_metered=num_metered(case.num_steps, every),
        off_seconds_per_step=statistics.median(off) / case.num_steps,
        sampled=[epoch[CapMode.SAMPLED] / epoch[CapMode.OFF] - 1 for epoch in epochs],
        strict=[epoch[CapMode.STRICT] / epoch[CapMode.OFF] - 1 for epoch in epochs],
    )


def cost_table(costs: list[Cost]) -> Table:
    """Lay the costs out for people: medians of the epochs, least and most of them."""
    table = Table(box=None)
    for column in ("model", "metered", "off, ms/step"):
        table.add_column(column)
    for column in ("sampled", "least, most", "expected", "strict", "least, most"):
        table.add_column(column, justify="right")
    for cost in costs:
        table.add_row(
            cost.model,
            f"{cost.num_metered} of {cost.num_steps}",
            f"{1e3 * cost.off_seconds_per_step:.2f}",
            f"{statistics.median(cost.sampled):+.1%}",
            f"{min(cost.sampled):+.1%}, {max(cost.sampled):+.1%}",
            f"{cost.expected_sampled:+.1%}",
            f"{statistics.median(cost.strict):+.1%}",
            f"{min(cost.strict):+.1%}, {max(cost.strict):+.1%}",
        )
    return table


def main(
    *,
    models: Annotated[
        str, typer.Option(help="Some of the models, with commas.")
    ] = ",".join(CASES),
    every: Annotated[int, typer.Option(min=1)] = 50,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure what a sampled and a strict cap add to the time of an epoch."""
    names = models.split(",")
    unknown = ", ".join(name for name in names if name not in CASES)
    if unknown:
        raise typer.BadParameter(
            f"{unknown} is unknown: choose from {', '.join(CASES)}."
        )
    torch.set_num_threads(1)
    costs = []
    with progress_bar() as progress:
        for case in map(CASES.__getitem__, names):
            bar = progress.add_task(case.name, total=case.num_epochs)
            advance = partial(progress.advance, bar)
            costs.append(measure(case, every=every, on_epoch=advance))
    if as_json:
        sys.stdout.write(json.dumps([asdict(cost) for cost in costs]) + "\n")
    else:
        Console().print(cost_table(costs))


if __name__ == "__main__":
    typer.run(main)
