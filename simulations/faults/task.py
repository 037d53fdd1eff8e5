"""What the federations of this folder train: a small task, and its clients."""

from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import (
    SmartSplitNumPyClient,
    Task,
    build_client_app,
)
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.split.build import state_of
from flwr_smartsplit.types import ClientPlan, RecomputePlan, Route, StepReport

BATCH_SIZE, NUM_CLASSES, SHAPE = 4, 3, (1, 6, 6)
CUT, SPLIT_BYTES = 4, 12_552
"""Where the clients with this budget split; it is just enough for it."""


def small_cnn() -> nn.Sequential:
    """Build a model with buffers, chance and several places to cut."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, NUM_CLASSES),
    )


TASK = Task(
    model_fn=small_cnn,
    loss_fn=nn.functional.cross_entropy,
    optimizer_fn=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    example_inputs=torch.zeros(1, *SHAPE),
    example_targets=torch.zeros(1, dtype=torch.int64),
)


def build_task() -> Task:
    """Return the task, as the command line asks for it."""
    return TASK


def initial_state() -> dict[str, npt.NDArray[Any]]:
    """Draw the state that every run starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return state_of(small_cnn())


def loader_of(partition: int) -> DataLoader[Any]:
    """Draw a client's own examples: two batches and a few more."""
    chance = torch.Generator().manual_seed(partition)
    size = 2 * BATCH_SIZE + 1 + partition % 3
    images = torch.randn(size, *SHAPE, generator=chance)
    labels = torch.randint(0, NUM_CLASSES, (size,), generator=chance)
    return DataLoader(TensorDataset(images, labels), BATCH_SIZE, shuffle=True)


def app_of(
    partition: int, key: str, edges: tuple[Edge, ...] = (), *, is_split: bool
) -> ClientApp:
    """Make the app of one client."""

    def client_fn(context: Context) -> SmartSplitNumPyClient:
        return SmartSplitNumPyClient(
            TASK,
            loader_of(partition),
            client_key=key,
            budget_bytes=SPLIT_BYTES if is_split else None,
            edges=edges,
            step_seconds=paced,
            context=context,
        )

    return build_client_app(client_fn)


def route_of(request: RouteRequest) -> Route:
    """Split who has a budget, if there is an edge; let the others train all."""
    if request.edge is None or request.device.budget_bytes is None:
        return Route.whole()
    return Route.split(CUT, edge=request.edge)


def paced(plan: ClientPlan, route: Route, recompute: RecomputePlan) -> float:
    """Give every client a speed of its own, the same in every run."""
    del recompute
    at_device = route.cuts[0] if route.cuts else len(small_cnn())
    return at_device * (1.0 + ord(plan.client_key[-1]) % 7)


def given_seconds(plan: ClientPlan, report: StepReport) -> float:
    """Say how long a client took, the same in every run."""
    return report.num_examples * (1.0 + ord(plan.client_key[-1]) % 7)
