"""Method: what a file in ``methods`` says about itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import Task
from simulations.experiment import Experiment

StrategyFn = Callable[[Experiment, Task, Path], Strategy]
"""``strategy_fn(experiment, task, journal)`` builds the server's side."""


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
    """

    name: str
    summary: str
    strategy_fn: StrategyFn
