"""What slices save and cost: ``python -m simulations.slice_cost``.

One client trains two batches whole and in slices along the same route, over an edge in
this process. Printed are the peaks, predicted and measured, how far the front's
parameters end from those of whole steps, how many values of a boundary differ, and
the CPU time of the front's part of a step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from flwr_smartsplit.profile.sliced_costs import predicted_sliced_peak_bytes
from flwr_smartsplit.train.slicing import SlicedRunner
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from flwr_smartsplit import Route, Task, predicted_peak_bytes, profile_chain
from flwr_smartsplit.device.local_training import Conditions, Outcome, train_locally
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.protocol import HoldState
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.split.build import State, build_chain, materialise, state_of
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.types import ClientPlan, Status
from simulations.memory.stepping import dry_whole_peak_bytes
from simulations.models import torchvision_model

SHAPE = (3, 64, 64)
NUM_CLASSES = 10
BATCH_SIZE = 32
SIZES = (1, 4, 8, 16)
NUM_TIMED = 3
# Of each model the first cut, that after its first pooling, and a late one.
CUTS = {"squeezenet1_1": (1, 2, 20), "vgg11": (1, 2, 8)}


@dataclass(frozen=True, kw_only=True)
class SliceCost:
    """What a step costs at one cut, whole (None) or in slices of some size.

    Parameters
    ----------
    unit : str
        The last unit of the front.
    slice_size : int or None
        Samples per slice.
    predicted_bytes, measured_bytes : int
        The device's peak.
    ratio : float
        A plain step of the whole model's peak, found by a dry run, to the measured.
    distance_fraction : float
        The largest difference of a parameter after two steps, relative to the largest
        value of its tensor.
    differing_fraction : float
        Values of the boundary that are not the whole batch's to the bit.
    front_seconds : float
        CPU time of the front's part of a step, the least of three.
    """

    unit: str
    slice_size: int | None
    predicted_bytes: int
    measured_bytes: int
    ratio: float
    distance_fraction: float
    differing_fraction: float
    front_seconds: float


def task_of(model_fn: Callable[[], nn.Module]) -> Task:
    """Train a model with momentum."""
    return Task(
        model_fn=model_fn,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        example_inputs=torch.zeros(1, *SHAPE),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def measure(task: Task, cut: int, *, batch_size: int) -> list[SliceCost]:
    """Measure whole steps and sliced ones at one cut."""
    torch.manual_seed(0)
    state = state_of(task.model_fn())
    chain = build_chain(task)
    batches = [
        (torch.randn(batch_size, *SHAPE), torch.zeros(batch_size, dtype=torch.int64))
        for _ in range(2)
    ]
    front = {name: state[name] for name in chain.state_names(0, cut)}
    profile = profile_chain(chain, batch_size=batch_size, task=task)
    whole_bytes = dry_whole_peak_bytes(chain, task, batch_size=batch_size)
    results = _Front(task, cut, front, batches[0][0])
    sizes = [None, *(size for size in SIZES if size < batch_size)]
    differing = {size: results.differing_fraction(size) for size in sizes}
    outcomes = _trained(task, cut, batches, sizes)
    return [
        SliceCost(
            unit=chain.units[cut - 1].name,
            slice_size=size,
            predicted_bytes=predicted_peak_bytes(profile, Route.split(cut))
            if size is None
            else predicted_sliced_peak_bytes(
                chain, task, cut=cut, batch_size=batch_size, slice_size=size
            ),
            measured_bytes=outcome.report.peak_bytes,
            ratio=whole_bytes / outcome.report.peak_bytes,
            distance_fraction=_distance(outcome, outcomes[0]),
            differing_fraction=differing[size],
            front_seconds=results.seconds(size),
        )
        for size, outcome in zip(sizes, outcomes, strict=True)
    ]


def _trained(
    task: Task, cut: int, batches: list[tuple[Tensor, Tensor]], sizes: list[int | None]
) -> list[Outcome]:
    """Train two steps for each size, along a route over an edge of this process."""
    torch.manual_seed(0)
    state = state_of(task.model_fn())
    digest, edge = state_digest(state), LocalEdge()
    address = edge.start(task)
    edge.connect(address).send(HoldState(digest, state))
    names = build_chain(task).state_names(0, cut)
    conditions = Conditions(task=task, connect=lambda place, a: edge.connect(a))
    outcomes = []
    for size in sizes:
        plan = ClientPlan(
            client_key="0",
            round_number=1,
            route=Route.split(cut),
            seed=0,
            state_digest=digest,
            edge_addresses={"edge": address},
            slice_size=size,
        )
        front = {name: state[name] for name in names}
        copies = [(x.clone(), y.clone()) for x, y in batches]
        outcomes.append(train_locally(plan, front, copies, conditions))
    edge.stop(address)
    failed = [o.report.message for o in outcomes if o.report.status is not Status.OK]
    if failed:
        raise RuntimeError(failed[0])
    return outcomes


def _distance(one: Outcome, other: Outcome) -> float:
    return max(
        float(abs(one.state[name] - values).max() / abs(values).max())
        for name, values in other.state.items()
    )


class _Front:
    """The front alone, with a gradient that is there at once."""

    def __init__(self, task: Task, cut: int, state: State, x: Tensor):
        segment = materialise(build_chain(task), 0, cut, state)
        self._runner = SegmentRunner(segment, task)
        self._inputs = x
        with torch.no_grad():
            self._boundary: Tensor = segment.train()(x)
        # Small, so that no step leaves the range of numbers.
        self._gradient = 1e-6 * torch.randn_like(self._boundary)

    def differing_fraction(self, size: int | None) -> float:
        """Compare the boundary of slices with that of the whole batch."""
        slices = self._inputs.split(size or len(self._inputs))
        with torch.no_grad():
            parts = [self._runner.segment(part) for part in slices]
        return float((torch.cat(parts) != self._boundary).double().mean())

    def seconds(self, size: int | None) -> float:
        """Take the CPU time of the front's part of a step."""
        return min(self._step(size) for _ in range(NUM_TIMED))

    def _step(self, size: int | None) -> float:
        started = time.process_time()
        if size is None:
            self._runner.forward(self._inputs, step=0, inputs_are_boundary=False)
            self._runner.backward(self._gradient.clone)
        else:
            front = SlicedRunner(self._runner, size)
            front.forward(self._inputs, step=0, send=lambda *_: None)
            front.backward(self._inputs, step=0, receive=self._part)
        return time.process_time() - started

    def _part(self, start: int, stop: int) -> Tensor:
        return self._gradient[start:stop].clone()


