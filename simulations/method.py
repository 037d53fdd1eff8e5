"""Method: what a file in ``methods`` says about itself, and what it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from flwr_smartsplit import Task
from simulations.experiment import Experiment
from simulations.models import model_fn


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a method is given to build its strategy from.

    Parameters
    ----------
    experiment : Experiment
        What is run.
    task : Task
        The model, loss and optimizer that all methods share.
    journal : Path
        Where its JSON lines go.
    devices : Any
        What the fleet's devices can do.
    clock : Any
        Turns bytes and operations into simulated seconds.
    """

    experiment: Experiment
    task: Task
    journal: Path
    devices: Any = None
    clock: Any = None


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
