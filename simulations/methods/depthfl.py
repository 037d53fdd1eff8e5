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
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from flwr.serverapp.strategy import Strategy
from torch import Tensor
from torch.nn import functional

from flwr_smartsplit import Task
from simulations.experiments.clients import build_task
from simulations.experiments.experiment import Experiment
from simulations.experiments.models import depth_model_fn, max_depth
from simulations.methods.method import Method, Setting
from simulations.methods.nested import (
    Ladder,
    NestedRounds,
    Submodel,
    submodel_of,
)
from simulations.methods.sampled import SampledRounds

NAME, DEPTH, DISTILLATION = "depthfl", "depth", "distillation"

RAMP_FRACTION = 0.3
"""Share of the rounds in which the weight of distillation rises to 1."""


def depth_submodels(experiment: Experiment) -> tuple[Submodel, ...]:
    """Work out the depths of the experiment's model and what they need."""
    return tuple(
        submodel_of(
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


def task_for(experiment: Experiment, client: int, config: Mapping[str, Any]) -> Task:
    """Build the task of a client that was asked for a depth."""
    del client
    distillation = float(config[DISTILLATION])
    return depth_task(experiment, int(config[DEPTH]), distillation=distillation)


def depth_task(experiment: Experiment, depth: int, *, distillation: float) -> Task:
    """Build the task of a client that trains so many blocks, from the first."""
    return replace(
        build_task(experiment),
        model_fn=depth_model_fn(experiment, depth),
        loss_fn=partial(distilling_loss, distillation=distillation),
    )


def distilling_loss(outputs: Tensor, targets: Tensor, *, distillation: float) -> Tensor:
    """Add up the classifiers' cross-entropies, and how far they are from each other.

    Outputs are ``(batch, classifiers, classes)``; ``distillation`` weighs the mean
    divergence of each classifier from the others, which are taken as they are.
    """
    logs = functional.log_softmax(outputs, dim=2).unbind(dim=1)
    loss = torch.stack([functional.nll_loss(each, targets) for each in logs]).sum()
    divergences = [
        functional.kl_div(
            pupil, teacher.detach(), reduction="batchmean", log_target=True
        )
        for pupil in logs
        for teacher in logs
        if pupil is not teacher
    ]
    if not divergences:
        return loss
    weight = distillation / (len(logs) - 1)
    return loss + weight * torch.stack(divergences).sum()


def build_strategy(setting: Setting) -> Strategy:
    """Build the strategy that gives each client the most blocks it can hold."""
    num_rounds = setting.experiment.num_rounds
    ladder = Ladder(
        method=NAME,
        submodels=depth_submodels(setting.experiment),
        config_fn=lambda server_round: {
            DISTILLATION: distillation_weight(server_round, num_rounds=num_rounds)
        },
    )
    rounds = NestedRounds(ladder, seed=setting.experiment.seed)
    return SampledRounds(rounds, setting)


def ensemble(outputs: Tensor) -> Tensor:
    """Average the classifiers' scores ``(batch, classifiers, classes)``."""
    return outputs.mean(dim=1)


DEPTHFL = Method(
    name=NAME,
    summary="weak devices train the first blocks, with classifiers of their own",
    strategy_fn=build_strategy,
    model_fn=depth_model_fn,
    outputs_fn=ensemble,
    task_fn=task_for,
)
