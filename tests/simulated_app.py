"""A federated run under Flower's simulation engine, for tests.

The task is at module level, so that Ray's workers build it by reference.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from flwr.simulation import run_simulation
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import (
    RayEdge,
    Route,
    SmartSplitNumPyClient,
    Task,
    build_client_app,
)
from flwr_smartsplit.plan.routes import RouteRequest
from tests.in_process_grid import InProcessGrid

NUM_CLASSES = 5
EDGES = (RayEdge(), RayEdge(name="far"))
BATCH_SIZE = 8


def small_cnn() -> nn.Sequential:
    """Build a CNN with BatchNorm, GroupNorm and dropout: ten places to cut."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(6, 12, 3),
        nn.GroupNorm(2, 12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3),
        nn.BatchNorm2d(24),
        nn.Flatten(),
        nn.Linear(384, NUM_CLASSES),
    )


TASK = Task(
    model_fn=small_cnn,
    loss_fn=nn.functional.cross_entropy,
    optimizer_fn=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    example_inputs=torch.zeros(1, 1, 8, 8),
    example_targets=torch.zeros(1, dtype=torch.int64),
)


def client_fn(
    context: Context, *, budgets: Sequence[int | None]
) -> SmartSplitNumPyClient:
    """Make the client of one partition, with data of its own size."""
    index = int(context.node_config["partition-id"])
    chance = torch.Generator().manual_seed(index)
    num_examples = 3 * BATCH_SIZE + index
    examples = TensorDataset(
        torch.randn(num_examples, 1, 8, 8, generator=chance),
        torch.randint(0, NUM_CLASSES, (num_examples,), generator=chance),
    )
    return SmartSplitNumPyClient(
        TASK,
        DataLoader(examples, batch_size=BATCH_SIZE, shuffle=True),
        client_key=str(index),
        budget_bytes=budgets[index],
        edges=EDGES,
    )


def initial_arrays() -> ArrayRecord:
    """Make the state that every run starts from."""
    torch.manual_seed(1)
    return ArrayRecord(small_cnn().state_dict())


def all_kinds(request: RouteRequest) -> Route:
    """Give six clients all kinds of route, over two edges."""
    return (
        Route.whole(),
        Route.split(3, edge="far"),
        Route.u_shape(2, 8),
        Route.hops((4, 7), edges=("edge", "far")),
        Route((1, 5, 9), ("device", "edge", "far", "device")),
        Route.split(6),
    )[request.index]


def run_here(strategy: Strategy, *, num_clients: int, num_rounds: int) -> Result:
    """Run a strategy in this process, with clients that hold the whole model."""
    app = build_client_app(partial(client_fn, budgets=[None] * num_clients))
    grid = InProcessGrid([app] * num_clients)
    return strategy.start(grid, initial_arrays(), num_rounds=num_rounds)


def simulate(
    strategy: Strategy,
    budgets: Sequence[int | None],
    *,
    num_rounds: int,
    num_workers: int,
) -> Result:
    """Run a strategy with one client per budget, and return Flower's result."""
    server_app = ServerApp()
    results: list[Result] = []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        results.append(
            # Workers that start on a busy machine took more than two minutes.
            strategy.start(grid, initial_arrays(), num_rounds=num_rounds, timeout=600)
        )

    backend: dict[str, Any] = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": num_workers, "include_dashboard": False},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            server_app=server_app,
            client_app=build_client_app(partial(client_fn, budgets=budgets)),
            num_supernodes=len(budgets),
            backend_config=backend,
        )
    return results[0]
