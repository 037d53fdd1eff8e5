"""Guess the labels that stay on a device from the gradients that it sends.

On a u-shaped route, the device sends the gradient of each example's returned boundary.
Its direction follows the class. The attacker knows the classes of a few examples.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flwr_smartsplit.split.build import build_chain, materialise
from simulations.attacks.victims import BATCH_SIZE, Examples, State, Victim

NUM_KNOWN = 2
"""Examples of each class that the attacker knows."""


def sent_gradients(
    victim: Victim, state: State, cut: int, examples: Examples
) -> tuple[Tensor, Tensor]:
    """Return the returned boundaries, and the gradients that the device sends back."""
    chain = build_chain(victim.task)
    tail: nn.Module = materialise(chain, cut, len(chain), state)
    boundaries = victim.boundaries(state, cut, examples.images)
    gradients = []
    pairs = zip(
        boundaries.split(BATCH_SIZE), examples.classes.split(BATCH_SIZE), strict=True
    )
    for boundary, classes in pairs:
        leaf = boundary.clone().requires_grad_()
        victim.task.loss_fn(tail(leaf), classes).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    return boundaries, torch.cat(gradients)


def guessed(rows: Tensor, classes: Tensor) -> float:
    """Guess each row's class by the nearest known direction; return the hit rate."""
    directions = F.normalize(rows.flatten(1), dim=1)
    num_classes = int(classes.max()) + 1
    known = [(classes == c).nonzero()[:NUM_KNOWN, 0] for c in range(num_classes)]
    centres = torch.stack([directions[each].mean(dim=0) for each in known])
    is_known = torch.zeros(len(classes), dtype=torch.bool)
    is_known[torch.cat(known)] = True
    nearest = (directions @ F.normalize(centres, dim=1).T).argmax(dim=1)
    return float((nearest == classes)[~is_known].float().mean())
