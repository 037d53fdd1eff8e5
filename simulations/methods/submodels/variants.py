"""Variants of the task: what a method changes in the clients' training, by message.

A strategy says it in the message's config, with the words below; the client builds the
task that they ask for. Without any, it trains the experiment's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, final

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor
from torch.nn import functional

from flwr_smartsplit import (
    SmartSplitNumPyClient,
    Task,
    build_client_app,
    proximal,
)
from flwr_smartsplit.flower.serde.records import records_of
from simulations.experiments.clients import build_task
from simulations.experiments.data import client_indices, load_images
from simulations.experiments.experiment import Experiment
from simulations.experiments.models import narrow_model_fn
from simulations.experiments.models_depth import depth_model_fn

WIDTH = "variant-width"
"""Share of the model's channels, for HeteroFL."""

DEPTH, DISTILLATION = "variant-depth", "variant-distillation"
"""Number of blocks, and weight of what their classifiers teach each other."""

PROXIMAL_MU = "proximal-mu"
"""Weight of FedProx's term; the word is Flower's."""

Labels = tuple[int, ...]


def task_for(experiment: Experiment, client: int, config: Mapping[str, Any]) -> Task:
    """Build the task that a message asks one client to train.

    Parameters
    ----------
    experiment : Experiment
        What is run.
    client : int
        Which client.
    config : Mapping[str, Any]
        What the message says.
    """
    if WIDTH in config:
        labels = local_labels(experiment)[client]
        return width_task(experiment, float(config[WIDTH]), labels)
    if DEPTH in config:
        return depth_task(
            experiment, int(config[DEPTH]), distillation=float(config[DISTILLATION])
        )
    task = build_task(experiment)
    mu = float(config.get(PROXIMAL_MU, 0.0))
    if mu > 0:
        pulled = partial(proximal, optimizer_fn=task.optimizer_fn, mu=mu)
        return replace(task, optimizer_fn=pulled)
    return task


@lru_cache(maxsize=2)
def local_labels(experiment: Experiment) -> tuple[Labels, ...]:
    """List the classes that each client has examples of."""
    targets = load_images(experiment).y_train
    shares = client_indices(experiment)
    return tuple(tuple(map(int, np.unique(targets[share]))) for share in shares)


# --- widths -----------------------------------------------------------------------


def width_task(experiment: Experiment, width: float, labels: Labels) -> Task:
    """Build the task of a client that trains a share of the channels.

    Parameters
    ----------
    experiment : Experiment
        What is run.
    width : float
        Share of the channels.
    labels : tuple[int, ...]
        The classes that the client has examples of.
    """
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

    Parameters
    ----------
    outputs : Tensor
        Scores, ``(batch, classes)``.
    targets : Tensor
        Classes, ``(batch,)``.
    is_foreign : tuple[bool, ...]
        For each class, whether the client has no example of it.
    """
    masked = outputs.masked_fill(torch.tensor(is_foreign), 0.0)
    return functional.cross_entropy(masked, targets)


# --- depths -----------------------------------------------------------------------


def depth_task(experiment: Experiment, depth: int, *, distillation: float) -> Task:
    """Build the task of a client that trains the first blocks.

    Parameters
    ----------
    experiment : Experiment
        What is run.
    depth : int
        How many blocks.
    distillation : float
        Weight of what the classifiers teach each other.
    """
    return replace(
        build_task(experiment),
        model_fn=depth_model_fn(experiment, depth),
        loss_fn=partial(distilling_loss, distillation=distillation),
    )


def distilling_loss(outputs: Tensor, targets: Tensor, *, distillation: float) -> Tensor:
    """Add up the classifiers' cross-entropies, and how far they are from each other.

    Parameters
    ----------
    outputs : Tensor
        Scores of each classifier, ``(batch, classifiers, classes)``.
    targets : Tensor
        Classes, ``(batch,)``.
    distillation : float
        Weight of the mean divergence of each classifier from the others, which are
        taken as they are.
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


# --- the clients' app -------------------------------------------------------------


@final
class VariantApp(ClientApp):
    """Hand each message to a client with the task that it asks for.

    Parameters
    ----------
    client_fn : Callable[..., SmartSplitNumPyClient]
        ``client_fn(context, task=task)`` builds the client of one partition.
    experiment : Experiment
        What is run.
    """

    def __init__(
        self, client_fn: Callable[..., SmartSplitNumPyClient], experiment: Experiment
    ) -> None:
        super().__init__()
        self._client_fn = client_fn
        self._experiment = experiment

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        config: dict[str, Any] = {}
        for record in records_of(message.content, ConfigRecord):
            config |= dict(record)
        client = int(context.node_config["partition-id"])
        task = task_for(self._experiment, client, config)
        client_fn = partial(self._client_fn, task=task)
        return build_client_app(client_fn)(message, context)
