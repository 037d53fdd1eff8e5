"""SampledRounds: a strategy without routes, on the clients that every method gets.

Flower's strategies draw node ids, which are random in every run, from Python's global
generator. Here clients are drawn by their keys and the experiment's seed, as
``SmartSplit`` draws them, and the journal is the one that ``SmartSplit`` writes.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, cast, final

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flwr_smartsplit.flower.journal.journal import Journal
from flwr_smartsplit.flower.journal.rows import Row, failure_row, skipped_row
from flwr_smartsplit.flower.registry import Fleet, Member
from flwr_smartsplit.flower.serde.records import (
    last_line,
    message_layout,
    record_bytes,
)
from flwr_smartsplit.plan.selection.selection import NOT_SAMPLED, sample_clients
from flwr_smartsplit.train.rng import derived_seed
from flwr_smartsplit.types import Failure
from simulations.experiments.experiment import Experiment
from simulations.experiments.local_grid import awaited_nodes
from simulations.experiments.rows import ACCEPTED, LOST, TRAIN
from simulations.methods.method import Setting

TIMEOUT_SECONDS = 600.0
MIN_CLIENTS = 2
"""Fewest clients that Flower's strategies ask in a round, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The clients of one round by client_key, in its order, and who is out of reach."""

    chosen: dict[str, Member]
    left_out: dict[str, Member]
    failures: list[Failure]


@final
class Sampler:
    """Draw each round's clients, as many as FedAvg would ask."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._fleet = Fleet(message_layout(), timeout_seconds=TIMEOUT_SECONDS)
        self._key_of_node: dict[int, str] = {}

    def draw(self, server_round: int, grid: Grid) -> Sample:
        """Wait until all clients are there, and draw among them."""
        experiment = self._experiment
        nodes = awaited_nodes(grid, experiment.num_clients)
        members, failures = self._fleet.members(grid, nodes)
        self._key_of_node |= {m.node_id: key for key, m in members.items()}
        drawn = sample_clients(
            list(members),
            num_clients=max(int(len(members) * experiment.fraction_train), MIN_CLIENTS),
            rng=Random(derived_seed(experiment.seed, server_round, 1)),
        )
        return Sample(
            chosen={key: m for key, m in members.items() if key in drawn},
            left_out={key: m for key, m in members.items() if key not in drawn},
            failures=failures,
        )

    def client_key(self, node_id: int) -> str:
        """Name the client behind a node."""
        return self._key_of_node.get(node_id, f"node {node_id}")


Answer = tuple[str, Message]
"""A client_key, and what the client replied."""


@dataclass(frozen=True, slots=True)
class Merged:
    """The next global model, and what each answer adds to its row in the journal."""

    arrays: ArrayRecord | None
    metrics: MetricRecord | None
    rows: Sequence[Row]


class Rounds(Protocol):
    """What differs from method to method."""

    def ask(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        sample: Sample,
    ) -> tuple[list[Message], list[Row]]:
        """Write to the sampled clients; return rows of those that are not asked."""

    def merge(self, server_round: int, answers: Sequence[Answer]) -> Merged:
        """Merge the answers, which come in client_key order."""


@final
class SampledRounds(Strategy):
    """Let rounds train the sampled clients, and write the journal."""

    def __init__(self, rounds: Rounds, setting: Setting) -> None:
        self._rounds = rounds
        self._journal = Journal(setting.journal)
        self._sampler = Sampler(setting.experiment)
        self._bytes_down: dict[int, int] = {}
        self._started_seconds = 0.0

    def summary(self) -> None:
        """Say nothing: the journal says it."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled clients, and note who got how much."""
        self._started_seconds = time.perf_counter()
        sample = self._sampler.draw(server_round, grid)
        for member in sample.left_out.values():
            self._journal.write(skipped_row(member.profile, NOT_SAMPLED, server_round))
        for failure in sample.failures:
            self._journal.write(failure_row(failure, server_round, TRAIN))
        messages, rows = self._rounds.ask(server_round, arrays, config, sample)
        for row in rows:
            self._journal.write(row)
        self._bytes_down = {m.metadata.dst_node_id: payload_bytes(m) for m in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge, and write the round down."""
        named = [(self._sampler.client_key(m.metadata.src_node_id), m) for m in replies]
        answers = sorted(named, key=lambda answer: answer[0])
        arrived_seconds = time.perf_counter()
        merged = self._rounds.merge(server_round, answers)
        ended_seconds = time.perf_counter()
        rows = [
            self._row(server_round, answer) | added
            for answer, added in zip(answers, merged.rows, strict=True)
        ]
        sent, returned = self._bytes_down.values(), (row["bytes_up"] for row in rows)
        rows.append(
            {
                "kind": "round",
                "round": server_round,
                "selected": len(self._bytes_down),
                "accepted": sum(row["status"] == ACCEPTED for row in rows),
                "round_wall_clock_sec": ended_seconds - self._started_seconds,
                "server_aggregation_time_sec": ended_seconds - arrived_seconds,
                "comm_bytes_total": sum(sent) + sum(cast(Iterable[int], returned)),
            }
        )
        for row in rows:
            self._journal.write(row)
        return merged.arrays, merged.metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the global model is evaluated where it is."""
        del server_round, arrays, config, grid
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, since nobody was asked."""
        del server_round, replies
        return None

    def _row(self, server_round: int, answer: Answer) -> Row:
        """Begin the row of one client's part of a round."""
        key, message = answer
        row: Row = {
            "kind": "client",
            "phase": TRAIN,
            "round": server_round,
            "client_key": key,
            "status": ACCEPTED,
            "cause": "",
            "bytes_down": self._bytes_down.get(message.metadata.src_node_id, 0),
            "bytes_up": payload_bytes(message),
        }
        if message.has_error():
            row |= {"status": LOST, "cause": last_line(message.error.reason)}
        return row


def payload_bytes(message: Message) -> int:
    """Count what a message carries; one that only reports an error carries nothing."""
    return 0 if message.has_error() else record_bytes(message.content)
