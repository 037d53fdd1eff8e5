"""A task that trains in milliseconds: BatchNorm, dropout, momentum, a last small batch.

It is at module level, so that an edge in another process builds it by reference.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import Route, Task
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.types import ClientPlan

State = dict[str, npt.NDArray[Any]]

NUM_CLASSES = 3
BATCH_SIZE = 4
SHAPE = (1, 6, 6)
SEED = 7


def tiny_cnn() -> nn.Sequential:
    """Build the model: nine units, a cut between any two of them."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),  # BatchNorm would undo a bias
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, NUM_CLASSES),
    )


def accuracy(outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
    """Count which fraction of a batch is right."""
    return {"accuracy": float((outputs.argmax(dim=1) == targets).float().mean())}


class WithUnused(nn.Module):
    """A model with a parameter and a buffer that its forward never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_cnn()
        self.spare = nn.Parameter(torch.full((3,), 1 / 3))
        self.register_buffer("note", torch.tensor(7))

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the body."""
        outputs: Tensor = self.body(inputs)
        return outputs


def transposed_mlp() -> nn.Sequential:
    """Build a model whose weights lie in memory column by column."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES)
    )
    for layer in (model[1], model[3]):
        columns = layer.weight.detach().t().contiguous()
        layer.weight = nn.Parameter(columns.t())
    return model


TASK = Task(
    model_fn=tiny_cnn,
    loss_fn=nn.functional.cross_entropy,
    optimizer_fn=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    example_inputs=torch.zeros(1, *SHAPE),
    example_targets=torch.zeros(1, dtype=torch.int64),
    metrics_fn=accuracy,
)


def build_task() -> Task:
    """Return the task, as the command line asks for it."""
    return TASK


def tiny_chain() -> Chain:
    """Read the model as a chain."""
    return build_chain(TASK)


def initial_state() -> State:
    """Copy the state every run starts from."""
    return {name: array.copy() for name, array in _drawn_state().items()}


@cache
def _drawn_state() -> State:
    """Draw it once: threads that draw at the same time would disturb each other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return state_of(tiny_cnn())


def examples(client: int) -> TensorDataset:
    """Draw a client's own examples; each client has another number of them."""
    chance = torch.Generator().manual_seed(client)
    size = 2 * BATCH_SIZE + 1 + client
    return TensorDataset(
        torch.randn(size, *SHAPE, generator=chance),
        torch.randint(0, NUM_CLASSES, (size,), generator=chance),
    )


def loader(client: int) -> DataLoader[Any]:
    """Make a client's shuffling loader."""
    return DataLoader(examples(client), batch_size=BATCH_SIZE, shuffle=True)


def device_part(state: State, route: Route) -> State:
    """Take what the device of a route is sent."""
    chain = tiny_chain()
    return {
        name: state[name]
        for leg in route.device_legs(len(chain))
        for name in chain.state_names(leg.start, leg.stop)
    }


def client_plan(
    client: int,
    route: Route,
    state: State,
    *,
    round_number: int = 1,
    budget_bytes: int | None = None,
    addresses: Mapping[str, str] | None = None,
) -> ClientPlan:
    """Make the plan a strategy would send; clients are called c0, c1, ..."""
    return ClientPlan(
        client_key=f"c{client}",
        round_number=round_number,
        route=route,
        seed=SEED,
        budget_bytes=budget_bytes,
        state_digest=state_digest(state),
        edge_addresses=dict(addresses or {}),
    )


def state_bytes(state: Mapping[str, Any]) -> int:
    """Add up the sizes of a state's arrays."""
    return sum(int(array.nbytes) for array in state.values())


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name the arrays whose names, dtypes, shapes or bits differ."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one
        or name not in other
        or one[name].dtype != other[name].dtype
        or one[name].shape != other[name].shape
        or one[name].tobytes() != other[name].tobytes()
    )
