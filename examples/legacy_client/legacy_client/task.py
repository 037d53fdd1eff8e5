"""The model, how it is trained, and the data."""

from collections.abc import Mapping
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import Task

BATCH_SIZE = 16
BUDGETS_BYTES = (None, 315 * 2**10, 200 * 2**10)  # one per client; None is no limit
NUM_TRAIN, NUM_VALIDATE = 1200, 1500  # after these, the server's test images


class Net(nn.Module):
    """Three layers for images of 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 96)
        self.last = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, 64)`` to scores ``(batch, 10)``."""
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        return self.last(x)


def build_task() -> Task:
    """Say what is trained and how."""
    return Task(
        model_fn=Net,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=torch.optim.Adam,
        schedule_fn=set_lr,
        metrics_fn=accuracy,
        example_inputs=torch.zeros(1, 64),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def set_lr(optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> None:
    """Take the learning rate of the round, which ``on_fit_config_fn`` set."""
    for group in optimizer.param_groups:
        group["lr"] = config.get("lr", 1e-3)


def accuracy(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Measure a batch of an evaluation."""
    return {"accuracy": float((outputs.argmax(1) == targets).float().mean())}


def load_images(start: int, stop: int | None, step: int = 1) -> TensorDataset:
    """Load some of scikit-learn's 1,797 digits."""
    digits = load_digits()
    images = torch.tensor(digits.data[start:stop:step], dtype=torch.float32) / 16
    return TensorDataset(images, torch.tensor(digits.target[start:stop:step]))


def load_data(index: int) -> tuple[DataLoader, DataLoader]:
    """Load one client's images: 400 to train, 100 to validate."""
    step = len(BUDGETS_BYTES)
    train_set = load_images(index, NUM_TRAIN, step)
    val_set = load_images(NUM_TRAIN + index, NUM_VALIDATE, step)
    return (
        DataLoader(train_set, batch_size=BATCH_SIZE, shuffle=True),
        DataLoader(val_set, batch_size=BATCH_SIZE),
    )


def load_test() -> TensorDataset:
    """Load the images that no client has."""
    return load_images(NUM_VALIDATE, None)
