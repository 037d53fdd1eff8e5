"""Codecs: every client is cut in front of the gate, and one codec writes what crosses.

The gate stays open. What crosses is what a ReLU made, where ``Packed`` finds the most
zeros. Accuracy is that of the model that was trained, so with the codec in it.
"""

from collections.abc import Callable
from functools import partial

from flwr.serverapp.strategy import Strategy
from torch import nn

from flwr_smartsplit import (
    Float16,
    Integer,
    Packed,
    Raw,
    Route,
    RouteRequest,
    TopK,
    with_crossing,
)
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import GATE, Codec
from simulations.experiments.clients import build_task
from simulations.experiments.errors import ExperimentError
from simulations.experiments.experiment import Experiment
from simulations.experiments.models import GATED
from simulations.methods.method import Method, Setting, split_strategy


def gate_index(names: tuple[str, ...]) -> int:
    """Find the gate among the names of a model's units.

    Examples
    --------
    >>> gate_index(("conv1", "relu1.channel_gate", "relu1.channel_gate_end"))
    1
    """
    found = [i for i, name in enumerate(names) if name.rpartition(".")[2] == GATE]
    if not found:
        raise ExperimentError(
            f"the method cuts at a gate, and the model has none: take --model {GATED}."
        )
    return found[0]


def cut_before_gate(request: RouteRequest) -> Route:
    """Choose the cut in front of the gate, whatever else would fit."""
    names = tuple(unit.name for unit in request.profile.units)
    return Route.split(gate_index(names), edge=request.edge or "")


def build_strategy(setting: Setting, *, codec: Codec) -> Strategy:
    """Build the strategy that cuts in front of the gate, with a codec."""
    more = {"codec": codec}
    return split_strategy(setting, more=more, choose_route=cut_before_gate)


def crossed_model_fn(
    experiment: Experiment, *, codec: Codec
) -> Callable[[], nn.Module]:
    """Return the function that builds the model with the codec at the cut."""
    task = build_task(experiment)
    return partial(with_crossing, task, gate_index(build_chain(task).unit_names), codec)


CHOICES: dict[str, Codec] = {
    "raw": Raw(),
    "packed": Packed(),
    "float16": Float16(),
    "integer8": Integer(),
    "integer4": Integer(bits=4),
    "top10": TopK(fraction=0.1),
    "top2": TopK(fraction=0.02),
}
"""What is written of a boundary: all of it, first, and less and less."""

CODECS = tuple(
    Method(
        name=name,
        summary=f"everybody is cut at the gate, with the codec {codec}",
        strategy_fn=partial(build_strategy, codec=codec),
        model_fn=partial(crossed_model_fn, codec=codec),
    )
    for name, codec in CHOICES.items()
)
"""A method for each."""
