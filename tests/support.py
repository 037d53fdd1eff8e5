"""What the tests of docs/support.md share: all kinds of route beside the stock model.

Each task is compared twice. A plain loop over the stock module is the truth for single
routes, with the predicted peak beside the measured one. Federated runs by the public
strategy and client then give the same bits with mixed routes as with whole ones.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from flwr.clientapp import ClientApp

from flwr_smartsplit import (
    Route,
    Task,
    predicted_peak_bytes,
    profile_chain,
)
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.flower.apps import Run, message_app, run, smart_split
from tests.tasks import BATCH_SIZE, NUM_CLASSES, TASK, differences

EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
ROUTES = (
    Route.whole(),
    Route.split(4, edge="near"),
    Route.u_shape(2, 7, edge="far"),
    Route.hops((3, 6), edges=("near", "far")),
)


def in_turn(request: RouteRequest) -> Route:
    """Give the clients all four kinds of route."""
    return routes_of(request.num_units)[request.index % len(ROUTES)]


def routes_of(num_units: int) -> tuple[Route, ...]:
    """Return all four kinds of route of a chain with at least four units."""
    last = num_units - 1
    if last > ROUTES[2].cuts[-1]:
        return ROUTES
    return (
        Route.whole(),
        Route.split(last // 2 or 1, edge="near"),
        Route.u_shape(1, last, edge="far"),
        Route.hops((1, last), edges=("near", "far")),
    )


def check_every_kind(*, is_exact: bool = True, **changes: Any) -> None:
    """Compare all four kinds of route with the stock module, then whole runs.

    ``is_exact`` says whether peaks are predicted to the byte.
    """
    changes = {"example_targets": torch.arange(NUM_CLASSES), **changes}
    task = replace(TASK, **changes)
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=BATCH_SIZE, task=task)
    with RouteChecker(task, example_batches(task, batch_size=BATCH_SIZE)) as checker:
        for route in routes_of(len(chain)):
            check = checker.check(route)
            assert check.differences == (), route
            if is_exact:
                predicted = predicted_peak_bytes(profile, route)
                measured = check.measured_peak_bytes
                assert (route, measured) == (route, predicted)
    check_runs(task)


def check_runs(task: Task) -> None:
    """Compare a run of mixed routes with one of whole routes, and with its start."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        start = state_of(task.model_fn())
    how: dict[str, Any] = {"make": drawn_app, "num_rounds": 1}
    mixed = train_mixed(task, arrays=to_array_record(start), **how)
    whole = train_whole(task, arrays=to_array_record(start), **how)
    assert differences(mixed.state, whole.state) == []
    assert differences(mixed.state, start) != []


def drawn_app(index: int, *, task: Task = TASK, **changes: Any) -> ClientApp:
    """Make a client with batches like the task's examples, of two sizes."""
    batches = example_batches(task, batch_size=BATCH_SIZE, seed=index)
    sizes: dict[str, int] = {"num_examples": 3 * BATCH_SIZE - 1}
    sizes["batch_size"] = BATCH_SIZE
    return message_app(index, task=task, train_loader=batches, **sizes, **changes)


def train_mixed(
    task: Task = TASK, *, make: Callable[..., ClientApp] = message_app, **changes: Any
) -> Run:
    """Train four clients on four kinds of route."""
    return _trained(task, make, EDGES, choose_route=in_turn, **changes)


def train_whole(
    task: Task = TASK, *, make: Callable[..., ClientApp] = message_app, **changes: Any
) -> Run:
    """Train the same clients whole."""
    return _trained(task, make, (), **changes)


def _trained(task: Task, make: Any, edges: Any, **changes: Any) -> Run:
    start = {name: changes.pop(name, None) for name in ("train_config", "arrays")}
    start["num_rounds"] = changes.pop("num_rounds", 2)
    clients = [make(index, task=task, edges=EDGES) for index in range(len(ROUTES))]
    made = run(clients, smart_split(edges, task=task, **changes), **start)
    assert made.kinds() == []
    return made
