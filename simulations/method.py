"""Method: what a file in ``methods`` says about itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import RayEdge, Task
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
    is_capped : bool
        Whether devices refuse to hold more than their budget.
    edges : tuple[RayEdge, ...]
        Where its clients may send the rest of a model.
    strategy_fn : StrategyFn
        Builds the server's side.
    """

    name: str
    summary: str
    is_capped: bool
    edges: tuple[RayEdge, ...]
    strategy_fn: StrategyFn
