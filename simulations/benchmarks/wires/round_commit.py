"""What a round costs at an edge besides its steps.

``python -m simulations.benchmarks.wires.round_commit``.

Clients train one step behind a cut after the first unit, so that nearly all of the
model is at the edge. Every request is timed: in wall-clock time, in CPU time of this
process and its children, and in bytes of arrays. CPU time of children is counted in
steps of 10 ms. The resident set is the largest of the process that has the edge, and
its share in a file that is mapped counts.
"""

import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from flwr_smartsplit import RayEdge, Route, Task
from flwr_smartsplit.device.local_training import Conditions, train_locally
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.protocol import ReplyT, Request, Transport, payload_bytes
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.server.aggregation import settle_round
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.types import (
    ClientPlan,
    ClientReply,
    DeviceProfile,
    Expectation,
    TailExpectation,
)
from simulations.benchmarks.process_tree import child_pid, cpu_seconds
from simulations.experiments.models import image_task, torchvision_model

CUT = 1
BATCH_SIZE = 2
KINDS = ("HoldState", "OpenSigned", "Seal", "Commit")
MERGE = "merge"


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18, 45 MB": partial(torchvision_model, "resnet18", num_classes=10),
    "ResNet-50, 102 MB": partial(torchvision_model, "resnet50", num_classes=1000),
}
OVER_RAY = "over Ray"
EDGES: dict[str, Callable[[], Edge]] = {"in process": LocalEdge, OVER_RAY: RayEdge}


@dataclass
class Spent:
    """What the requests of one kind took."""

    count: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass
class Ledger:
    """What all requests took, by kind, and the process that answers them."""

    by_kind: defaultdict[str, Spent] = field(default_factory=lambda: defaultdict(Spent))

    def timed(self, kind: str, do: Callable[[], Any]) -> Any:
        """Do something, and note what it took."""
        spent = self.by_kind[kind]
        cpu, started = cpu_seconds(), time.perf_counter()
        result = do()
        spent.seconds += time.perf_counter() - started
        spent.cpu_seconds += cpu_seconds() - cpu
        spent.count += 1
        return result


