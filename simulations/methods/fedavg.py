"""FedAvg: everybody trains the whole model, whatever its memory.

Flower's own strategy on devices without a limit: the ceiling that methods for weak
devices are measured against, and no answer to them.

References
----------
McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of
Deep Networks from Decentralized Data. AISTATS 2017. arXiv:1602.05629.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from flwr_smartsplit.flower.journal import Journal
from flwr_smartsplit.flower.records import OURS, record_bytes
from simulations.experiment import Experiment
from simulations.method import Method, Setting
from simulations.rows import ACCEPTED, TRAIN


class JournalledFedAvg(FedAvg):
    """Flower's FedAvg, with the journal that SmartSplit writes.

    Parameters
    ----------
    experiment : Experiment
        Says how many clients take part.
    journal : Path
        Where the JSON lines go.
    """

    def __init__(self, experiment: Experiment, *, journal: Path) -> None:
        super().__init__(
            fraction_train=experiment.fraction_train,
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_available_nodes=experiment.num_clients,
        )
        self._journal = Journal(journal)
        self._bytes_down: dict[int, int] = {}
        self._keys_by_node: dict[int, str] = {}
        self._started_seconds = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask as FedAvg does, and note who was sent how much."""
        self._started_seconds = time.perf_counter()
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._bytes_down = {
            message.metadata.dst_node_id: payload_bytes(message) for message in messages
        }
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge as FedAvg does, in client_key order, and write the round down."""
        ordered = sorted(replies, key=self._client_key)
        arrived_seconds = time.perf_counter()
        merged = super().aggregate_train(server_round, ordered)
        ended_seconds = time.perf_counter()
        rows = [self._client_row(server_round, reply) for reply in ordered]
        for row in rows:
            self._journal.write(row)
        self._journal.write(
            {
                "kind": "round",
                "round": server_round,
                "selected": len(self._bytes_down),
                "accepted": sum(row["status"] == ACCEPTED for row in rows),
                "round_wall_clock_sec": ended_seconds - self._started_seconds,
                "server_aggregation_time_sec": ended_seconds - arrived_seconds,
                "comm_bytes_total": sum(self._bytes_down.values())
                + sum(map(payload_bytes, ordered)),
            }
        )
        return merged

    def _client_row(self, server_round: int, reply: Message) -> dict[str, object]:
        """Describe one client's part of a round."""
        row: dict[str, object] = {
            "kind": "client",
            "phase": TRAIN,
            "round": server_round,
            "client_key": self._client_key(reply),
            "route": "whole",
            "budget_bytes": None,
            "bytes_down": self._bytes_down.get(reply.metadata.src_node_id, 0),
            "bytes_up": payload_bytes(reply),
        }
        if reply.has_error():
            return {**row, "status": "lost", "cause": reply.error.reason}
        (metrics,) = reply.content.metric_records.values()
        return {
            **row,
            "status": ACCEPTED,
            "cause": "",
            "peak_bytes": metrics["device-peak-bytes"],
            "num_examples": metrics["num-examples"],
            "num_steps": metrics["num-steps"],
            "loss": metrics["loss"],
            "edge_bytes_up": metrics["sent-bytes"],
            "edge_bytes_down": metrics["received-bytes"],
            "seconds": metrics["seconds"],
        }

    def _client_key(self, reply: Message) -> str:
        """Name the client; a lost one by an earlier reply, or else by its node."""
        node = reply.metadata.src_node_id
        if not reply.has_error():
            key = cast(str, reply.content[OURS]["client-key"])
            self._keys_by_node[node] = key
        return self._keys_by_node.get(node, f"node {node}")


def payload_bytes(message: Message) -> int:
    """Count what a message carries; one that only reports an error carries nothing."""
    return 0 if message.has_error() else record_bytes(message.content)


def build_strategy(setting: Setting) -> Strategy:
    """Build Flower's FedAvg over everybody."""
    return JournalledFedAvg(setting.experiment, journal=setting.journal)


FEDAVG = Method(
    name="fedavg",
    summary="everybody trains the whole model, budgets ignored",
    strategy_fn=build_strategy,
)
