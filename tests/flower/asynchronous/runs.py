"""Asynchronous runs over the tiny task, on a grid whose replies take simulated time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import AsyncSmartSplit
from flwr_smartsplit.flower.serde.records import config_of, from_array_record
from simulations.fleets.virtual_grid import VirtualGrid
from tests.flower.apps import composed, initial_arrays
from tests.in_process_grid import InProcessGrid
from tests.tasks import SEED, TASK, State

ASYNC = """clients_at_once merge_every max_staleness max_share poll_seconds""".split()
SPEEDS = (1.0, 7.0, 2.0, 5.0, 3.0)
"""Seconds that a client's answer takes, by its partition."""


def async_split(edges: Any = (), **changes: Any) -> AsyncSmartSplit:
    """Make the strategy under test."""
    own = {k: changes.pop(k) for k in ASYNC if k in changes}
    facts: dict[str, Any] = {"seed": SEED, "fraction_evaluate": 0.0, "journal": None}

    def kind(task: Any, edges: Any, **rest: Any) -> AsyncSmartSplit:
        return AsyncSmartSplit(task, edges, **own, **rest)

    made: AsyncSmartSplit = composed(kind, FedAvg, TASK, edges, **facts | changes)
    return made


def timed(
    apps: InProcessGrid | Sequence[Any], speeds: Sequence[float] = SPEEDS
) -> VirtualGrid:
    """Make a grid in which each client takes its own time to train."""
    inner = apps if isinstance(apps, InProcessGrid) else InProcessGrid(apps)

    def seconds_of(request: Message, reply: Message) -> float:
        partition = inner.node_ids.index(request.metadata.dst_node_id)
        return speeds[partition] if config_of(request.content) else 0.0

    return VirtualGrid(inner, seconds_of)


def state_after(
    grid: Any, strategy: Any, *, num_rounds: int = 2, **start: Any
) -> State:
    """Run a strategy, and return the state that it ends with."""
    result = strategy.start(grid, initial_arrays(), num_rounds=num_rounds, **start)
    return from_array_record(result.arrays)


def rows_of(
    make: Callable[..., Any],
    grid: Any,
    *,
    num_rounds: int = 2,
    timeout: float = 3600,
    **changes: Any,
) -> tuple[State, list[Mapping[str, Any]]]:
    """Run, and return the rows of the journal, too."""
    rows: list[Mapping[str, Any]] = []
    strategy = make(on_row=(rows.append,), **changes)
    made = state_after(grid, strategy, num_rounds=num_rounds, timeout=timeout)
    return made, rows
