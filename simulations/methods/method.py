"""Method: what a file in ``methods`` says about itself, and what it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from flwr_smartsplit import Task
from simulations.experiments.experiment import Experiment
from simulations.experiments.models import model_fn
from simulations.fleets.clock import Clock
from simulations.fleets.devices import Devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """All that a method is told.

    Parameters
    ----------
    experiment : Experiment
        What is run.
    task : Task
        What every place needs to build its part of the training.
    journal : Path
        Where the JSON lines go.
    devices : Devices
        The fleet, by the clients' numbers.
    clock : Clock
        Says how long it would have taken on these devices.
    """

    experiment: Experiment
    task: Task
    journal: Path
    devices: Devices
    clock: Clock


StrategyFn = Callable[[Setting], Strategy]
"""``strategy_fn(setting)`` builds the server's side."""


def as_they_are(outputs: Tensor) -> Tensor:
    """Return a model's outputs ``(batch, classes)``."""
    return outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to train a fleet.

    Parameters
    ----------
    name : str
        What it is called on the command line and in every report.
    summary : str
        What it does, in one line.
    strategy_fn : StrategyFn
        Builds the server's side.
    model_fn : Callable[[Experiment], Callable[[], nn.Module]]
        Returns the function that builds its global model; the experiment's own
        model, unless a method trains another.
    outputs_fn : Callable[[Tensor], Tensor]
        Makes class scores ``(batch, classes)`` of what the global model returns.
    """

    name: str
    summary: str
    strategy_fn: StrategyFn
    model_fn: Callable[[Experiment], Callable[[], nn.Module]] = model_fn
    outputs_fn: Callable[[Tensor], Tensor] = as_they_are
