"""MessageStrategy: what the strategies of Flower's Message API share."""

import time
from collections.abc import Iterable
from logging import INFO, getLogger
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from flwr_smartsplit.flower import messages
from flwr_smartsplit.flower.base_strategy import SplitStrategy
from flwr_smartsplit.flower.inner_strategy import MESSAGE_API
from flwr_smartsplit.flower.registry import Fleet
from flwr_smartsplit.flower.rounds.exchange import Dispatch
from flwr_smartsplit.flower.serde.records import message_layout
from flwr_smartsplit.flower.server_optimizer import message_step
from flwr_smartsplit.types import ClientReply, Failure

_log = getLogger("flwr")


class MessageStrategy(SplitStrategy[FedAvg], Strategy):
    """Know the clients behind a grid's nodes, and read what they reply."""

    _api = MESSAGE_API
    _take_step = staticmethod(message_step)

    def _set_up(self, profile_timeout_seconds: float) -> None:
        keys = self.strategy.arrayrecord_key, self.strategy.configrecord_key
        layout = message_layout(*keys)
        self._fleet = Fleet(
            layout,
            timeout_seconds=profile_timeout_seconds,
            compare=self._start.require_same,
            owners=self._owners,
        )

    def summary(self) -> None:
        """Log the strategy's settings in Flower's format."""
        self._central.summary()
        self.strategy.summary()

    def close(self) -> None:
        """End the edges; ``start`` does so by itself."""
        self._central.close()

    def _read(
        self, dispatch: Dispatch, replies: Iterable[Message]
    ) -> tuple[list[ClientReply], list[Failure]]:
        read, failures = messages.read(dispatch, replies, self._central.chain)
        self._fleet.heard(dispatch, failures)
        return read, failures

    def _nodes(self, grid: Grid) -> list[int]:
        """Wait for enough nodes, as FedAvg does."""
        least = self.strategy.min_available_nodes
        while len(nodes := list(grid.get_node_ids())) < least:
            _log.log(
                INFO,
                "Waiting for nodes to connect: %d connected (minimum required: %d).",
                len(nodes),
                least,
            )
            time.sleep(1)
        return nodes


def given(config: ConfigRecord | None) -> dict[str, Any]:
    """List what a user's config says; FedAvg adds the round to it."""
    return {k: v for k, v in (config or {}).items() if k != "server-round"}
