"""Clients with next to nothing to do: what a round still takes is overhead.

One app holds two kinds of them, and each message says which one it is for: our client,
and a plain PyTorch client as Flower's own examples have it. It answers in both of
Flower's APIs.
"""

from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_smartsplit import RayEdge, SmartSplitNumPyClient, Task, build_client_app
from flwr_smartsplit.split.build import state_of

NUM_INPUTS, NUM_CLASSES, BATCH_SIZE = 8, 4, 4
LEARNING_RATE = 0.01
EDGES = (RayEdge(),)
PLAIN = "plain-client"
"""A config with this key is for the plain client."""


def tiny_model(num_hidden: int) -> nn.Sequential:
    """Build a network of two layers: ``13 * num_hidden + 4`` numbers.

    Examples
    --------
    >>> sum(parameter.numel() for parameter in tiny_model(8).parameters())
    108
    """
    return nn.Sequential(
        nn.Linear(NUM_INPUTS, num_hidden), nn.ReLU(), nn.Linear(num_hidden, NUM_CLASSES)
    )


def one_batch() -> list[tuple[Tensor, Tensor]]:
    """Make the only batch that a client has."""
    targets = torch.arange(BATCH_SIZE) % NUM_CLASSES
    return [(torch.ones(BATCH_SIZE, NUM_INPUTS), targets)]


@lru_cache(maxsize=4)
def build_task(num_hidden: int) -> Task:
    """Build the task, once in each process."""
    return Task(
        model_fn=partial(tiny_model, num_hidden),
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=LEARNING_RATE),
        example_inputs=torch.zeros(1, NUM_INPUTS),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def initial_state(num_hidden: int) -> dict[str, npt.NDArray[Any]]:
    """Draw the state that every run starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return state_of(tiny_model(num_hidden))


def build_app(num_hidden: int) -> ClientApp:
    """Make the app of both kinds of clients."""
    ours = build_client_app(partial(build_client, num_hidden=num_hidden))
    return EitherClient(ours, num_hidden)


def build_client(context: Context, *, num_hidden: int) -> SmartSplitNumPyClient:
    """Build our client of one partition; it has no budget."""
    return SmartSplitNumPyClient(
        build_task(num_hidden),
        one_batch(),
        client_key=str(context.node_config["partition-id"]),
        edges=EDGES,
        num_examples=BATCH_SIZE,
        batch_size=BATCH_SIZE,
    )


def is_for_plain(message: Message) -> bool:
    """Say whether a message's config sends it to the plain client."""
    records = message.content.values()
    return any(PLAIN in each for each in records if isinstance(each, ConfigRecord))


class EitherClient(ClientApp):
    """Hand each message to our client or to the plain one."""

    def __init__(self, ours: ClientApp, num_hidden: int) -> None:
        super().__init__()
        self._ours = ours
        self._num_hidden = num_hidden

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        if not is_for_plain(message):
            return self._ours(message, context)
        if "fitins.parameters" in message.content:
            client = PlainNumPyClient(self._num_hidden).to_client()
            return ClientApp(lambda _: client)(message, context)
        return plain_reply(message, self._num_hidden)


class PlainNumPyClient(NumPyClient):
    """Train as any ``NumPyClient`` of Flower's examples does."""

    def __init__(self, num_hidden: int) -> None:
        self._model = tiny_model(num_hidden)

    def fit(
        self, parameters: list[npt.NDArray[Any]], config: dict[str, Any]
    ) -> tuple[list[npt.NDArray[Any]], int, dict[str, Any]]:
        """Train on the batch."""
        del config
        names = self._model.state_dict()
        values = map(torch.from_numpy, map(np.copy, parameters))
        self._model.load_state_dict(dict(zip(names, values, strict=True)))
        loss = train_plainly(self._model)
        arrays = [tensor.numpy() for tensor in self._model.state_dict().values()]
        return arrays, BATCH_SIZE, {"loss": loss}


def plain_reply(message: Message, num_hidden: int) -> Message:
    """Train as a Message-API client of Flower's examples does."""
    model = tiny_model(num_hidden)
    (arrays,) = message.content.array_records.values()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss = train_plainly(model)
    metrics = MetricRecord({"loss": loss, "num-examples": BATCH_SIZE})
    state = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": state, "metrics": metrics}), reply_to=message)


def train_plainly(model: nn.Module) -> float:
    """Train a model on the batch; return the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    ((inputs, targets),) = one_batch()
    loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.item()
