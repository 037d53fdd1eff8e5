"""Steps and peaks on a torch device: ``python -m simulations.benchmarks.gpu_steps``.

ResNet-18 trains as a plain PyTorch loop, along the whole route, and split with an edge
in the same process and on the same device. Predicted peaks come from the CPU, without
what a client adds for an accelerator; the allocator's, on CUDA only, have workspaces.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import resnet18

from flwr_smartsplit import Route, Task, predicted_peak_bytes, profile_chain
from flwr_smartsplit.device.local_training import Conditions, train_locally
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import bytes_text
from flwr_smartsplit.memory.process import MemoryGrowth, cuda_growth
from flwr_smartsplit.profile.accelerator_memory import accelerator_overhead
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.train.torch_device import as_device, synchronise
from flwr_smartsplit.types import ClientPlan

Batch = tuple[Tensor, Tensor]
_WARM_UP_STEPS = 3


@dataclass
class Watched:
    """Batches, and the time at which each was asked for."""

    batches: list[Batch]
    device: torch.device
    times: list[float] = field(default_factory=list)

    def __iter__(self) -> Iterator[Batch]:
        """Hand out the batches; the device is done with the one before."""
        self.times.clear()
        for batch in self.batches:
            synchronise(self.device)
            self.times.append(time.perf_counter())
            yield batch

    @property
    def step_seconds(self) -> float:
        """The median of a step after the first ones."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return statistics.median([b - a for a, b in pairs][_WARM_UP_STEPS:])


def build_task() -> Task:
    """Make ResNet-18 at 64 px with momentum."""
    return Task(
        model_fn=partial(resnet18, num_classes=10),
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        example_inputs=torch.zeros(1, 3, 64, 64),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def plain_loop(task: Task, watched: Watched) -> None:
    """Train the stock module."""
    model = task.model_fn().to(watched.device).train()
    optimizer = task.optimizer_fn(model.parameters())
    for inputs, targets in watched:
        optimizer.zero_grad()
        outputs = model(inputs.to(watched.device))
        task.loss_fn(outputs, targets.to(watched.device)).backward()
        optimizer.step()


def along(
    route: Route, task: Task, state: Mapping[str, Any], watched: Watched, *, mode: str
) -> int:
    """Train along a route on the device; return the device's metered peak."""
    device, chain = watched.device, build_chain(task)
    edge, digest = LocalEdge(device=str(device)), state_digest(state)
    address = edge.start(task)
    try:
        transport = edge.connect(address)
        transport.send(wire.HoldState(digest, state))
        names = {
            name
            for leg in route.device_legs(len(chain))
            for name in chain.state_names(leg.start, leg.stop)
        }
        outcome = train_locally(
            ClientPlan(
                client_key="gpu",
                round_number=1,
                route=route,
                seed=0,
                state_digest=digest,
                edge_addresses=dict.fromkeys(route.edges(), address),
            ),
            {name: state[name] for name in names},
            watched,
            Conditions(
                task=task,
                connect=lambda place, address: transport,
                cap_mode=mode,
                device=device,
            ),
        )
    finally:
        edge.stop(address)
    if outcome.report.message:
        raise RuntimeError(outcome.report.message)
    return outcome.report.peak_bytes


def grown(device: torch.device) -> Any:
    """Measure what the allocator gives out, on CUDA."""
    return cuda_growth(device) if device.type == "cuda" else _Unknown()


class _Unknown:
    """Measure nothing."""

    def __enter__(self) -> MemoryGrowth:
        return MemoryGrowth()

    def __exit__(self, *_: object) -> None:
        pass


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    steps: Annotated[int, typer.Option(min=6)] = 30,
) -> None:
    """Print seconds per step, and predicted and measured peaks of the device."""
    place, task = as_device(device), build_task()
    chance = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(batch_size, 3, 64, 64, generator=chance),
            torch.randint(0, 10, (batch_size,), generator=chance),
        )
        for _ in range(steps)
    ]
    watched, state = Watched(batches, place), state_of(task.model_fn())
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=batch_size, task=task)
    table = Table("route", "ms per step", "predicted", "metered", "allocator")
    with grown(place) as growth:
        plain_loop(task, watched)
    seconds = f"{1000 * watched.step_seconds:.1f}"
    table.add_row("plain loop", seconds, "", "", _text(growth.growth_bytes))
    for route in (Route.whole(), Route.split(3), Route.split(len(chain) // 2)):
        along(route, task, state, watched, mode="off")
        seconds = f"{1000 * watched.step_seconds:.1f}"
        short = Watched(batches[:3], place)
        with grown(place) as growth:  # With the edge's part, on this device too.
            peak = along(route, task, state, short, mode="strict")
        predicted = predicted_peak_bytes(profile, route)
        texts = map(_text, (predicted, peak, growth.growth_bytes))
        table.add_row(str(route), seconds, *texts)
    overhead = accelerator_overhead(chain, batch_size=batch_size, task=task)
    console = Console()
    console.print(f"ResNet-18, 64 px, batch {batch_size}, {place}, {torch.__version__}")
    console.print(table)
    console.print(f"A client on an accelerator adds {_text(overhead)} to a prediction.")


def _text(num_bytes: int | None) -> str:
    return "" if num_bytes is None else bytes_text(num_bytes)


if __name__ == "__main__":
    typer.run(main)
