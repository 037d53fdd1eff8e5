"""Losses, optimizers and targets of everyday code, as docs/support.md lists them.

The targets are nested, unevenly long or missing; losses and optimizers hold tensors or
look at values.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from flwr_smartsplit.errors import SmartSplitError
from tests.flower.apps import message_app, run, smart_split
from tests.support import EDGES, check_every_kind, check_runs
from tests.tasks import NUM_CLASSES, TASK, tiny_cnn

SLOW = pytest.mark.slow  # More of the same kind
ADAM = partial(torch.optim.Adam, lr=torch.tensor(0.01), foreach=False)
WEIGHTS = torch.tensor([1.0, 5.0, 0.1])
TABLE = torch.arange(12.0).view(4, 3)


# --- tensors that a loss or an optimizer holds ----------------------------------------


def by_a_global(outputs: Tensor, targets: Tensor) -> Tensor:
    """Weigh classes by a tensor of the module."""
    return functional.cross_entropy(outputs, targets, weight=WEIGHTS)


def by_a_row(outputs: Tensor, targets: Tensor) -> Tensor:
    """Weigh by a view, which keeps all of its table alive."""
    losses = functional.cross_entropy(outputs, targets, reduction="none")
    return (losses * TABLE[1].sum()).mean()


class Smoothed(nn.Module):
    """A loss with a buffer, and a table that it makes when it is first used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", WEIGHTS)
        self.table: Tensor | None = None

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mix one-hot targets with the weights."""
        if self.table is None:
            self.table = torch.eye(NUM_CLASSES)
        wanted = self.table[targets] + 0.1 * self.weights
        return -(outputs.log_softmax(1) * wanted).mean()


def several_outputs(targets: Tensor) -> Tensor:
    """Name many classes at once, for binary losses."""
    return functional.one_hot(targets, NUM_CLASSES).float()


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
        pytest.param(partial(functional.cross_entropy, weight=WEIGHTS), marks=SLOW),
        pytest.param(by_a_global, marks=SLOW),
        pytest.param(by_a_row, marks=SLOW),
    ],
    ids=["module", "partial", "global", "view"],
)
def test_class_weights(loss_fn: Any) -> None:
    """Wherever a loss holds its tensors."""
    check_every_kind(loss_fn=loss_fn)


def test_class_weights_in_a_loss_with_a_memory() -> None:
    """What it makes at its first use is its own, and never fake."""
    loss = Smoothed()
    check_every_kind(loss_fn=loss)
    assert type(loss.table) is Tensor


def test_class_weights_of_multi_label_losses() -> None:
    """``pos_weight`` and its like."""
    check_every_kind(
        loss_fn=nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
        example_targets=several_outputs(torch.arange(NUM_CLASSES)),
        metrics_fn=None,
    )


def rate_made_anew(parameters: Any) -> Optimizer:
    """Build an optimizer with a rate of its own."""
    return torch.optim.SGD(parameters, lr=torch.tensor(0.05), momentum=0.9)


@pytest.mark.parametrize(
    "optimizer_fn",
    [
        rate_made_anew,
        pytest.param(partial(torch.optim.SGD, lr=torch.tensor(0.05)), marks=SLOW),
        pytest.param(ADAM, marks=SLOW),
    ],
    ids=["made anew", "SGD", "Adam"],
)
def test_learning_rates_as_tensors(optimizer_fn: Any) -> None:
    """A u-shape is priced for one rate at each of its ends, so four bytes too high."""
    check_every_kind(optimizer_fn=optimizer_fn, is_exact=False)


# --- losses that look at values -------------------------------------------------------


def masked(outputs: Tensor, targets: Tensor) -> Tensor:
    """Leave out examples by a mask."""
    kept = targets >= 0
    return functional.cross_entropy(outputs[kept], targets[kept])


def hardest(outputs: Tensor, targets: Tensor) -> Tensor:
    """Train on the hardest examples; how many, the values say."""
    losses = functional.cross_entropy(outputs, targets, reduction="none")
    count = 1 + int(losses.detach().min() > 0)
    return losses.topk(count).values.mean()


@pytest.mark.parametrize("loss_fn", [masked, pytest.param(hardest, marks=SLOW)])
def test_losses_that_look_at_values(loss_fn: Any) -> None:
    """They are run for real, on the task's example targets."""
    check_every_kind(loss_fn=loss_fn)


def sequence_model() -> nn.Module:
    """Build a model that reads sequences of 7 steps and scores 4 labels at each."""
    return nn.Sequential(
        *(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()),
        *(nn.Linear(16, 4), nn.LogSoftmax(2)),
    )


def ctc(outputs: Tensor, targets: Any) -> Tensor:
    """Align labels with steps."""
    steps = outputs.transpose(0, 1)
    if isinstance(targets, Tensor):
        size, length = targets.shape
        lengths = (len(steps),) * size, (length,) * size
        return functional.ctc_loss(steps, targets, *lengths)
    return functional.ctc_loss(
        steps, targets["labels"], targets["steps"], targets["lengths"]
    )


