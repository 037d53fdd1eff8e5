"""Small models and tasks that several tests share; importable, so edges build them."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from flwr_smartsplit.task import Task
from tests.oracle import fingerprint

OptimizerFn = Callable[[Iterable[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, OptimizerFn] = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3),
}


class Residual(nn.Module):
    """A block with a way around it, and chance inside."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_channels, num_channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, num_channels)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.drop(self.norm(self.conv(x))))


class FunctionalDropout(nn.Module):
    """Chance without a module of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.3, training=self.training)


class SmallCNN(nn.Module):
    """What can go wrong in a cut, in one small network for ``(batch, 3, 12, 12)``.

    Batch statistics, an in-place operator, group norm in a residual block, three random
    operators, operators without a module, and an end without parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU(inplace=True)
        self.drop1 = nn.Dropout2d(0.2)
        self.block = Residual(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2)
        self.norm2 = nn.BatchNorm2d(12, momentum=0.3)
        self.drop2 = FunctionalDropout()
        self.scale = nn.Parameter(torch.ones(12, 1, 1))
        self.classify = nn.Linear(12, 10)
        self.normalise = nn.LogSoftmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.relu1(self.norm1(self.conv1(x))))
        x = self.norm2(self.conv2(self.block(x)))
        x = self.drop2(functional.gelu(x)) * self.scale
        return self.normalise(self.classify(x.mean(dim=(2, 3))))


class UNet(nn.Module):
    """Two levels down and up again, with a concatenation on each."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.down1, self.down2 = self.block(3, width), self.block(width, 2 * width)
        self.bottom = self.block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join2 = self.block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join1 = self.block(2 * width, width)
        self.classify = nn.Conv2d(width, 10, 1)

    @staticmethod
    def block(before: int, after: int) -> nn.Module:
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        top = self.down1(x)
        middle = self.down2(functional.max_pool2d(top, 2))
        x = self.bottom(functional.max_pool2d(middle, 2))
        x = self.join2(torch.cat([self.up2(x), middle], dim=1))
        x = self.join1(torch.cat([self.up1(x), top], dim=1))
        return self.classify(x).mean(dim=(2, 3))


def unet() -> nn.Module:
    """Build the small U-Net for ``(batch, 3, 12, 12)``."""
    return seeded(UNet)


def frozen_unet() -> nn.Module:
    """Build the small U-Net with the way down frozen, and a part of the way up."""
    model = unet()
    for part in (model.down1, model.down2, model.join2):
        part.requires_grad_(False)
    return model


def densenet() -> nn.Module:
    """Build a DenseNet of torchvision with one block."""
    build = partial(torchvision.models.DenseNet, 4, (4,), 6, num_classes=10)
    return seeded(build)


def residual_blocks() -> nn.Module:
    """Build two blocks of a ResNet, whose values are the same everywhere."""
    return seeded(_residual_blocks)


def _residual_blocks() -> nn.Module:
    """Make two blocks of torchvision's ResNets, the second with a downsampling."""
    block = torchvision.models.resnet.BasicBlock
    down = nn.Sequential(nn.Conv2d(6, 8, 1, stride=2), nn.BatchNorm2d(8))
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        block(6, 6),
        block(6, 8, 2, down),
        nn.Flatten(),
        nn.Linear(200, 10),
    )


SMALL_CNN_UNITS = (
    "conv1",
    "relu1",  # norm1 stands before it: relu1 writes into its output
    "drop1",
    "block.drop",
    "relu",
    "conv2",
    "norm2",
    "gelu",
    "drop2",
    "mul",
    "mean",
    "classify",
    "normalise",
)
SMALL_CNN_RANDOM = {"drop1": 2, "block.drop": 3, "drop2": 8}
"""The modules that draw random numbers, with the index of their unit."""

RESNET18_NUM_UNITS = 14
DAILY_RESNET18_CUTS = (0, 1, 7, RESNET18_NUM_UNITS - 1)  # make test-all has all


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model whose values are the same everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build()


def small_cnn() -> nn.Module:
    """Build the small network."""
    return seeded(SmallCNN)


def channels_last_cnn() -> nn.Module:
    """Build the small network with its images' channels innermost in memory."""
    return small_cnn().to(memory_format=torch.channels_last)


def resnet18() -> nn.Module:
    """Build torchvision's ResNet18 for ten classes."""
    return seeded(partial(torchvision.models.resnet18, num_classes=10))


def task_of(
    model_fn: Callable[[], nn.Module],
    *,
    optimizer: OptimizerFn = OPTIMIZERS["sgd"],
    shape: tuple[int, ...] = (3, 12, 12),
    max_boundary_tensors: int = 1,
) -> Task:
    """Make a classification task of inputs of one shape."""
    return Task(
        model_fn=model_fn,
        loss_fn=functional.cross_entropy,
        optimizer_fn=optimizer,
        example_inputs=torch.zeros(1, *shape),
        example_targets=torch.zeros(1, dtype=torch.int64),
        max_boundary_tensors=max_boundary_tensors,
    )


def batches_of(
    num_batches: int, batch_size: int, *, shape: tuple[int, ...] = (3, 12, 12)
) -> list[tuple[Tensor, Tensor]]:
    """Draw batches for a task of ten classes, the same ones every time."""
    rng = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(batch_size, *shape, generator=rng),
            torch.randint(10, (batch_size,), generator=rng),
        )
        for _ in range(num_batches)
    ]


def recording(
    parameters: Iterable[nn.Parameter], *, optimizer_fn: OptimizerFn, folder: Path
) -> Optimizer:
    """Build an optimizer that first writes down the gradients it is given.

    Each optimizer has a file in ``folder``, in the order they are built; each step is
    a line with the gradients' fingerprints in parameter order. So gradients can be read
    in whatever process they are.
    """
    parameters = list(parameters)
    optimizer = optimizer_fn(parameters)
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    path.touch()

    def write_down(*_: object) -> None:
        prints = [None if p.grad is None else fingerprint(p.grad) for p in parameters]
        with path.open("a") as file:
            file.write(json.dumps(prints) + "\n")

    optimizer.register_step_pre_hook(write_down)
    return optimizer
