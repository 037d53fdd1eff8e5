"""What a pruned model costs, by rate.

``python -m simulations.benchmarks.pruned_model``: ResNet-18 at 32 pixels with its first
weights, pruned by their sizes: FLOPs of a training step, predicted peak, bytes of the
state, and a round on a fleet of measured phones. No step is trained; all of it is
counted, or worked out from the phones' speeds and links.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import nn

from flwr_smartsplit import Route, Task, predicted_peak_bytes
from flwr_smartsplit.plan.timing import work_of
from flwr_smartsplit.plan.variants.pruning import pruned
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.types import WHOLE, Variant
from simulations.experiments.models import torchvision_model
from simulations.fleets.devices import FleetDevice, Needs
from simulations.fleets.phones import Phones

RATES = (0.0, 0.2, 0.4, 0.6)
BATCH_SIZE = 16
NUM_STEPS = 30
NUM_PHONES = 100
SIDE = 32

FLEET = Phones(is_steady=True)
"""Half of the phones cannot hold the whole model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What training the whole of a model on one device costs."""

    flops: float  # Of a step
    peak_bytes: int
    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A model pruned at a rate."""

    rate: float
    flops_gone: float  # Share
    peak_bytes: int
    state_bytes: int
    phones_that_fit: int  # Of all
    median_seconds: float  # Of a phone's part of a round, simulated
    slowest_seconds: float


def resnet_task() -> Task:
    """Make the task: ResNet-18, 10 classes."""
    model_fn = partial(torchvision_model, "resnet18", num_classes=10)
    return Task(
        model_fn=model_fn,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.01),
        example_inputs=torch.zeros(1, 3, SIDE, SIDE),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def variant_at(task: Task, rate: float) -> Variant:
    """Prune the task's model by its first weights' sizes."""
    chain = build_chain(task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = task.model_fn()
    names = chain.parameter_names
    groups = chain.channels.groups
    return pruned(groups, rate, state_of(model), parameters=names, ranks=None)


def costs_of(task: Task, variant: Variant = WHOLE) -> Costs:
    """Count what a device that trains all of a variant spends."""
    profile = profile_of(task, batch_size=BATCH_SIZE, variant=variant)
    work = work_of(profile, Route.whole())
    return Costs(
        flops=work.device_flops,
        peak_bytes=predicted_peak_bytes(profile, Route.whole()),
        state_bytes=work.state_bytes,
    )


def seconds_of(phone: FleetDevice, costs: Costs) -> float:
    """Simulate a phone's part of a round: its steps, and the state there and back."""
    speed, link = phone.traits.flops_per_second, phone.traits.link
    assert speed is not None
    assert link is not None
    radio = 1 / link.down_bytes_per_second + 1 / link.up_bytes_per_second
    steps = NUM_STEPS * costs.flops / speed
    return steps + costs.state_bytes * radio + 2 * link.latency_seconds


def measured(rates: Sequence[float] = RATES) -> list[Pruned]:
    """Prune at each rate."""
    task = resnet_task()
    whole = costs_of(task)
    needs = Needs(whole_peak_bytes=whole.peak_bytes, smallest_peak_bytes=0)
    phones = FLEET(needs, NUM_PHONES, 0)
    found = []
    for rate in rates:
        costs = costs_of(task, variant_at(task, rate))
        seconds = [seconds_of(phone, costs) for phone in phones]
        budgets = [phone.budget_bytes or 0 for phone in phones]
        found.append(
            Pruned(
                rate=rate,
                flops_gone=1 - costs.flops / whole.flops,
                peak_bytes=costs.peak_bytes,
                state_bytes=costs.state_bytes,
                phones_that_fit=sum(costs.peak_bytes <= each for each in budgets),
                median_seconds=median(seconds),
                slowest_seconds=max(seconds),
            )
        )
    return found


def table_of(found: Sequence[Pruned]) -> str:
    """Write a Markdown table."""
    head = "| rate | FLOPs gone | peak, MB | state, MB | phones that hold it, of "
    head += f"{NUM_PHONES} | round, median phone, s | slowest, s |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {p.rate:g} | {100 * p.flops_gone:.0f} % | {p.peak_bytes / 1e6:.1f} | "
        f"{p.state_bytes / 1e6:.1f} | {p.phones_that_fit} | {p.median_seconds:.0f} | "
        f"{p.slowest_seconds:.0f} |"
        for p in found
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    print(table_of(measured(parser.parse_args(arguments).rates)))  # noqa: T201


if __name__ == "__main__":
    main()
