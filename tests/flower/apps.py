"""Client apps over the tiny task: Message API, legacy, and ones that misbehave."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from flwr_smartsplit import (
    Constraints,
    Planning,
    Route,
    SmartSplit,
    SmartSplitNumPyClient,
    Task,
    build_client_app,
    predicted_peak_bytes,
)
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.types import ChainProfile
from tests.in_process_grid import InProcessGrid
from tests.tasks import BATCH_SIZE, SEED, TASK, State, initial_state, loader


@cache
def tiny_profile() -> ChainProfile:
    """Profile the tiny task once for all modules."""
    return profile_of(TASK, batch_size=BATCH_SIZE)


def peak_of(route: Route) -> int:
    """Predict a device's peak."""
    return predicted_peak_bytes(tiny_profile(), route)


def budgets_of(*cuts: int | None) -> list[int | None]:
    """Choose budgets under which clients get these cuts; None is a whole model."""
    return [None if cut is None else peak_of(Route.split(cut)) for cut in cuts]


def make_client(
    index: int,
    budget_bytes: int | None = None,
    *,
    edges: Sequence[Edge] = (LocalEdge(),),
    task: Task = TASK,
    train_loader: Any = None,
    client_key: Any = None,
    **changes: Any,
) -> SmartSplitNumPyClient:
    """Make one client; its key is c0, c1, ..."""
    return SmartSplitNumPyClient(
        task,
        loader(index) if train_loader is None else train_loader,
        client_key=f"c{index}" if client_key is None else client_key,
        budget_bytes=budget_bytes,
        edges=edges,
        **changes,
    )


def message_app(
    index: int,
    budget_bytes: int | None = None,
    *,
    weighted_by_key: str = "num-examples",
    **changes: Any,
) -> ClientApp:
    """Make a Message-API app of one client."""

    def client_fn(context: Context) -> SmartSplitNumPyClient:
        return make_client(index, budget_bytes, **changes)

    return build_client_app(client_fn, weighted_by_key=weighted_by_key)


def legacy_app(
    index: int, budget_bytes: int | None = None, **changes: Any
) -> ClientApp:
    """Make an app of the same client as a ``NumPyClient``."""

    def client_fn(context: Context) -> Any:
        return make_client(index, budget_bytes, **changes).to_client()

    return ClientApp(client_fn)


def apps(budgets: Sequence[int | None], **changes: Any) -> list[ClientApp]:
    """Make one Message-API app per budget."""
    return [message_app(index, b, **changes) for index, b in enumerate(budgets)]


def broken_app() -> ClientApp:
    """Make an app that knows no message."""
    return ClientApp()


def overweight_app(index: int, kind: Callable[..., ClientApp]) -> ClientApp:
    """Make a client whose batches are twice as large as it says: it needs more memory.

    It is given a plan that fits what it said.
    """
    profile = profile_of(TASK, batch_size=BATCH_SIZE // 2)
    budget = predicted_peak_bytes(profile, Route.split(4))
    return kind(index, budget, batch_size=BATCH_SIZE // 2)


def failing_app(index: int) -> ClientApp:
    """Make a client whose own data cannot be read."""

    class Broken:
        def __iter__(self) -> Any:
            raise OSError("disk on fire")

    return message_app(index, train_loader=Broken(), num_examples=9, batch_size=4)


def initial_arrays() -> ArrayRecord:
    """Make the record every run starts from."""
    return to_array_record(initial_state())


def arrays_of(message: Message) -> Mapping[str, Any]:
    """Join a message's arrays by name."""
    arrays: dict[str, Any] = {}
    for record in message.content.array_records.values():
        arrays |= from_array_record(record)
    return arrays


@dataclass(frozen=True)
class Run:
    """A run that is over."""

    strategy: Strategy
    result: Result
    grid: InProcessGrid

    @property
    def state(self) -> State:
        """The final state."""
        return from_array_record(self.result.arrays)

    def kinds(self) -> list[tuple[str, str]]:
        """Say who failed how."""
        return [(f.client_key, f.kind) for f in self.strategy.failures]


def run(
    grid: InProcessGrid | Sequence[ClientApp],
    strategy: Strategy | None = None,
    *,
    num_rounds: int = 2,
    arrays: ArrayRecord | None = None,
    **start: Any,
) -> Run:
    """Run a strategy; by default ours, with one edge and without evaluation."""
    grid = grid if isinstance(grid, InProcessGrid) else InProcessGrid(grid)
    strategy = smart_split() if strategy is None else strategy
    arrays = initial_arrays() if arrays is None else arrays
    result = strategy.start(grid, arrays, num_rounds=num_rounds, **start)
    return Run(strategy, result, grid)


PLANNING = {field.name for field in fields(Planning)} - {"constraints"}
CONSTRAINTS = {field.name for field in fields(Constraints)}
OURS = """strategy codec mixing server_steps seed journal on_row between_rounds verify
    checkpoints client_keys""".split()


def composed(kind: Any, fedavg: Any, task: Task, edges: Any, **changes: Any) -> Any:
    """Make one of our strategies; each change goes to where it belongs.

    Those of nobody else are for the FedAvg inside.
    """
    constraints = {k: changes.pop(k) for k in CONSTRAINTS & changes.keys()}
    planning = {k: changes.pop(k) for k in PLANNING & changes.keys()}
    ours = {k: changes.pop(k) for k in OURS if k in changes}
    ours.setdefault("strategy", fedavg(**changes))
    rules = Planning(constraints=Constraints(**constraints), **planning)
    return kind(task, edges, planning=rules, **ours)


def smart_split(
    edges: Sequence[Edge] = (LocalEdge(),), *, task: Task = TASK, **changes: Any
) -> SmartSplit:
    """Make the strategy under test."""
    facts: dict[str, Any] = {"seed": SEED, "fraction_evaluate": 0.0}
    made: SmartSplit = composed(SmartSplit, FedAvg, task, edges, **{**facts, **changes})
    return made


def messages(grid: InProcessGrid, *kinds: str) -> list[Message]:
    """List what the strategy sent."""
    return [m for m in grid.sent if m.metadata.message_type in kinds]
