"""The clients' side of an experiment: the task, and the function that builds a client.

It runs in Ray's workers, which get the experiment as a value and rebuild the rest.
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from flwr.app import Context

from flwr_smartsplit import RayEdge, SmartSplitNumPyClient, Task
from simulations.data import input_shape, train_loader
from simulations.experiment import Experiment
from simulations.models import model_fn

EDGES = (RayEdge(),)
"""Where clients may have the rest of a model trained, if their plan says so."""


@lru_cache(maxsize=2)
def build_task(experiment: Experiment) -> Task:
    """Build what every place needs to build its part of the training."""
    return Task(
        model_fn=model_fn(experiment),
        loss_fn=torch.nn.functional.cross_entropy,
        optimizer_fn=partial(
            torch.optim.SGD, lr=experiment.learning_rate, momentum=experiment.momentum
        ),
        example_inputs=torch.zeros(1, *input_shape(experiment)),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def build_client(
    context: Context,
    *,
    experiment: Experiment,
    budgets_bytes: Sequence[int | None],
    task: Task | None = None,
) -> SmartSplitNumPyClient:
    """Build the client of one partition.

    Parameters
    ----------
    context : Context
        Flower's; its node_config holds the partition's number.
    experiment : Experiment
        What is run.
    budgets_bytes : Sequence[int or None]
        The cap of each client's device; None for no cap. A strategy that knows no
        budgets, such as Flower's FedAvg, has whole models trained without a cap.
    task : Task, optional
        What to train; the experiment's own task if not given.
    """
    client = int(context.node_config["partition-id"])
    return SmartSplitNumPyClient(
        task or build_task(experiment),
        train_loader(experiment, client),
        client_key=str(client),
        budget_bytes=budgets_bytes[client],
        edges=EDGES,
        seed=experiment.seed,
    )
