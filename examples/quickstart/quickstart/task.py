"""The model, how it is trained, and the data."""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from flwr_smartsplit import Task

BATCH_SIZE = 16
BUDGETS_BYTES = (None, 2**20, 300 * 2**10, 2**10)  # one per device; None is no limit
NUM_TRAIN = 1400


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


def build_task() -> Task:
    """Say what is trained and how: the server, the devices and the edge all need it."""
    return Task(
        model_fn=build_net,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.03, momentum=0.9),
        example_inputs=torch.zeros(1, 1, 8, 8),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def load_train(index: int) -> TensorDataset:
    """Load one device's share of scikit-learn's digits: 350 images of 8 x 8 pixels."""
    images, targets = _load()
    mine = slice(index, NUM_TRAIN, len(BUDGETS_BYTES))
    return TensorDataset(images[mine], targets[mine])


def load_test() -> tuple[torch.Tensor, torch.Tensor]:
    """Load the 397 images that no device has."""
    images, targets = _load()
    return images[NUM_TRAIN:], targets[NUM_TRAIN:]


def _load() -> tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(digits.target)
