"""The same work for all: a network, batches of noise, and clients that train on them.

One app holds our client and a plain one, as Flower's own examples have it; each message
says which of them it is for.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy.typing as npt
import torch
from flwr.app import (
    ArrayRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from flwr_smartsplit import Route, SmartSplitNumPyClient, Task, build_client_app
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.split.build import state_of
from simulations.benchmarks.peers.bare_split import Halves
from simulations.benchmarks.peers.work import (
    LEARNING_RATE,
    NUM_CLASSES,
    Batches,
    noise,
    resnet18_halves,
)
from simulations.benchmarks.rounds.trivial_clients import is_for_plain
from simulations.experiments.clients import build_task
from simulations.studies.quickstart import quickstart


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What each client does in a round."""

    model: str  # As an experiment names it
    input_shape: tuple[int, ...]
    batch_size: int
    num_batches: int
    is_adam: bool = False
    cut_share: float = 0.25  # Of the units: those that a split client keeps

    @property
    def num_examples(self) -> int:
        """Examples of a client."""
        return self.batch_size * self.num_batches

    def state(self) -> Mapping[str, npt.NDArray[Any]]:
        """Draw the state that every run starts from."""
        model_fn = task_of(self).model_fn  # Made first: that may draw, too.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return state_of(model_fn())


JOBS = {
    "resnet18": Job(
        model="torchvision:resnet18",
        input_shape=(3, 32, 32),
        batch_size=32,
        num_batches=16,
        is_adam=True,
    ),
    "digits": Job(
        model="small",
        input_shape=(1, 8, 8),
        batch_size=16,
        num_batches=18,
    ),
}
"""ResNet-18 at 32 x 32 with 500 images a client, and the quickstart's small network."""


@lru_cache(maxsize=4)
def task_of(job: Job) -> Task:
    """Build a job's task, once in each process."""
    small = quickstart("digits")
    task = build_task(replace(small, model="small", batch_size=job.batch_size))
    if job.model != "small":
        task = replace(
            task,
            model_fn=partial(_torchvision, job.model.partition(":")[2]),
            example_inputs=torch.zeros(1, *job.input_shape),
        )
    if job.is_adam:
        task = replace(task, optimizer_fn=partial(torch.optim.Adam, lr=LEARNING_RATE))
    return task


def _torchvision(name: str) -> torch.nn.Module:
    from simulations.experiments.models import torchvision_model  # noqa: PLC0415

    return torchvision_model(name, num_classes=NUM_CLASSES)


def halves_of(job: Job) -> Halves:
    """Cut a job's network where ``split_at`` cuts it, into plain modules."""
    task = task_of(job)
    if job.model == "small":
        layers: Any = task.model_fn()
        cut = cut_of(job, len(layers))
        halves = layers[:cut], layers[cut:]
    else:
        halves = resnet18_halves()
    front, tail = halves
    return Halves(
        front=front, tail=tail, optimizer_fn=task.optimizer_fn, loss_fn=task.loss_fn
    )


@lru_cache(maxsize=2)
def batches_of(job: Job) -> Batches:
    """Draw the batches that every client has."""
    shape, count = job.input_shape, job.num_batches
    return noise(shape, batch_size=job.batch_size, count=count)


def split_at(job: Job, request: RouteRequest) -> Route:
    """Split every client at the same unit."""
    if request.edge is None:
        return Route.whole()
    cut = cut_of(job, len(request.profile.units))
    return Route.split(cut, edge=request.edge)


def cut_of(job: Job, num_units: int) -> int:
    """Say how many units a split client keeps."""
    return max(1, round(job.cut_share * num_units))


def build_app(job: Job, edges: Sequence[Edge]) -> ClientApp:
    """Make the app of both kinds of clients."""
    client_fn = partial(build_client, job=job, edges=edges)
    return EitherClient(build_client_app(client_fn), job)


def build_client(
    context: Context, *, job: Job, edges: Sequence[Edge]
) -> SmartSplitNumPyClient:
    """Build our client of one partition; it has no budget."""
    return SmartSplitNumPyClient(
        task_of(job),
        batches_of(job),
        client_key=str(context.node_config["partition-id"]),
        edges=edges,
        num_examples=job.num_examples,
        batch_size=job.batch_size,
    )


class EitherClient(ClientApp):
    """Hand each message to our client or to the plain one."""

    def __init__(self, ours: ClientApp, job: Job) -> None:
        super().__init__()
        self._ours = ours
        self._job = job

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        if is_for_plain(message):
            return plain_reply(message, self._job)
        return self._ours(message, context)


def plain_reply(message: Message, job: Job) -> Message:
    """Train as a Message-API client of Flower's examples does."""
    torch.set_num_threads(1)
    model = task_of(job).model_fn()
    (arrays,) = message.content.array_records.values()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss = train_plainly(model, job)
    metrics = MetricRecord({"loss": loss, "num-examples": job.num_examples})
    state = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": state, "metrics": metrics}), reply_to=message)


def train_plainly(model: torch.nn.Module, job: Job, *, pauses: bool = False) -> float:
    """Train a model on the batches; return the mean loss.

    With ``pauses`` it sleeps after each step as long as that took, as a device does
    that waits for its edge.
    """
    task = task_of(job)
    optimizer = task.optimizer_fn(model.parameters())
    model.train()
    total = 0.0
    for inputs, targets in batches_of(job):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = task.loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        total += loss.item()
        if pauses:
            time.sleep(time.perf_counter() - started)
    return total / job.num_batches
