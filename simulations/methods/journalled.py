"""Journalled: any of Flower's own strategies, with the journal SmartSplit writes.

It wraps a strategy instead of inheriting from one, so that whatever derives from
Flower's FedAvg can be compared without a line of its own.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from flwr_smartsplit.flower.journal.journal import Journal
from flwr_smartsplit.flower.journal.rows import Row
from flwr_smartsplit.flower.serde.records import (
    from_array_record,
    last_line,
    record_bytes,
    to_array_record,
)
from simulations.experiments.rows import ACCEPTED, TRAIN
from simulations.experiments.sampling import Sampler
from simulations.methods.method import Setting

ASKED_BY_SAMPLER: dict[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
}
"""Arguments of a strategy that asks every node it sees: it sees the sample only."""


@final
class Journalled(Strategy):
    """Let a strategy of Flower's train the sampled clients, and write rows.

    Every client trains the whole model, whatever its memory. What the strategy returns
    is sent on in the types it came in: some return float64, which is twice the bytes.

    Parameters
    ----------
    inner : FedAvg
        The strategy, made with ``ASKED_BY_SAMPLER``.
    setting : Setting
        Says how many clients take part, and where the journal goes.
    """

    def __init__(self, inner: FedAvg, setting: Setting) -> None:
        self._inner = inner
        self._journal = Journal(setting.journal)
        self._sampler = Sampler(setting.experiment)
        self._bytes_down: dict[int, int] = {}
        self._dtypes: dict[str, str] = {}
        self._started_seconds = 0.0

    def summary(self) -> None:
        """Log what the strategy says of itself."""
        self._inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled clients as the strategy does, and note who got how much."""
        self._started_seconds = time.perf_counter()
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        sample = self._sampler.draw(server_round, grid)
        for row in sample.rows(server_round):
            self._journal.write(row)
        nodes = [member.node_id for member in sample.chosen.values()]
        seen = cast(Grid, _Nodes(nodes))
        messages = list(self._inner.configure_train(server_round, arrays, config, seen))
        self._bytes_down = {m.metadata.dst_node_id: payload_bytes(m) for m in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge as the strategy does, in client_key order, and write the round down."""
        ordered = sorted(replies, key=self._client_key)
        arrived_seconds = time.perf_counter()
        arrays, metrics = self._inner.aggregate_train(server_round, ordered)
        if arrays is not None:
            arrays = self._as_sent(arrays)
        ended_seconds = time.perf_counter()
        rows = [self._row(server_round, reply) for reply in ordered]
        for row in rows:
            self._journal.write(row)
        self._journal.write(
            round_row(
                server_round,
                list(self._bytes_down.values()),
                rows,
                seconds=ended_seconds - self._started_seconds,
                aggregation_seconds=ended_seconds - arrived_seconds,
            )
        )
        return arrays, metrics

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

    def _as_sent(self, arrays: ArrayRecord) -> ArrayRecord:
        return to_array_record(
            {
                name: array.astype(self._dtypes[name], copy=False)
                for name, array in from_array_record(arrays).items()
            }
        )

    def _client_key(self, reply: Message) -> str:
        return self._sampler.client_key(reply.metadata.src_node_id)

    def _row(self, server_round: int, reply: Message) -> Row:
        """Describe one client's part of a round."""
        row = client_row(server_round, self._client_key(reply), ACCEPTED) | {
            "route": "whole",
            "budget_bytes": None,
            "bytes_down": self._bytes_down.get(reply.metadata.src_node_id, 0),
            "bytes_up": payload_bytes(reply),
        }
        if reply.has_error():
            return row | {"status": "lost", "cause": last_line(reply.error.reason)}
        (metrics,) = reply.content.metric_records.values()
        return row | {
            "peak_bytes": metrics["device-peak-bytes"],
            "num_examples": metrics["num-examples"],
            "loss": metrics["loss"],
            "edge_bytes_up": metrics["sent-bytes"],
            "edge_bytes_down": metrics["received-bytes"],
            "seconds": metrics["seconds"],
            "num_steps": metrics["num-steps"],
        }


@dataclass(frozen=True, slots=True)
class _Nodes:
    """All that a strategy asks of a grid before it sends."""

    node_ids: list[int]

    def get_node_ids(self) -> list[int]:
        """List the nodes."""
        return self.node_ids


def client_row(server_round: int, client_key: str, status: str) -> Row:
    """Begin the row of one client in one round."""
    return {
        "kind": "client",
        "phase": TRAIN,
        "round": server_round,
        "client_key": client_key,
        "status": status,
        "cause": "",
    }


def round_row(
    server_round: int,
    bytes_down: Sequence[int],
    rows: Sequence[Row],
    *,
    seconds: float,
    aggregation_seconds: float,
) -> Row:
    """Sum up a round without edges.

    Parameters
    ----------
    server_round : int
        The round, counted from 1.
    bytes_down : Sequence[int]
        What each client that was asked was sent.
    rows : Sequence[Mapping]
        The rows of those who answered.
    seconds, aggregation_seconds : float
        Wall-clock time of the round, and of merging.
    """
    return {
        "kind": "round",
        "round": server_round,
        "selected": len(bytes_down),
        "accepted": sum(row["status"] == ACCEPTED for row in rows),
        "round_wall_clock_sec": seconds,
        "server_aggregation_time_sec": aggregation_seconds,
        "comm_bytes_total": sum(bytes_down)
        + sum(cast(int, row["bytes_up"]) for row in rows),
    }


def payload_bytes(message: Message) -> int:
    """Count what a message carries; one that only reports an error carries nothing."""
    return 0 if message.has_error() else record_bytes(message.content)
