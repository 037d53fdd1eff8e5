"""The model, how it is trained, and the data."""

from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import Task

BATCH_SIZE = 16
NUM_TRAIN = 1500  # after these, the server's test images


class Net(nn.Module):
    """A small CNN for images of 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 2 * 2, 120)
        self.fc2 = nn.Linear(120, 10)

    def forward(self, x):
        """Return one score per digit."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)


def build_task():
    """Say what is trained, and how: `smartsplit edge` calls this, too."""
    return Task(
        model_fn=Net,
        loss_fn=F.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, momentum=0.9),
        schedule_fn=set_lr,
        metrics_fn=accuracy,
        example_inputs=torch.zeros(1, 1, 8, 8),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def set_lr(optimizer, config):
    """Take the learning rate that the server sends."""
    for group in optimizer.param_groups:
        group["lr"] = config.get("lr", 0.03)


def accuracy(outputs, targets):
    """Measure a batch of an evaluation."""
    return {"accuracy": (outputs.argmax(1) == targets).float().mean()}


def load_images(start, stop, step=1):
    """Load some of scikit-learn's 1,797 digits; nothing is downloaded."""
    digits = load_digits()
    images = torch.tensor(digits.images[start:stop:step], dtype=torch.float32)
    labels = torch.tensor(digits.target[start:stop:step])
    return TensorDataset(images[:, None] / 8 - 1, labels)


def load_data(partition_id, num_partitions):
    """Load one device's images."""
    images = load_images(partition_id, NUM_TRAIN, num_partitions)
    return DataLoader(images, batch_size=BATCH_SIZE, shuffle=True)