LENGTHS = {"steps": torch.tensor([7, 6]), "lengths": torch.tensor([3, 2])}


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(torch.tensor([[1, 2, 3], [3, 2, 1]]), marks=SLOW),
        {"labels": torch.tensor([[1, 2, 3], [3, 2, 1]]), **LENGTHS},
    ],
    ids=["one length", "padded"],
)
def test_ctc(targets: Any) -> None:
    """With labels of one length, or padded with their lengths."""
    check_every_kind(
        model_fn=sequence_model,
        loss_fn=ctc,
        example_inputs=torch.zeros(2, 7, 5),
        example_targets=targets,
        metrics_fn=None,
        # Drawn lengths may fit no drawn label, so real peaks differ by batch.
        is_exact=isinstance(targets, Tensor),
    )


# --- several losses, and nested targets -----------------------------------------------


class TwoHeads(nn.Module):
    """A classifier that also says where; its outputs are nested as asked."""

    def __init__(self, *, as_dict: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*list(tiny_cnn())[:8])
        self.kind, self.box = nn.Linear(24, NUM_CLASSES), nn.Linear(24, 4)
        self.as_dict = as_dict

    def forward(self, inputs: Tensor) -> Any:
        """Return both heads."""
        features = self.body(inputs)
        kind, box = self.kind(features), self.box(features)
        return {"kind": kind, "box": box} if self.as_dict else (kind, box)


def two_losses(outputs: Any, targets: Any) -> Tensor:
    """Add the losses of both heads."""
    if isinstance(outputs, dict):
        outputs = outputs["kind"], outputs["box"]
        targets = targets["kind"], targets["box"]
    first = functional.cross_entropy(outputs[0], targets[0])
    return first + 0.5 * functional.l1_loss(outputs[1], targets[1])


KINDS, BOXES = torch.arange(NUM_CLASSES), torch.rand(NUM_CLASSES, 4)


class Wanted(NamedTuple):
    """Targets by name."""

    kind: Tensor
    box: Tensor


def two_named_losses(outputs: Any, targets: Wanted) -> Tensor:
    """Add the losses of both heads."""
    return two_losses(outputs, (targets.kind, targets.box))


@pytest.mark.parametrize(
    ("targets", "loss_fn"),
    [
        ({"kind": KINDS, "box": BOXES}, two_losses),
        pytest.param((KINDS, BOXES), two_losses, marks=SLOW),
        pytest.param([KINDS, BOXES], two_losses, marks=SLOW),
        (Wanted(KINDS, BOXES), two_named_losses),
    ],
    ids=["dict", "tuple", "list", "named"],
)
def test_several_outputs_and_losses(targets: Any, loss_fn: Any) -> None:
    """Outputs and targets as a dict or as a tuple."""
    check_every_kind(
        model_fn=partial(TwoHeads, as_dict=isinstance(targets, dict)),
        loss_fn=loss_fn,
        example_targets=targets,
        metrics_fn=None,
    )


def weighted(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """Weigh each example."""
    losses = functional.cross_entropy(outputs, targets[0], reduction="none")
    return (losses * targets[1]).mean()


def test_weights_of_single_examples() -> None:
    """In the targets; micro-batches take their part of them."""
    facts: dict[str, Any] = {"loss_fn": weighted, "metrics_fn": None}
    facts["example_targets"] = KINDS, torch.rand(NUM_CLASSES)
    check_every_kind(**facts)
    check_runs(replace(TASK, accumulate=2, **facts))


def energy(outputs: Tensor, targets: None) -> Tensor:
    """Need no targets."""
    assert targets is None
    return outputs.pow(2).mean()


def test_no_targets() -> None:
    """The loader yields ``(inputs, None)``."""
    check_every_kind(loss_fn=energy, example_targets=None, metrics_fn=None)


def test_targets_other_than_the_examples() -> None:
    """The error says what the loader yields and what the task has."""
    task = replace(TASK, loss_fn=energy, example_targets=None, metrics_fn=None)
    clients = [message_app(index, task=task) for index in range(2)]
    with pytest.raises(SmartSplitError, match="2 x ") as raised:
        run(clients, smart_split(EDGES, task=task), num_rounds=1)
    cause = str(raised.value)
    assert "yields targets in a Tensor" in cause
    assert "example_targets are None" in cause


class Pixels(nn.Module):
    """A small U-Net: a score for each class at each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3)
        self.norm, self.up = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 3)
        self.join, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Go down and up."""
        wide = self.down(images).relu()
        low = self.norm(self.bottom(wide)).relu()
        joined = torch.cat([self.up(low), wide], 1)
        outputs: Tensor = self.head(self.join(joined).relu())
        return outputs


def test_segmentation() -> None:
    """A class for each pixel, weighed, some left out, through a U-Net."""
    check_every_kind(
        model_fn=Pixels,
        loss_fn=nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=-1),
        example_targets=torch.arange(72).view(2, 6, 6) % 4 - 1,
        max_boundary_tensors=2,
        metrics_fn=None,
    )
