"""The model, how it is trained, the data, and who has which memory."""

from functools import partial

import torch
from torch import nn
from torch.utils.data import TensorDataset

from flwr_smartsplit import RayEdge, Task

NEAR, FAR = "near", "far"
EDGES = (RayEdge(name=NEAR), RayEdge(name=FAR))  # routes visit them in this order
BATCH_SIZE = 16
KIB = 2**10
BUDGETS_BYTES = (None, 220 * KIB, 220 * KIB, 150 * KIB, 80 * KIB, 80 * KIB)
KEEP_LABELS = ("2", "5")  # the clients whose labels must stay with them
NUM_CLASSES, NUM_FEATURES, NUM_EXAMPLES = 10, 32, 200


def build_net() -> nn.Module:
    """Build four hidden layers: a chain of nine units."""
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, NUM_CLASSES),
    )


def build_task() -> Task:
    """Say what is trained and how."""
    return Task(
        model_fn=build_net,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.Adam, lr=3e-3),
        example_inputs=torch.zeros(1, NUM_FEATURES),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )


def make_data(seed: int) -> TensorDataset:
    """Make examples of ten classes: each is a point in space, and noise around it."""
    centres = torch.randn(
        NUM_CLASSES, NUM_FEATURES, generator=torch.Generator().manual_seed(0)
    )
    rng = torch.Generator().manual_seed(seed)
    targets = torch.randint(NUM_CLASSES, (NUM_EXAMPLES,), generator=rng)
    noise = torch.randn(NUM_EXAMPLES, NUM_FEATURES, generator=rng)
    return TensorDataset(centres[targets] + noise, targets)
