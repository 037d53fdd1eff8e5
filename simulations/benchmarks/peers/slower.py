"""slower, from a copy: ``python -m simulations.benchmarks.peers.slower``.

``sands-lab/slower`` needs Flower 1.9, and has no licence: it is not shipped, and runs
in an environment of its own, whose Python starts this module. A server has a model for
each client; clients are processes, all at once. It prints JSON.
"""

import argparse
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from flwr.server import ServerConfig
from slwr.client.app import start_client
from slwr.client.numpy_client import NumPyClient
from slwr.server.app import start_server
from slwr.server.server_model.numpy_server_model import NumPyServerModel
from slwr.server.server_model.utils import pytorch_format
from slwr.server.strategy import PlainSlStrategy
from torch import Tensor, nn

from simulations.benchmarks.peers.work import (
    LEARNING_RATE,
    Batches,
    Marks,
    noise,
    resnet18_halves,
)


def _state(model: nn.Module) -> list[Any]:
    return [tensor.numpy() for tensor in model.state_dict().values()]


def _load(model: nn.Module, state: list[Any]) -> None:
    names = model.state_dict().keys()
    pairs = zip(names, map(torch.as_tensor, state), strict=True)
    model.load_state_dict(dict(pairs))


class Client(NumPyClient):  # type: ignore[misc]
    """Train the front, as the example in slower's own repository does."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self._batches = batches
        self._model, _ = resnet18_halves()

    def get_parameters(self, config: Any) -> list[Any]:
        """Return the front's state."""
        return _state(self._model)

    def fit(self, parameters: list[Any], config: Any) -> Any:
        """Train a round."""
        self.server_model_proxy.torch()
        _load(self._model, parameters)
        self._model.train()
        optimizer = torch.optim.Adam(self._model.parameters(), lr=LEARNING_RATE)
        count = 0
        for images, labels in self._batches:
            outputs = self._model(images)
            gradient = self.server_model_proxy.serve_grad_request(
                embeddings=outputs, labels=labels, _streams_=False
            )
            optimizer.zero_grad()
            outputs.backward(gradient)
            optimizer.step()
            count += len(labels)
        return _state(self._model), count, {}


class ServerModel(NumPyServerModel):  # type: ignore[misc]
    """Train the rest."""

    def __init__(self) -> None:
        super().__init__()
        _, self._model = resnet18_halves()

    @pytorch_format  # type: ignore[untyped-decorator]
    def serve_grad_request(self, embeddings: Tensor, labels: Tensor) -> Any:
        """Take one step; return the gradient of what came."""
        embeddings.requires_grad_(True)
        loss = nn.functional.cross_entropy(self._model(embeddings), labels)
        self._model.zero_grad()
        loss.backward()
        self._optimizer.step()
        return embeddings.grad

    def get_parameters(self) -> Any:
        """Return the state."""
        return _state(self._model)

    def get_fit_result(self) -> Any:
        """Return the state after a round."""
        return _state(self._model), {}

    def configure_fit(self, parameters: Any, config: Any) -> None:
        """Begin a round."""
        _load(self._model, parameters)
        self._model.train()
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=LEARNING_RATE)

    def configure_evaluate(self, parameters: Any, config: Any) -> None:
        """Evaluate nothing."""


class Strategy(PlainSlStrategy):  # type: ignore[misc]
    """Note when rounds end; evaluate nothing."""

    def __init__(self, ended: Callable[[int], None], num_clients: int) -> None:
        super().__init__(
            init_server_model_fn=lambda: ServerModel().to_server_model(),
            min_available_clients=num_clients,
            min_fit_clients=num_clients,
            common_server_model=False,
        )
        self._ended = ended
        self._num_clients = num_clients

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Average the fronts; without a client, a step's figures would be wrong."""
        if failures or len(results) != self._num_clients:
            raise RuntimeError(f"{len(results)} clients trained; failures: {failures}")
        return super().aggregate_fit(server_round, results, failures)

    def evaluate(self, server_round: int, *_: Any, **__: Any) -> None:
        """Note a round's end: that is when this is called."""
        self._ended(server_round)

    def configure_evaluate(self, *_: Any, **__: Any) -> list[Any]:
        """Ask nobody."""
        return []


def main() -> None:
    """Serve rounds, or be one client."""
    parser = argparse.ArgumentParser()
    for name in ("clients", "rounds", "batch-size", "batches", "side"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--address", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.address:
        shape = (3, options.side, options.side)
        batches = noise(shape, batch_size=options.batch_size, count=options.batches)
        make = partial(Client, batches)
        start_client(
            server_address=options.address, client_fn=lambda _: make().to_client()
        )
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    marks = Marks(options.rounds)
    command = [sys.executable, "-m", __spec__.name, *sys.argv[1:]]
    clients = [
        subprocess.Popen([*command, "--address", address])
        for _ in range(options.clients)
    ]
    try:
        start_server(
            server_address=address,
            strategy=Strategy(marks.ended, options.clients),
            config=ServerConfig(num_rounds=options.rounds + 1),
        )
    finally:
        for client in clients:
            client.kill()  # They would wait for another server.
            client.wait()
    # The server only logs what fails in a round; then there is no last mark.
    spent = marks.spent(options.rounds * options.clients * options.batches)
    sys.stdout.write(json.dumps(asdict(spent)) + "\n")


if __name__ == "__main__":
    main()
