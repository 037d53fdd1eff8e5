"""Models as a user of the command line would write them; importable by name."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from flwr_smartsplit.task import Task

NOT_A_FUNCTION = 3


def small():
    return nn.Sequential(
        nn.Linear(4, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3)
    )


def small_task():
    return Task(
        model_fn=small,
        loss_fn=functional.cross_entropy,
        optimizer_fn=partial(torch.optim.Adam, lr=0.1),
        example_inputs=torch.zeros(1, 4),
        example_targets=torch.arange(3),
    )


def talkative():
    print("hello from MODEL")  # noqa: T201 - what a user's code may do
    return small()


def two_outputs():
    return _TwoOutputs()


def one_number():
    return nn.Linear(4, 1)


def a_list():
    return [small()]


def frozen():
    return small().requires_grad_(False)


def needs_an_argument(size):
    return nn.Linear(size, 2)


def fails():
    raise RuntimeError("no such\nluck")


def without_length():
    """A loss that cannot be taken: targets that the outputs do not have."""
    return Task(
        model_fn=small,
        loss_fn=functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.1),
        example_inputs=torch.zeros(1, 4),
        example_targets=torch.tensor([7]),
    )


class _TwoOutputs(nn.Module):
    """Two classifiers; torchvision's GoogLeNet returns its outputs like that."""

    def __init__(self):
        super().__init__()
        self.first, self.main, self.other = (
            nn.Linear(4, 8),
            nn.Linear(8, 5),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        x = self.first(x)
        return self.main(x), self.other(x)


class Branching(nn.Module):
    """What torch.fx cannot trace, but a dry run can run."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x.relu() if range(x.shape[0]) else x)


class LooksAtValues(Branching):
    """What not even a dry run can run."""

    def forward(self, x):
        x = self.first(x)
        return self.last(x * 2 if x.sum() > 0 else x)


class UsedTwice(nn.Module):
    """What can be traced, but not be cut."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.linear(x))


class _Interrupts(nn.Module):
    """Press Ctrl-C as soon as an edge keeps files."""

    def forward(self, x):
        if any(Path(tempfile.gettempdir()).glob("smartsplit-*")):
            raise KeyboardInterrupt
        return x


def interrupted():
    return nn.Sequential(nn.Linear(4, 8), _Interrupts(), nn.Linear(8, 3))
