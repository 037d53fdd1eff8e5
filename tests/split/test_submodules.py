"""Modes: modules that a model keeps in the other mode stay so in every segment."""

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.segment import Segment
from flwr_smartsplit.split.submodules import modes_restored, odd_modes
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.models import seeded, task_of

SHAPE = (6,)


class FrozenNorm(nn.Module):
    """A network that keeps its first BatchNorm in evaluation mode, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.frozen = nn.BatchNorm1d(8).requires_grad_(False)
        self.frozen.running_mean.fill_(0.3)
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.last = nn.Linear(8, 10)

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.frozen(self.first(x))))


class AlwaysDropping(nn.Module):
    """A network whose dropout stays on in evaluation, and whose own flag does not."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def train(self, mode: bool = True) -> "AlwaysDropping":
        super().train(mode)
        self.drop.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


def frozen_norm() -> nn.Module:
    """Build the network with the same values everywhere."""
    return seeded(FrozenNorm)


TASK = task_of(frozen_norm, shape=SHAPE)
CUTS = range(1, len(build_chain(TASK)))


def flags(model: nn.Module) -> list[bool]:
    """Read the mode of every submodule."""
    return [module.training for module in model.modules()]


@pytest.mark.parametrize(
    ("model", "odd"),
    [
        (nn.Sequential(nn.Dropout()), {True: set(), False: set()}),
        (FrozenNorm(), {True: {"frozen"}, False: set()}),
        (nn.Sequential(FrozenNorm()), {True: {"0.frozen"}, False: set()}),
        (AlwaysDropping(), {True: set(), False: {"drop"}}),
    ],
    ids=["none", "one in training", "inside another", "one in evaluation"],
)
def test_the_odd_modules_are_named(model, odd):
    """For both modes, by the names they have in the whole model."""
    assert odd_modes(model) == odd


def test_asking_changes_no_mode():
    """Even flags that no call of ``train`` would give are as before."""
    model = FrozenNorm()
    model.body[0].training = False
    before = flags(model)
    odd_modes(model)
    assert flags(model) == before


def test_modes_come_back_after_an_error():
    """Whatever happened inside."""
    model = FrozenNorm()
    model.last.eval()
    before = flags(model)
    with pytest.raises(ZeroDivisionError), modes_restored(model):
        model.eval()
        _ = 1 / 0
    assert flags(model) == before


@pytest.fixture(scope="module")
def checker():
    """Train the network as it stands, and get ready to compare."""
    with RouteChecker(TASK, example_batches(TASK, batch_size=4)) as started:
        yield started


@pytest.mark.parametrize("cut", [0, *CUTS])
def test_a_frozen_norm_is_exact_along_every_route(checker, cut):
    """Its statistics stay, its outputs use them, on the device and at the edge."""
    route = Route.split(cut) if cut else Route.whole()
    assert checker.check(route).differences == ()


def test_a_segment_that_switched_everything_would_be_seen(checker, monkeypatch):
    """Without the odd modes, the check finds the difference."""
    monkeypatch.setattr(Segment, "train", nn.Module.train)
    (difference,) = checker.check(Route.split(CUTS[-1])).differences
    assert "training changes frozen.num_batches_tracked" in difference


def test_the_frozen_norm_does_something():
    """Its statistics are not those of a batch, so that the mode matters."""
    model, values = frozen_norm(), torch.randn(4, *SHAPE)
    frozen = model.train()(values)
    model.frozen.train()
    assert not torch.equal(frozen, model(values))
