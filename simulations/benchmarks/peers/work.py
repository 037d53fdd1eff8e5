"""Batches of noise, ResNet-18 in two halves, and the clock: what each peer needs.

It imports nothing of the product, nor of Flower: a peer may run with another version.
"""

import time
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from simulations.benchmarks.process_tree import tree_times

NUM_CLASSES = 10
LEARNING_RATE = 1e-3
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What some rounds took a step, in all processes."""

    wall_ms: float
    user_ms: float
    system_ms: float
    page_faults: float

    @property
    def cpu_ms(self) -> float:
        """All processor time."""
        return self.user_ms + self.system_ms


class Marks:
    """The times of some rounds: marked after the first, and after the last."""

    def __init__(self, num_rounds: int) -> None:
        self._num_rounds = num_rounds  # After the first
        self._marks: list[tuple[float, ...]] = []

    def ended(self, number: int) -> None:
        """Note that a round has ended; the first is number 1."""
        if number in {1, self._num_rounds + 1}:
            self._marks.append((time.perf_counter(), *tree_times()))

    def spent(self, num_steps: int) -> Spent:
        """Say what the rounds after the first took a step."""
        wall, user, system, faults = (
            (b - a) / num_steps for a, b in zip(*self._marks, strict=True)
        )
        return Spent(
            wall_ms=1e3 * wall,
            user_ms=1e3 * user,
            system_ms=1e3 * system,
            page_faults=faults,
        )


def noise(input_shape: tuple[int, ...], *, batch_size: int, count: int) -> Batches:
    """Draw the batches that every client has."""
    chance = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch_size, *input_shape, generator=chance),
            torch.randint(NUM_CLASSES, (batch_size,), generator=chance),
        )
        for _ in range(count)
    ]


def resnet18_halves() -> tuple[nn.Module, nn.Module]:
    """Cut torchvision's ResNet-18 where ours is cut: behind its first block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torchvision.models.resnet18(num_classes=NUM_CLASSES)
    front = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1[0])
    layers = net.layer1[1], net.layer2, net.layer3, net.layer4
    return front, nn.Sequential(*layers, net.avgpool, nn.Flatten(), net.fc)
