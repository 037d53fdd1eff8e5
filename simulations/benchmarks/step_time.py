"""What splitting costs in time: ``python -m simulations.benchmarks.step_time``.

One client trains the same batches in turn as a plain PyTorch loop, along the whole
route, split with the edge in its own process, and split over Ray. Only ratios within
one run mean anything; the machine's speed drifts.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import ray
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flwr_smartsplit import RayEdge, Route, Task
from flwr_smartsplit.device.local_training import Conditions, train_locally
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.protocol import ReplyT, Request, Transport
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.profile.task_profiles import profile_once
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.types import ClientPlan, DeviceProfile
from simulations.experiments.clients import build_task
from simulations.experiments.data import input_shape
from simulations.studies.quickstart import quickstart

Batches = list[tuple[Tensor, Tensor]]
PLAIN = "plain PyTorch loop"
WHOLE_ROUTE = "whole route"
IN_PROCESS = "split, edge in process"
OVER_RAY = "split, edge over Ray"
WAYS = (PLAIN, WHOLE_ROUTE, IN_PROCESS, OVER_RAY)


@dataclass
class TimedTransport:
    """Add up how long each kind of request takes through another transport."""

    inner: Transport
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Send, and note the time."""
        started = time.perf_counter()
        reply = self.inner.send(request)
        self.seconds[type(request).__name__] += time.perf_counter() - started
        return reply


@dataclass(frozen=True)
class Setting:
    """A task, its batches, and the state every repetition starts from."""

    task: Task
    batches: Batches
    state: dict[str, Any]
    cut: int

    def plain_seconds(self) -> dict[str, float]:
        """Time a loop that knows nothing of this package."""
        model = self.task.model_fn().train()
        optimizer = self.task.optimizer_fn(model.parameters())
        started = time.perf_counter()
        for inputs, targets in self.batches:
            optimizer.zero_grad(set_to_none=True)
            loss = self.task.loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            float(loss)
        return {"total": time.perf_counter() - started}

    def route_seconds(
        self, route: Route, edge: Edge | None, pool: EdgePool
    ) -> dict[str, float]:
        """Time one client's round along a route, and its requests.

        The pool's edge lives on from round to round, as it does in a run.
        """
        chain = build_chain(self.task)
        digest = state_digest(self.state)
        pool.prepare(digest)
        addresses, _ = pool.hold(pool.names, digest, self.state)
        timed: list[TimedTransport] = []

        def connect(place: str, address: str) -> Transport:
            assert edge is not None, place
            timed.append(TimedTransport(edge.connect(address)))
            return timed[-1]

        plan = ClientPlan(
            client_key="0",
            round_number=1,
            route=route,
            seed=0,
            state_digest=digest,
            edge_addresses=addresses,
        )
        batch_size = len(self.batches[0][1])
        device = DeviceProfile(
            client_key="0",
            budget_bytes=None,
            num_examples=batch_size * len(self.batches),
            batch_size=batch_size,
        )
        profile = profile_once(chain, self.task, batch_size=batch_size)
        plan = pool.signed(plan, device, profile, is_train=True)
        names = chain.state_names(0, route.legs(len(chain))[0].stop)
        state = {name: self.state[name] for name in names}
        conditions = Conditions(task=self.task, connect=connect)
        outcome = train_locally(plan, state, self.batches, conditions)
        seconds = dict(timed[0].seconds) if timed else {}
        return {"total": outcome.report.seconds, **seconds}


def make_setting(data: str, model: str, *, batch_size: int, num_steps: int) -> Setting:
    """Draw batches of the right shape, and cut the model in the middle."""
    experiment = replace(quickstart(data), model=model, batch_size=batch_size)
    task = build_task(experiment)
    torch.manual_seed(0)
    shape = input_shape(experiment)
    batches = [
        (torch.randn(batch_size, *shape), torch.randint(0, 10, (batch_size,)))
        for _ in range(num_steps)
    ]
    cut = len(build_chain(task)) // 2
    return Setting(task, batches, state_of(task.model_fn()), cut)


def measure(
    setting: Setting, *, repeats: int, only: str = ""
) -> dict[str, dict[str, float]]:
    """Time every way in turn, several times; return medians per step.

    ``only`` is a part of the names of some ways.
    """
    split = Route.split(setting.cut)
    here, over_ray = LocalEdge(), RayEdge()
    pools = [EdgePool(edges, setting.task) for edges in ([], [here], [over_ray])]
    run = setting.route_seconds
    ways: dict[str, Callable[[], dict[str, float]]] = {
        PLAIN: setting.plain_seconds,
        WHOLE_ROUTE: lambda: run(Route.whole(), None, pools[0]),
        IN_PROCESS: lambda: run(split, here, pools[1]),
        OVER_RAY: lambda: run(split, over_ray, pools[2]),
    }
    ways = {name: way for name, way in ways.items() if only in name}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            seconds = way()
            if repeat:  # The first time warms caches up.
                seen[name].append(seconds)
    for pool in pools:
        pool.stop()
    return {
        name: {
            key: statistics.median(run[key] for run in runs) / len(setting.batches)
            for key in runs[0]
        }
        for name, runs in seen.items()
    }


def main(  # noqa: PLR0913 - one argument per option of the command line
    *,
    data: Annotated[str, typer.Option(help="Sets the shape of the inputs.")] = "digits",
    model: Annotated[str, typer.Option(help="small or torchvision:NAME.")] = "small",
    batch_size: int = 16,
    num_steps: int = 50,
    repeats: int = 5,
    only: Annotated[str, typer.Option(help="A part of some ways' names.")] = "",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time one client's steps along each route, and say where the time goes."""
    torch.set_num_threads(1)
    setting = make_setting(data, model, batch_size=batch_size, num_steps=num_steps)
    if not any(only in name for name in WAYS):
        raise typer.BadParameter(f"--only is {only!r}: a part of {', '.join(WAYS)}.")
    if only in OVER_RAY:
        options = {"include_dashboard": False, "log_to_driver": False}
        ray.init(address="local", num_cpus=1, **options)
    try:
        medians = measure(setting, repeats=repeats, only=only)
    finally:
        ray.shutdown()
    if as_json:
        sys.stdout.write(json.dumps(medians) + "\n")
        return
    table = Table("way", "ms/step", "ratio", "of it: waiting for the edge", box=None)
    for name, parts in medians.items():
        waiting = ", ".join(
            f"{key} {1e3 * value:.2f}" for key, value in parts.items() if key != "total"
        )
        base = medians.get(PLAIN, parts)["total"]
        ratio = f"{parts['total'] / base:.2f}" if PLAIN in medians else ""
        table.add_row(name, f"{1e3 * parts['total']:.2f}", ratio, waiting)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
