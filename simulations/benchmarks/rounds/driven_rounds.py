"""Rounds of any strategy, driven one by one, so that several can take turns.

Flower's own loops run one strategy to its end. A machine that slows down would slow
one strategy down and not the other.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common import FitIns, Parameters, ndarrays_to_parameters
from flwr.server import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.server import FitResultsAndFailures, fit_clients
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import LegacySmartSplit, SmartSplit
from flwr_smartsplit.flower.serde.records import last_line, to_array_record
from flwr_smartsplit.types import Failure
from simulations.experiments.errors import ExperimentError

TIMEOUT_SECONDS = 600.0
State = Mapping[str, npt.NDArray[Any]]
ModelT = TypeVar("ModelT", ArrayRecord, Parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTime:
    """Where the time of one training round went."""

    configure_seconds: float
    clients_seconds: float  # From the first message out to the last one in
    aggregate_seconds: float
    cpu_seconds: float  # CPU time of the server's process, all threads

    @property
    def server_seconds(self) -> float:
        """What the strategy takes."""
        return self.configure_seconds + self.aggregate_seconds

    @property
    def seconds(self) -> float:
        """What the whole round takes."""
        return self.server_seconds + self.clients_seconds


class Rounds(Protocol):
    """A strategy and its global model, in one of Flower's APIs."""

    strategy: Any

    def configure(self, number: int) -> Any:
        """Make a round's messages."""

    def exchange(self, number: int, sent: Any) -> Any:
        """Let the clients answer them."""

    def aggregate(self, number: int, answers: Any) -> None:
        """Make the next global model."""


def timed_round(rounds: Rounds, number: int) -> RoundTime:
    """Run one round, counted from 1, and time its phases."""
    cpu, started = time.process_time(), time.perf_counter()
    sent = rounds.configure(number)
    configured = time.perf_counter()
    answers = rounds.exchange(number, sent)
    answered = time.perf_counter()
    rounds.aggregate(number, answers)
    return RoundTime(
        configure_seconds=configured - started,
        clients_seconds=answered - configured,
        aggregate_seconds=time.perf_counter() - answered,
        cpu_seconds=time.process_time() - cpu,
    )


class MessageRounds:
    """Rounds of a Message-API strategy; ``config`` goes into each message."""

    def __init__(
        self, strategy: Strategy, grid: Grid, state: State, config: Mapping[str, Any]
    ) -> None:
        self.strategy = strategy
        self._grid = grid
        self._arrays = to_array_record(state)
        self._config = ConfigRecord(dict(config))

    def configure(self, number: int) -> list[Message]:
        """Make a round's messages."""
        arrays, grid = self._arrays, self._grid
        return list(self.strategy.configure_train(number, arrays, self._config, grid))

    def exchange(self, number: int, sent: list[Message]) -> list[Message]:
        """Let the clients answer them."""
        del number
        return list(self._grid.send_and_receive(sent, timeout=TIMEOUT_SECONDS))

    def aggregate(self, number: int, answers: list[Message]) -> None:
        """Make the next global model."""
        failed = [last_line(a.error.reason) for a in answers if a.has_error()]
        arrays, _ = self.strategy.aggregate_train(number, answers)
        self._arrays = _checked(arrays, failed, self.strategy)


class LegacyRounds:
    """Rounds of a strategy of Flower's legacy API, with its usual pool of threads."""

    def __init__(
        self, strategy: LegacyStrategy, clients: ClientManager, state: State
    ) -> None:
        self.strategy = strategy
        self._clients = clients
        self._parameters = ndarrays_to_parameters(list(state.values()))

    def configure(self, number: int) -> list[tuple[ClientProxy, FitIns]]:
        """Make a round's instructions."""
        return self.strategy.configure_fit(number, self._parameters, self._clients)

    def exchange(
        self, number: int, sent: list[tuple[ClientProxy, FitIns]]
    ) -> FitResultsAndFailures:
        """Let the clients follow them."""
        return fit_clients(sent, None, TIMEOUT_SECONDS, number)

    def aggregate(self, number: int, answers: FitResultsAndFailures) -> None:
        """Make the next global model."""
        results, failures = answers
        parameters, _ = self.strategy.aggregate_fit(number, results, failures)
        failed = [last_line(failure) for failure in failures]
        self._parameters = _checked(parameters, failed, self.strategy)


def _checked(
    model: ModelT | None, failed: list[str], strategy: Strategy | LegacyStrategy
) -> ModelT:
    """Return the next model if all clients took part: else the time means nothing."""
    refused: list[Failure] = getattr(strategy, "failures", [])
    failed = [*failed, *(failure.cause for failure in refused)]
    if failed or model is None:
        raise ExperimentError(
            f"{len(failed)} clients failed in a timed round; the first: "
            f"{[*failed, 'nobody says why'][0]}"
        )
    return model


def close(strategy: Strategy | LegacyStrategy) -> None:
    """End the edges of a strategy, if it has any."""
    if isinstance(strategy, SmartSplit | LegacySmartSplit):
        strategy.close()
