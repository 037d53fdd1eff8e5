"""A model of one's own, how it is trained, and the data."""

from functools import partial

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset, Subset

from flwr_smartsplit import Task

BATCH_SIZE = 16
BUDGETS_BYTES = (None, 700 * 2**10, 400 * 2**10, 40 * 2**10)  # one per hospital
NUM_TRAIN = 400


class Residual(nn.Module):
    """Add to x what a small network makes of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, width)`` to the same shape."""
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two inputs, a chain of residual blocks, one score per diagnosis."""

    def __init__(self, width: int = 64, num_blocks: int = 3) -> None:
        super().__init__()
        self.mean = nn.Linear(10, width)
        self.worst = nn.Linear(10, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, 2)

    def forward(self, mean: Tensor, worst: Tensor) -> Tensor:
        """Map two tensors ``(batch, 10)`` to scores ``(batch, 2)``."""
        x = torch.relu(self.mean(mean) + self.worst(worst))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build_task() -> Task:
    """Say what is trained and how; inputs go to ``forward`` by these names."""
    return Task(
        model_fn=Net,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.Adam, lr=5e-5),
        metrics_fn=accuracy,
        example_inputs={"mean": torch.zeros(1, 10), "worst": torch.zeros(1, 10)},
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def accuracy(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Measure a batch of an evaluation."""
    return {"accuracy": float((outputs.argmax(1) == targets).float().mean())}


def load_data(index: int) -> tuple[DataLoader, DataLoader]:
    """Load what one hospital has of 569 tumours: ten measures of their cells."""
    table = load_breast_cancer()
    values = torch.tensor(table.data, dtype=torch.float32)
    values = (values - values.mean(0)) / values.std(0)
    inputs = StackDataset(mean=values[:, :10], worst=values[:, 20:])
    examples = StackDataset(inputs, torch.tensor(table.target))
    num_hospitals = len(BUDGETS_BYTES)
    train = Subset(examples, range(index, NUM_TRAIN, num_hospitals))
    test = Subset(examples, range(NUM_TRAIN + index, len(examples), num_hospitals))
    return (
        DataLoader(train, batch_size=BATCH_SIZE, shuffle=True),
        DataLoader(test, batch_size=BATCH_SIZE),
    )
