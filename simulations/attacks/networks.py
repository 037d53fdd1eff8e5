"""The attacker's own small networks, between flat images and boundaries."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NUM_HIDDEN = 256


def perceptron(num_inputs: int, num_outputs: int) -> nn.Sequential:
    """Build a network with two hidden layers, for rows of numbers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(num_inputs, NUM_HIDDEN),
        nn.ReLU(),
        nn.Linear(NUM_HIDDEN, NUM_HIDDEN),
        nn.ReLU(),
        nn.Linear(NUM_HIDDEN, num_outputs),
    )


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one step down a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def adam(*networks: nn.Module) -> torch.optim.Adam:
    """Make the optimizer of an attacker."""
    parameters: Iterable[Tensor] = (p for n in networks for p in n.parameters())
    return torch.optim.Adam(parameters, lr=1e-3)
