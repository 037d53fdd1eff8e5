"""What an edge's wire costs: ``python -m simulations.benchmarks.wires.edge_wires``.

Clients train over a boundary of 0.1, 1 and 8 MB with the edge in this process, as a
Ray actor, and as ``smartsplit edge`` without and with TLS. The model does next to
nothing, so that a step is its two messages. Only ratios within one run mean anything.
"""

import json
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._pytree import tree_leaves

from flwr_smartsplit import GrpcEdge, RayEdge, Route, Task
from flwr_smartsplit.device.local_training import Conditions, train_locally
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.profile.task_profiles import profile_once
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.types import ClientPlan, DeviceProfile
from simulations.benchmarks.process_tree import cpu_seconds
from simulations.benchmarks.step_time import TimedTransport

CERTIFICATES = Path(__file__).parents[3] / "examples/deployment/certificates.py"
BATCH_SIZE = 16
WIDTHS = {"0.1 MB": 1600, "1 MB": 16_384, "8 MB": 131_072}
CUT = 2


def first_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a loss that costs little."""
    return outputs.mean() + 0.0 * targets.float().mean()


class Scale(nn.Module):
    """One parameter for a whole boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Scale each value."""
        return inputs * self.weight


def task_of(width: int) -> Task:
    """Make a task whose boundary has so many numbers per example."""
    return Task(
        model_fn=model,
        loss_fn=first_loss,
        optimizer_fn=partial(torch.optim.SGD, lr=0.01),
        example_inputs=torch.zeros(1, width),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def model() -> nn.Sequential:
    """Build the model: all that it does is to read what it is given."""
    return nn.Sequential(Scale(), Scale(), Scale())


def task_small() -> Task:
    """Make the task of 0.1 MB."""
    return task_of(WIDTHS["0.1 MB"])


def task_middle() -> Task:
    """Make the task of 1 MB."""
    return task_of(WIDTHS["1 MB"])


def task_large() -> Task:
    """Make the task of 8 MB."""
    return task_of(WIDTHS["8 MB"])


TASKS: dict[str, Callable[[], Task]] = {
    "0.1 MB": task_small,
    "1 MB": task_middle,
    "8 MB": task_large,
}


@contextmanager
def edge_process(size: str, folder: Path, *options: str) -> Iterator[int]:
    """Run ``smartsplit edge``; yield its port."""
    command = [sys.executable, "-m", "flwr_smartsplit.cli", "edge"]
    command += [f"{__spec__.name if __spec__ else __name__}:{TASKS[size].__name__}"]
    command += ["--port", "0", "--spill", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+) \(", line)
        assert found is not None, line
        try:
            yield int(found[1])
        finally:
            process.terminate()
            process.wait(60)


# longer than 40 lines because it says all that a plan and a profile need
def round_of(
    edge: Edge, pool: EdgePool, task: Task, *, num_clients: int, num_steps: int
) -> float:
    """Train some clients at once; return the mean seconds of a request of a step."""
    state = state_of(task.model_fn())
    width = tree_leaves(task.example_inputs)[0].shape[1]
    digest = state_digest(state)
    pool.prepare(digest)
    addresses, failures = pool.hold(pool.names, digest, state)
    assert not failures, failures
    batches = [
        (
            torch.randn(BATCH_SIZE, width),
            torch.zeros(BATCH_SIZE),
        )
    ] * num_steps
    chain = build_chain(task)
    profile = profile_once(chain, task, batch_size=BATCH_SIZE)
    ready = threading.Barrier(num_clients)

    def train(client: int) -> float:
        plan = ClientPlan(
            client_key=str(client),
            round_number=1,
            route=Route.split(CUT),
            seed=0,
            state_digest=digest,
            edge_addresses=addresses,
        )
        device = DeviceProfile(
            client_key=str(client),
            budget_bytes=None,
            num_examples=BATCH_SIZE * num_steps,
            batch_size=BATCH_SIZE,
        )
        plan = pool.signed(plan, device, profile, is_train=True)
        timed = TimedTransport(edge.connect(addresses[edge.name]))
        conditions = Conditions(task=task, connect=lambda *_: timed, cap_mode="off")
        names = chain.state_names(0, CUT)
        own = {name: state[name] for name in names}
        ready.wait()
        outcome = train_locally(plan, own, batches, conditions)
        assert outcome.receipts, outcome.report.message
        return timed.seconds["Forward"]

    with ThreadPoolExecutor(num_clients) as threads:
        seconds = list(threads.map(train, range(num_clients)))
    pool.release(1, digest)
    return statistics.mean(seconds) / num_steps


@contextmanager
def all_ways(size: str) -> Iterator[dict[str, Edge]]:
    """Start an edge of each kind; yield them by name."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make: Any = runpy.run_path(str(CERTIFICATES))
        make["make_certificates"](folder, ["edge"], ["localhost"])
        make["make_secret"](folder / "secret")
        plain = stack.enter_context(edge_process(size, folder / "plain", "--insecure"))
        files = ["--tls-certificate", f"{folder}/edge.pem"]
        files += ["--tls-key", f"{folder}/edge.key"]
        files += ["--admin-secret-file", f"{folder}/secret"]
        secure = stack.enter_context(edge_process(size, folder / "secure", *files))
        yield {
            "in process": LocalEdge(),
            "Ray actor": RayEdge(),
            "gRPC": GrpcEdge(f"localhost:{plain}", insecure=True),
            "gRPC, TLS": GrpcEdge(
                f"localhost:{secure}",
                root_certificates=folder / "ca.pem",
                admin_secret_file=folder / "secret",
            ),
        }


def measured(
    size: str, num_clients: int, *, num_steps: int, repeats: int
) -> Iterator[tuple[str, float, float, float]]:
    """Time each way in turn; yield its name, and the medians of a step in ms."""
    task = TASKS[size]()
    with all_ways(size) as ways:
        pools = {name: EdgePool((edge,), task) for name, edge in ways.items()}
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for repeat in range(repeats + 1):
            for name, edge in ways.items():
                before = cpu_seconds()
                counts = {"num_clients": num_clients, "num_steps": num_steps}
                seconds = round_of(edge, pools[name], task, **counts)
                cpu = cpu_seconds() - before
                if repeat:  # The first time warms caches up.
                    seen[name].append((seconds, cpu / num_steps / num_clients))
        for name, found in seen.items():
            steps, cpus = zip(*found, strict=True)
            median = statistics.median
            yield name, 1e3 * median(steps), 1e3 * min(steps), 1e3 * median(cpus)
        for pool in pools.values():
            pool.stop()


def main(
    *,
    num_steps: int = 20,
    repeats: int = 5,
    sizes: Annotated[str, typer.Option(help="Of boundaries.")] = ",".join(WIDTHS),
    clients: Annotated[str, typer.Option(help="How many at once.")] = "1,4",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time what a device waits for in each step, and what a step takes of the CPU."""
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    for size in sizes.split(","):
        for num_clients in map(int, clients.split(",")):
            table = Table("edge", "ms/step", "least", "CPU ms", box=None)
            for row in measured(
                size, num_clients, num_steps=num_steps, repeats=repeats
            ):
                if as_json:
                    sys.stdout.write(json.dumps([size, num_clients, *row]) + "\n")
                name, *numbers = row
                table.add_row(name, *(f"{number:.2f}" for number in numbers))
            if not as_json:
                Console().print(f"\n{size}, {num_clients} clients at once", table)
    ray.shutdown()


if __name__ == "__main__":
    typer.run(main)
