"""Flower's legacy server over the in-process grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import History, Server, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg, Strategy

from flwr_smartsplit import LegacySmartSplit, Task
from flwr_smartsplit.edge.hosts.local import LocalEdge
from tests.flower.apps import composed
from tests.in_process_grid import InProcessGrid
from tests.tasks import SEED, TASK, State, initial_state

NAMES = tuple(initial_state())


@dataclass(frozen=True)
class LegacyRun:
    """A run of the legacy server that is over."""

    strategy: Strategy
    history: History
    state: State
    grid: InProcessGrid

    def kinds(self) -> list[tuple[str, str]]:
        """Say who failed how."""
        assert isinstance(self.strategy, LegacySmartSplit)
        return [(f.client_key, f.kind) for f in self.strategy.failures]


def legacy_smart_split(
    edges: Sequence[Any] = (LocalEdge(),), *, task: Task = TASK, **changes: Any
) -> Any:
    """Make the strategy under test."""
    facts: dict[str, Any] = {
        "seed": SEED,
        "fraction_evaluate": 0.0,
        "initial_parameters": ndarrays_to_parameters(list(initial_state().values())),
    }
    return composed(LegacySmartSplit, FedAvg, task, edges, **{**facts, **changes})


def run_legacy(
    apps: InProcessGrid | Sequence[ClientApp],
    strategy: Strategy | None = None,
    *,
    num_rounds: int = 2,
    names: Sequence[str] = NAMES,
) -> LegacyRun:
    """Run Flower's own legacy server; by default with our strategy."""
    grid = apps if isinstance(apps, InProcessGrid) else InProcessGrid(apps)
    manager = SimpleClientManager()
    for node in grid.get_node_ids():
        manager.register(GridClientProxy(node, grid, run_id=1))
    strategy = legacy_smart_split() if strategy is None else strategy
    server = Server(client_manager=manager, strategy=strategy)
    # One at a time: the in-process grid is not made for threads.
    server.set_max_workers(1)
    history, _ = server.fit(num_rounds=num_rounds, timeout=None)
    arrays = parameters_to_ndarrays(server.parameters)
    return LegacyRun(strategy, history, dict(zip(names, arrays, strict=True)), grid)
