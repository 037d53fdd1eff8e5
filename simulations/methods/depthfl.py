"""DepthFL: weak devices train the first blocks, each with a classifier of its own.

A client's loss is the sum of its classifiers' cross-entropies and of what they teach
each other: for each the mean Kullback-Leibler divergence from the others, whose outputs
are taken as they are. Its weight rises as exp(-5 (1 - t)^2), where t goes from 0 to 1
over the first 30 % of the rounds (300 of 1,000 in the authors' runs). Blocks and
classifiers are averaged over the clients that own them. The global model answers with
the mean of its classifiers' scores.

Two things differ from the authors' runs: there is no FedDyn, so that methods differ in
what clients hold and not in the server's rule; and clients count by their number of
examples, as in every other method of this folder. Classifiers are a pooling and a
linear layer, without the bottlenecks that ResNets get.

References
----------
Kim, Yu, Kim, Moon: DepthFL: Depthwise Federated Learning for Heterogeneous Clients.
ICLR 2023.
"""

import math
from functools import partial

from flwr.serverapp.strategy import Strategy
from torch import Tensor

from simulations.experiments.experiment import Experiment
from simulations.experiments.models_depth import depth_model_fn, max_depth
from simulations.methods.method import Method, Setting
from simulations.methods.submodels.nested_rounds import (
    Ladder,
    NestedRounds,
    Variant,
    variant_of,
)
from simulations.methods.submodels.variants import DEPTH, DISTILLATION, depth_task

RAMP_FRACTION = 0.3
"""Share of the rounds in which the weight of distillation rises to 1."""


def depth_variants(experiment: Experiment) -> tuple[Variant, ...]:
    """Work out the depths of the experiment's model and what they need."""
    return tuple(
        variant_of(
            depth_task(experiment, depth, distillation=1.0),
            name=f"depth {depth}",
            config={DEPTH: depth},
            batch_size=experiment.batch_size,
        )
        for depth in range(max_depth(experiment), 0, -1)
    )


def distillation_weight(server_round: int, *, num_rounds: int) -> float:
    """Return the weight of distillation in a round, counted from 1.

    Examples
    --------
    >>> [round(distillation_weight(n, num_rounds=10), 3) for n in (1, 2, 3, 4, 10)]
    [0.007, 0.108, 0.574, 1.0, 1.0]
    """
    risen = min((server_round - 1) / (RAMP_FRACTION * num_rounds), 1.0)
    return math.exp(-5 * (1 - risen) ** 2)


def build_strategy(setting: Setting) -> Strategy:
    """Build the strategy that gives each client the most blocks it can hold."""
    num_rounds = setting.experiment.num_rounds
    ladder = Ladder(
        variants=depth_variants(setting.experiment),
        config_fn=partial(_round_config, num_rounds=num_rounds),
    )
    return NestedRounds(ladder, setting)


def _round_config(server_round: int, *, num_rounds: int) -> dict[str, float]:
    return {DISTILLATION: distillation_weight(server_round, num_rounds=num_rounds)}


def ensemble(outputs: Tensor) -> Tensor:
    """Average the classifiers' scores ``(batch, classifiers, classes)``."""
    return outputs.mean(dim=1)


DEPTHFL = Method(
    name="depthfl",
    summary="weak devices train the first blocks, with classifiers of their own",
    strategy_fn=build_strategy,
    model_fn=depth_model_fn,
    outputs_fn=ensemble,
)
