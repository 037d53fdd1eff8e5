"""Federated runs whose places compute on a given torch device, and what they leave.

For the tests of every device that a machine has: ``second_device`` and CUDA.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from flwr.app import ArrayRecord, Context
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils._pytree import tree_leaves

from flwr_smartsplit import (
    RecomputePlan,
    Route,
    SmartSplitNumPyClient,
    Task,
    build_client_app,
    proximal,
)
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.flower.serde.replies import reply_from_content
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.train.rng import UnitStreams, derived_seed
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.torch_device import generators_of
from flwr_smartsplit.types import Rerun
from tests.flower.apps import Run, initial_arrays, make_client, run, smart_split
from tests.tasks import SEED, TASK, initial_state, loader, tiny_cnn

ROUTES = {
    "c0": Route.whole(),
    "c1": Route.split(4, edge="far"),
    "c2": Route.u_shape(3, 7, edge="near"),
    "c3": Route.hops((2, 6), edges=("near", "far")),
    "c4": Route((2, 4, 8), ("device", "near", "far", "device")),
}
MOVES = {"c1": {0: 7, 1: 2, 2: 6}, "c2": {1: 5, 2: 1}, "c3": {2: 5}}


def decayed(optimizer: Any, config: Any) -> ExponentialLR:
    """Lower the learning rate at each step."""
    del config
    return ExponentialLR(optimizer, 0.9)


TASKS: dict[str, Task] = {
    "momentum": TASK,
    "clipped": replace(TASK, max_gradient_norm=0.5),
    "Adam, accumulated": replace(
        TASK, optimizer_fn=partial(Adam, lr=0.01), accumulate=2
    ),
    "AdamW, scheduled": replace(
        TASK, optimizer_fn=partial(AdamW, lr=0.01), schedule_fn=decayed
    ),
    "FedProx": replace(
        TASK,
        optimizer_fn=partial(proximal, optimizer_fn=TASK.optimizer_fn, mu=0.1),
    ),
}


def trained(
    task: Task,
    *,
    device: Any = "cpu",
    edge_device: str = "cpu",
    is_split: bool = True,
) -> Run:
    """Train five clients for two rounds, on all kinds of routes or each one whole.

    On the way cuts move, and a client begins to recompute.
    """
    edges = [LocalEdge(name=name, device=edge_device) for name in ("near", "far")]

    def route_of(request: RouteRequest) -> Route:
        return ROUTES[request.device.client_key] if is_split else Route.whole()

    def app(index: int) -> Any:
        def client_fn(context: Context) -> SmartSplitNumPyClient:
            client = make_client(
                index, task=task, edges=edges, device=device, cap_mode="strict"
            )
            changed = replace(client._conditions, between_steps=_change)
            client._conditions = changed
            return client

        return build_client_app(client_fn)

    strategy = smart_split(
        edges, task=task, choose_route=route_of, fraction_evaluate=1.0
    )
    return run([app(index) for index in range(len(ROUTES))], strategy)


def _change(runner: RouteRunner) -> None:
    key, step = runner.plan.client_key, runner.num_steps
    if runner.route.cuts and step in MOVES.get(key, {}):
        runner.move(MOVES[key][step], reason="told to")
    elif key == "c0" and step == 1:
        runner.replan(RecomputePlan(reruns=(Rerun(1, 5),)))


@contextmanager
def strays(device: torch.device) -> Iterator[list[str]]:
    """Collect what a runner on a device has elsewhere when it updates."""
    found: list[str] = []
    update: Callable[..., None] = SegmentRunner.update

    def watched(self: SegmentRunner, norm: float | None = None) -> None:
        values: dict[str, Any] = dict(self.segment.state_dict(keep_vars=True))
        for name, parameter in self.segment.named_parameters():
            values[f"{name}.grad"] = parameter.grad
        update(self, norm)
        state = {} if self.optimizer is None else self.optimizer.state
        for number, entry in enumerate(state.values()):
            # Torch keeps its counters on the CPU, unless told otherwise.
            values |= {f"{k} {number}": v for k, v in entry.items() if k != "step"}
        if self.device == device:
            found.extend(
                f"{name} on {leaf.device}"
                for name, value in values.items()
                for leaf in tree_leaves(value)
                if isinstance(leaf, Tensor) and leaf.device != device
            )

    with patch.object(SegmentRunner, "update", watched):
        yield found


def peaks(made: Run) -> list[tuple[str, int]]:
    """Read each client's metered peaks off the replies, in their order."""
    told = [message.content for message in made.grid.replied if message.has_content()]
    records = [(content, content.config_records.get("smartsplit")) for content in told]
    replies = [
        reply_from_content(content)
        for content, record in records
        if record is not None and "smartsplit.reply" in record
    ]
    return sorted((r.client_key, r.report.peak_bytes) for r in replies)


def plain_loop(task: Task, client: int, device: torch.device) -> dict[str, Any]:
    """Train one client of the tiny task on a device, in a loop that knows no units."""
    model = tiny_cnn()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in initial_state().items()})
    model.to(device).train()
    optimizer = task.optimizer_fn(model.parameters())
    streams, key = UnitStreams(SEED, 1, f"c{client}", device), f"c{client}"
    (dropout,) = (i for i, m in enumerate(model) if isinstance(m, nn.Dropout))
    for step, (x, y) in enumerate(streams.batches(loader(client), 0)):
        optimizer.zero_grad()
        outputs = model[:dropout](x.to(device))
        for generator in generators_of(device):
            generator.manual_seed(derived_seed(SEED, 1, key, step, dropout))
        outputs = model[dropout:](outputs)
        nn.functional.cross_entropy(outputs, y.to(device)).backward()
        if task.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.max_gradient_norm)
        optimizer.step()
    return {k: v.cpu().numpy() for k, v in model.state_dict().items()}


def one_client(task: Task, route: Route, device: str, **facts: Any) -> Run:
    """Train one client for one round along a route, all of it on one device."""
    edges = [LocalEdge(name=name, device=device) for name in ("near", "far")]
    facts = {"task": task, "edges": edges, "device": device, **facts}
    app = build_client_app(lambda context: make_client(0, **facts))
    strategy = smart_split(
        edges,
        task=task,
        choose_route=lambda request: route,
        min_available_nodes=1,
        min_train_nodes=1,
    )
    return run([app], strategy, num_rounds=1, arrays=arrays_of(task))


def arrays_of(task: Task) -> ArrayRecord:
    """Draw the state that a task's model begins with."""
    if task.model_fn is TASK.model_fn:
        return initial_arrays()
    torch.manual_seed(0)
    return ArrayRecord(task.model_fn().state_dict())