def cost_table(model: str, costs: list[SliceCost]) -> Table:
    """Lay the costs out for people."""
    table = Table(title=model, box=None)
    for column in ("cut after", "slice", "predicted, MiB", "measured, MiB", "ratio"):
        table.add_column(column, justify="right")
    for column in ("parameters differ by", "boundary differs", "front, ms/step"):
        table.add_column(column, justify="right")
    for cost in costs:
        table.add_row(
            cost.unit,
            "whole" if cost.slice_size is None else str(cost.slice_size),
            f"{cost.predicted_bytes / 2**20:.2f}",
            f"{cost.measured_bytes / 2**20:.2f}",
            f"{cost.ratio:.1f}",
            f"{cost.distance_fraction:.1e}",
            f"{cost.differing_fraction:.0%}",
            f"{1e3 * cost.front_seconds:.0f}",
        )
    return table


def main(*, batch_size: Annotated[int, typer.Option(min=2)] = BATCH_SIZE) -> None:
    """Measure what slices save and cost at some cuts of some models."""
    torch.set_num_threads(1)
    for model, cuts in CUTS.items():
        task = task_of(partial(torchvision_model, model, num_classes=NUM_CLASSES))
        costs = [c for cut in cuts for c in measure(task, cut, batch_size=batch_size)]
        Console(width=140).print(cost_table(model, costs))


if __name__ == "__main__":
    typer.run(main)
