"""HeteroFL: weak devices train a slice of each layer's channels.

The slices are nested: a width holds the first channels of every wider one. Each value
is averaged over the clients that hold it. Of the paper's three means for that:

* Scaler ("Heterogeneous Federated Learning", scaler): a slice's activations are
  multiplied by the inverse of its width after each convolution, in training only.
* Masked cross-entropy ("Experimental Results", masking for non-IID data): a client
  sets the scores of classes it has no example of to zero, and its rows of the
  classifier for them are left out of the mean. The server knows who has which classes.
* Static batch normalisation: not needed, since group normalisation keeps no statistics.
  A group has as many channels at every width, so a slice is normalised as in the whole
  network.

The paper's clients hold equally many examples and count alike. Here each counts by its
number of examples, as in FedAvg and in every other method of this folder, which is the
same where they are equal.

References
----------
Diao, Ding, Tarokh: HeteroFL: Computation and Communication Efficient Federated Learning
for Heterogeneous Clients. ICLR 2021. arXiv:2010.01264.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy
from torch import Tensor
from torch.nn import functional

from flwr_smartsplit import Task
from simulations.experiments.clients import build_task
from simulations.experiments.data import client_indices, load_images
from simulations.experiments.experiment import Experiment
from simulations.experiments.models import narrow_model_fn
from simulations.methods.method import Method, Setting
from simulations.methods.nested import (
    Ladder,
    NestedRounds,
    Submodel,
    submodel_of,
)
from simulations.methods.sampled import SampledRounds

NAME, WIDTH = "heterofl", "width"

WIDTHS = (1.0, 0.5, 0.25, 0.125)
"""Shares of the channels: the paper's computation complexity levels a to d."""

CLASSIFIER = ("classify.weight", "classify.bias")

Labels = tuple[int, ...]


def width_submodels(experiment: Experiment) -> tuple[Submodel, ...]:
    """Work out the widths of the experiment's model and what they need."""
    every_label = tuple(range(load_images(experiment).num_classes))
    return tuple(
        submodel_of(
            width_task(experiment, width, every_label),
            name=f"width {width:g}",
            config={WIDTH: width},
            batch_size=experiment.batch_size,
        )
        for width in WIDTHS
    )


@lru_cache(maxsize=2)
def local_labels(experiment: Experiment) -> tuple[Labels, ...]:
    """List the classes that each client has examples of."""
    targets = load_images(experiment).y_train
    shares = client_indices(experiment)
    return tuple(tuple(map(int, np.unique(targets[share]))) for share in shares)


def task_for(experiment: Experiment, client: int, config: Mapping[str, Any]) -> Task:
    """Build the task of a client that was asked for a width."""
    labels = local_labels(experiment)[client]
    return width_task(experiment, float(config[WIDTH]), labels)


def width_task(experiment: Experiment, width: float, labels: Labels) -> Task:
    """Build the task of a client with these labels and a share of the channels."""
    num_classes = load_images(experiment).num_classes
    is_foreign = tuple(label not in labels for label in range(num_classes))
    return replace(
        build_task(experiment),
        model_fn=narrow_model_fn(experiment, width),
        loss_fn=partial(masked_cross_entropy, is_foreign=is_foreign),
    )


def masked_cross_entropy(
    outputs: Tensor, targets: Tensor, *, is_foreign: tuple[bool, ...]
) -> Tensor:
    """Work out the cross-entropy with the scores of foreign classes set to zero.

    Outputs are scores ``(batch, classes)``; foreign classes have no example here.
    """
    masked = outputs.masked_fill(torch.tensor(is_foreign), 0.0)
    return functional.cross_entropy(masked, targets)


def build_strategy(setting: Setting) -> Strategy:
    """Build the strategy that gives each client the widest slice it can hold."""
    labels = local_labels(setting.experiment)
    ladder = Ladder(
        method=NAME,
        submodels=width_submodels(setting.experiment),
        rows_fn=lambda key: dict.fromkeys(CLASSIFIER, labels[int(key)]),
    )
    rounds = NestedRounds(ladder, seed=setting.experiment.seed)
    return SampledRounds(rounds, setting)


HETEROFL = Method(
    name=NAME,
    summary="weak devices train a slice of the channels",
    strategy_fn=build_strategy,
    task_fn=task_for,
)
