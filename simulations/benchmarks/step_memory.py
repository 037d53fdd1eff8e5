"""What a block's step takes: ``python -m simulations.benchmarks.step_memory``.

Three networks for 32 x 32 images, whole and in each step of a progressive training on a
device that trains alone, as predicted; and the least that any cut of a step takes.
``--measured`` also trains two steps of the whole model and of its worst step, and
compares them with torch's own loop to the last bit.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from flwr_smartsplit import Progressive, Route, Task, predicted_peak_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import WHOLE, Variant
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from simulations.experiments.models import image_task


def small_resnet(name: str) -> nn.Module:
    """Build a torchvision ResNet with the stem for small images: 3x3, no pooling."""
    model: Any = torchvision.models.get_model(name, weights=None, num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    found: nn.Module = model
    return found


def small_vgg(name: str) -> nn.Module:
    """Build a torchvision VGG's features, and one linear layer behind them."""
    features = torchvision.models.get_model(name, weights=None).features
    return nn.Sequential(
        features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    )


LAYERS = tuple(f"layer{number}" for number in range(1, 5))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "resnet18": (partial(small_resnet, "resnet18"), LAYERS),
    "resnet34": (partial(small_resnet, "resnet34"), LAYERS),
    # The pools but the first end blocks.
    "vgg11_bn": (
        partial(small_vgg, "vgg11_bn"),
        ("0.7", "0.14", "0.21", "0.28"),
    ),
}


@dataclass(frozen=True)
class Row:
    """A network's peaks in bytes: whole, of each step, and of each step's best cut."""

    network: str
    batch_size: int
    whole_bytes: int
    step_bytes: tuple[int, ...]
    least_cut_bytes: tuple[int, ...]
    measured_bytes: tuple[int, ...] = ()  # Of the whole model and of the worst step
    is_exact: bool | None = None  # Both are torch's own loop, bit for bit

    @property
    def saved_fraction(self) -> float:
        """What the worst step takes less than the whole model."""
        return 1 - max(self.step_bytes) / self.whole_bytes


def predicted(network: str, batch_size: int) -> Row:
    """Predict a network's peaks; nothing is trained."""
    task, steps = task_of(network)
    chain = build_chain(task)
    profiles = [
        profile_of(task, batch_size=batch_size, variant=step)
        for step in (WHOLE, *steps)
    ]
    peaks = [predicted_peak_bytes(each, Route.whole()) for each in profiles]
    cuts = [
        min(
            predicted_peak_bytes(each, Route.split(cut))
            for cut in range(1, len(chain.under(step)))
        )
        for each, step in zip(profiles[1:], steps, strict=True)
    ]
    return Row(network, batch_size, peaks[0], tuple(peaks[1:]), tuple(cuts))


def measured(row: Row) -> Row:
    """Train the whole model and its worst step, each against torch's own loop."""
    task, steps = task_of(row.network)
    worst = steps[row.step_bytes.index(max(row.step_bytes))]
    batches = example_batches(task, batch_size=row.batch_size)
    checks = []
    for variant in (WHOLE, worst):
        with RouteChecker(task, batches, variant=variant) as compared:
            checks.append(compared.check(Route.whole(), is_evaluated=False))
    peaks = tuple(check.measured_peak_bytes for check in checks)
    is_exact = not any(check.differences for check in checks)
    return replace(row, measured_bytes=peaks, is_exact=is_exact)


def task_of(network: str) -> tuple[Task, tuple[Variant, ...]]:
    """Return a network's task, and the steps in which its blocks are trained."""
    model_fn, blocks = NETWORKS[network]
    task = replace(image_task(model_fn), example_targets=torch.zeros(1).long())
    rule = Progressive(blocks, pace=(1,) * len(blocks))
    return task, rule.steps(build_chain(task).unit_names)


def main(
    networks: Annotated[list[str], typer.Argument()] = list(NETWORKS),  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    with_measured: Annotated[bool, typer.Option("--measured")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print the peaks of each network's steps."""
    rows = [predicted(network, batch_size) for network in networks]
    rows = [measured(row) for row in rows] if with_measured else rows
    if as_json:
        found = [{**asdict(row), "saved_fraction": row.saved_fraction} for row in rows]
        typer.echo(json.dumps(found))
    else:
        Console(width=120).print(table_of(rows))
    if any(row.is_exact is False for row in rows):
        raise typer.Exit(1)


def table_of(rows: list[Row]) -> Table:
    """Show peaks in MiB."""
    names = "network", "whole", "steps", "less", "least cut of each", "measured"
    table = Table(*names, title=f"Peaks in MiB, batch {rows[0].batch_size}")
    for row in rows:
        table.add_row(
            row.network,
            _mib(row.whole_bytes),
            " ".join(map(_mib, row.step_bytes)),
            f"{row.saved_fraction:.1%}",
            " ".join(map(_mib, row.least_cut_bytes)),
            " ".join(map(_mib, row.measured_bytes)),
        )
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f}"


if __name__ == "__main__":
    typer.run(main)
