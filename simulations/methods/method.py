"""Method: what a file in ``methods`` says about itself, and what it is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn

from flwr_smartsplit import (
    Checkpoints,
    Constraints,
    Planning,
    SmartSplit,
    Task,
    proximal,
)
from simulations.experiments.clients import build_task, edges_of
from simulations.experiments.experiment import Experiment
from simulations.experiments.models import model_fn
from simulations.fleets.clock import Clock
from simulations.fleets.devices import Devices

METHOD = "simulated-method"
"""A message's config names with it the method whose ``task_fn`` is meant."""

PROXIMAL_MU = "proximal-mu"
"""Weight of FedProx's term; the word is Flower's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """All that a method is told."""

    experiment: Experiment  # What is run
    task: Task  # What every place needs to build its part of the training
    journal: Path  # Where the JSON lines go
    devices: Devices  # The fleet, by the clients' numbers
    clock: Clock  # Says how long it would have taken on these devices
    # Where a method may save its run, to go on after it was killed
    checkpoints: Checkpoints | None = None


StrategyFn = Callable[[Setting], Strategy]
"""``strategy_fn(setting)`` builds the server's side."""


TaskFn = Callable[[Experiment, int, Mapping[str, Any]], Task]
"""``task_fn(experiment, client, config)`` builds what a message asks a client for."""


def usual_task(experiment: Experiment, client: int, config: Mapping[str, Any]) -> Task:
    """Build the experiment's own task, with FedProx's pull where the message has it."""
    del client
    task, mu = build_task(experiment), float(config.get(PROXIMAL_MU, 0.0))
    if mu <= 0:
        return task
    pulled = partial(proximal, optimizer_fn=task.optimizer_fn, mu=mu)
    return replace(task, optimizer_fn=pulled)


def as_they_are(outputs: Tensor) -> Tensor:
    """Return a model's outputs ``(batch, classes)``."""
    return outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to train a fleet."""

    name: str  # What it is called on the command line and in every report
    summary: str  # What it does, in one line
    strategy_fn: StrategyFn  # Builds the server's side
    # Returns the function that builds its global model
    model_fn: Callable[[Experiment], Callable[[], nn.Module]] = model_fn
    # Makes class scores ``(batch, classes)`` of what the global model returns
    outputs_fn: Callable[[Tensor], Tensor] = as_they_are
    task_fn: TaskFn = usual_task  # What clients train whose message names the method


NO_RECOMPUTE = Constraints(recompute=False)


def split_strategy(
    setting: Setting,
    *,
    has_edges: bool = True,
    more: Mapping[str, Any] | None = None,
    **planning: Any,
) -> SmartSplit:
    """Build SmartSplit's strategy for a setting, with ``more`` arguments of its own."""
    experiment = setting.experiment
    if any(device.traits.flops_per_second for device in setting.devices):
        planning.setdefault("client_seconds", setting.clock.client_seconds)
    return SmartSplit(
        setting.task,
        edges_of(experiment) if has_edges else (),
        strategy=FedAvg(
            fraction_train=experiment.fraction_train,
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_available_nodes=experiment.num_clients,
        ),
        planning=Planning(**planning),
        seed=experiment.seed,
        journal=setting.journal,
        checkpoints=setting.checkpoints,
        **(more or {}),
    )