@dataclass(frozen=True)
class Measured:
    """A transport, or a host, whose requests are noted."""

    inner: Any
    ledger: Ledger

    def start(self, *facts: Any) -> str:
        """Start the edge."""
        address: str = self.inner.start(*facts)
        return address

    def connect(self, address: str) -> Transport:
        """Reach the edge."""
        return Measured(self.inner.connect(address), self.ledger)

    def stop(self, address: str) -> None:
        """Stop the edge."""
        self.inner.stop(address)

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Send a request."""
        kind = type(request).__name__
        reply: ReplyT = self.ledger.timed(kind, lambda: self.inner.send(request))
        self.ledger.by_kind[kind].sent_bytes += payload_bytes(request)
        self.ledger.by_kind[kind].received_bytes += payload_bytes(reply)
        return reply


def edge_peak_bytes() -> int:
    """Read the largest resident set so far of the process that has the edge."""
    pid = child_pid("EdgeActor") or os.getpid()
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measured(
    model: str, kind: str, *, num_clients: int, num_rounds: int
) -> dict[str, Any]:
    """Do some rounds in this process; the first warms up and is not counted."""
    torch.set_num_threads(1)
    if kind == OVER_RAY:
        ray.init(address="local", num_cpus=1, include_dashboard=False)
    task, ledger, edge = image_task(MODELS[model]), Ledger(), EDGES[kind]()
    host: Any = Measured(edge.host, ledger)
    edge = replace(edge, host=host)
    pool = EdgePool([edge], task)
    state = state_of(task.model_fn())
    for number in range(num_rounds + 1):
        if number == 1:
            ledger.by_kind.clear()
        state = one_round(pool, edge, task, state, ledger, num_clients)
    peak = edge_peak_bytes()
    pool.stop()
    spent = {kind: asdict(ledger.by_kind[kind]) for kind in (*KINDS, MERGE)}
    return {"model": model, "edge": kind, "peak_bytes": peak, "spent": spent}


# longer than 40 lines because it says all that a plan and its replies need
def one_round(  # noqa: PLR0917 - a round and where it is noted
    pool: EdgePool,
    edge: Edge,
    task: Task,
    state: dict[str, Any],
    ledger: Ledger,
    num_clients: int,
) -> dict[str, Any]:
    """Train one step at each client, one after the other, and merge."""
    chain, route, digest = build_chain(task), Route.split(CUT), state_digest(state)
    pool.prepare(digest)
    addresses, failures = pool.hold(pool.names, digest, state)
    assert not failures, failures
    profile = profile_of(task, batch_size=BATCH_SIZE)
    names = chain.state_names(0, CUT)
    batch = torch.randn(BATCH_SIZE, 3, 32, 32), torch.zeros(BATCH_SIZE).long()
    conditions = Conditions(
        task=task, connect=lambda _, address: edge.connect(address), cap_mode="off"
    )
    replies, expected = [], {}
    for client in range(num_clients):
        key = str(client)
        plan = ClientPlan(
            client_key=key,
            round_number=1,
            route=route,
            seed=0,
            state_digest=digest,
            edge_addresses=addresses,
        )
        device = DeviceProfile(
            client_key=key,
            budget_bytes=None,
            num_examples=BATCH_SIZE,
            batch_size=BATCH_SIZE,
        )
        plan = pool.signed(plan, device, profile, is_train=True)
        own = {name: state[name] for name in names}
        outcome = train_locally(plan, own, [batch], conditions)
        replies.append(
            ClientReply(
                client_key=key,
                round_number=1,
                state=outcome.state,
                receipts=outcome.receipts,
                report=outcome.report,
            )
        )
        tail = TailExpectation(
            session=plan.session(edge.name),
            names=frozenset(chain.changed_names(CUT, len(chain))),
        )
        expected[key] = Expectation(
            client_key=key,
            device_names=frozenset(chain.changed_names(0, CUT)),
            tails={edge.name: tail},
        )
    settled = ledger.timed(
        MERGE,
        lambda: settle_round(
            replies, round_number=1, expected=expected, current=state, edges=pool
        ),
    )
    assert settled.state is not None, settled.failures
    pool.release(1, "")
    return dict(settled.state)


def table_of(found: list[dict[str, Any]]) -> Table:
    """Lay out what one request of each kind takes, for people."""
    table = Table("model", "edge", "request", box=None)
    for column in ("a round", "ms", "CPU ms", "MB there", "MB back", "edge peak MB"):
        table.add_column(column, justify="right")
    for each in found:
        for kind, spent in each["spent"].items():
            count, is_first = max(spent["count"], 1), kind == KINDS[0]
            table.add_row(
                each["model"] if is_first else "",
                each["edge"] if is_first else "",
                kind,
                f"{spent['count'] / each['num_rounds']:g}",
                f"{1e3 * spent['seconds'] / count:.1f}",
                f"{1e3 * spent['cpu_seconds'] / count:.1f}",
                f"{spent['sent_bytes'] / count / 1e6:.1f}",
                f"{spent['received_bytes'] / count / 1e6:.1f}",
                f"{each['peak_bytes'] / 1e6:.0f}" if is_first else "",
            )
    return table


def main(
    *,
    clients: Annotated[int, typer.Option(min=1, help="Clients of a round.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure what edges do with whole states; ``merge`` has the commit in it."""
    found = []
    for model in MODELS:
        for kind in EDGES:  # Each in a process of its own, for its resident set.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as process:
                do = partial(measured, num_clients=clients, num_rounds=rounds)
                result = process.submit(do, model, kind).result()
            found.append({**result, "num_rounds": rounds})
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    Console().print(table_of(found))


if __name__ == "__main__":
    typer.run(main)
