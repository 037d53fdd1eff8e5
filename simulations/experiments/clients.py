"""The clients' side of an experiment: the task, and the function that builds a client.

It runs in Ray's workers, which get the experiment as a value and rebuild the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from flwr.app import Context

from flwr_smartsplit import MemoryBudget, RayEdge, SmartSplitNumPyClient, Task
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.types import NO_TRAITS, DeviceTraits
from simulations.experiments.data import (
    client_indices,
    evaluation_loader,
    load_images,
    train_loader,
)
from simulations.experiments.experiment import Experiment
from simulations.experiments.models import model_fn
from simulations.fleets.clock import EDGE_FLOPS_PER_SECOND, Clock
from simulations.fleets.devices import FleetDevice

EDGES = (RayEdge(flops_per_second=EDGE_FLOPS_PER_SECOND),)
"""Where clients may have the rest of a model trained, if their plan says so."""


def edges_of(experiment: Experiment) -> tuple[Edge, ...]:
    """Return the edges of an experiment: actors of Ray, or in this process."""
    here = LocalEdge(flops_per_second=EDGE_FLOPS_PER_SECOND)
    return (here,) if experiment.in_process else EDGES


@lru_cache(maxsize=2)
def build_task(experiment: Experiment) -> Task:
    """Build what every place needs to build its part of the training."""
    return Task(
        model_fn=model_fn(experiment),
        loss_fn=torch.nn.functional.cross_entropy,
        optimizer_fn=partial(
            torch.optim.SGD, lr=experiment.learning_rate, momentum=experiment.momentum
        ),
        example_inputs=next(iter(evaluation_loader(experiment, batch_size=2)))[0],
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CycledBudget(MemoryBudget):
    """A budget that goes through the same factors over and over, one for each step."""

    budget_bytes: int
    factors: tuple[float, ...]

    def read(self, *, step: int, live_bytes: int) -> int | None:
        """Say what the tensors may take from now on."""
        del live_bytes
        return int(self.budget_bytes * self.factors[step % len(self.factors)])


def build_client(
    context: Context,
    *,
    experiment: Experiment,
    devices: Sequence[FleetDevice],
    clock: Clock,
    task: Task | None = None,
) -> SmartSplitNumPyClient:
    """Build the client of one partition, which trains the experiment's task or another.

    A strategy that knows no budgets, such as Flower's FedAvg, has whole models trained
    without a cap.
    """
    client = int(context.node_config["partition-id"])
    return SmartSplitNumPyClient(
        task or build_task(experiment),
        train_loader(experiment, client),
        client_key=str(client),
        budget_bytes=budget_of(devices[client]),
        edges=edges_of(experiment),
        traits=traits_of(experiment, client, devices[client]),
        local_epochs=experiment.local_epochs,
        step_seconds=clock.step_seconds,
        seed=experiment.seed,
    )


def budget_of(device: FleetDevice) -> int | MemoryBudget | None:
    """Return what a device's tensors may take, step by step if that moves."""
    if device.budget_bytes is None or not device.free_memory:
        return device.budget_bytes
    return CycledBudget(budget_bytes=device.budget_bytes, factors=device.free_memory)


def traits_of(experiment: Experiment, client: int, device: FleetDevice) -> DeviceTraits:
    """Return what a client says of itself: what the experiment has it share."""
    traits = device.traits if experiment.share_speed else NO_TRAITS
    if not experiment.share_labels:
        return traits
    images = load_images(experiment)
    labels = images.y_train[client_indices(experiment)[client]]
    counts = np.bincount(labels, minlength=images.num_classes)
    return replace(traits, label_counts=tuple(map(int, counts)))
