"""A whole federated run in one file: ``python examples/quickstart.py``.

Four clients train on scikit-learn's digits. Two have room for the whole model, one for
part of it, and one for nothing at all; a Ray edge trains what does not fit.
"""

from functools import partial

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import (
    Chain,
    RayEdge,
    Route,
    SmartSplit,
    SmartSplitNumPyClient,
    Task,
    build_client_app,
    predicted_peak_bytes,
    profile_chain,
)

BATCH_SIZE = 16
BUDGETS_BYTES = (None, 2**20, 300 * 2**10, 2**10)
EDGES = (RayEdge(),)


def build_net() -> nn.Module:
    """Build any module that torch.fx can trace."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
    )


TASK = Task(
    model_fn=build_net,
    loss_fn=nn.functional.cross_entropy,
    optimizer_fn=partial(torch.optim.SGD, lr=0.03, momentum=0.9),
    example_inputs=torch.zeros(1, 1, 8, 8),
    example_targets=torch.zeros(1, dtype=torch.int64),
)


def load_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Load 1,797 images of 8 x 8 pixels, and their classes."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(digits.target)


def client_fn(context: Context) -> SmartSplitNumPyClient:
    """Make the client of one node, as in any Flower app."""
    index = int(context.node_config["partition-id"])
    images, targets = load_data()
    mine = slice(index, 1400, len(BUDGETS_BYTES))
    examples = TensorDataset(images[mine], targets[mine])
    return SmartSplitNumPyClient(
        TASK,
        DataLoader(examples, batch_size=BATCH_SIZE, shuffle=True),
        client_key=str(index),
        budget_bytes=BUDGETS_BYTES[index],
        edges=EDGES,
    )


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the whole model on the server, as with FedAvg."""
    model = build_net()
    model.load_state_dict(arrays.to_torch_state_dict(), strict=True)
    images, targets = load_data()
    with torch.no_grad():
        right = model.eval()(images[1400:]).argmax(1) == targets[1400:]
    return MetricRecord({"accuracy": float(right.float().mean())})


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run five rounds; look at the journal to see what happened to whom."""
    strategy = SmartSplit(
        TASK,
        edges=EDGES,
        journal="out/example.jsonl",
        min_available_nodes=len(BUDGETS_BYTES),
        fraction_evaluate=0.0,
    )
    initial = ArrayRecord(build_net().state_dict())
    strategy.start(grid, initial, num_rounds=5, evaluate_fn=evaluate)


def show_costs() -> None:
    """Print what each cut needs on a device: a help to choose budgets."""
    chain = Chain.from_module(build_net(), TASK.example_inputs)
    profile = profile_chain(chain, batch_size=BATCH_SIZE, task=TASK)
    routes = [Route.split(cut) for cut in range(1, len(chain))]
    for route in [*routes, Route.whole()]:
        print(f"{route!s:24} {predicted_peak_bytes(profile, route):>9,} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    show_costs()
    run_simulation(
        server_app=server_app,
        client_app=build_client_app(client_fn),
        num_supernodes=len(BUDGETS_BYTES),
        backend_config={"client_resources": {"num_cpus": 1}},
    )
