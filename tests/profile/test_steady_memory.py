"""Models whose memory grows with each step, as in a stock loop, are refused."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit import Route, Task, Unit, predicted_peak_bytes, profile_chain
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.profile.fake_step import StepLogger
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches

BATCH_SIZE = 4


class Aside(nn.Module):
    """A branch that the loss does not use, which may write into what autograd saved."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.norm, self.side, self.out = nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        """Compute a branch for nobody."""
        normed = self.norm(x)
        if self.in_place:
            normed += self.side(normed)
        else:
            normed = normed + self.side(normed)
        outputs: Tensor = self.out(x)
        return outputs


class Keeping(nn.Module):
    """Keep tensors of forward: all, or the last."""

    def __init__(self, *, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how
        self.all: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Keep what comes out."""
        y: Tensor = self.layer(x)
        if self.how == "all":
            self.all.append(y)
        elif self.how == "last" or self.last is None:
            self.last = y.detach()
        return y


def units_of(model: nn.Module) -> list[Unit]:
    """Name the parts of a sequence as units, as for a model that is not traced."""

    def unit(name: str) -> Unit:
        return Unit(name, lambda root, x: root.get_submodule(name)(x), (name,))

    return [unit(name) for name, _ in model.named_children()]


def task_of(middle: partial[nn.Module]) -> Task:
    """Put a module between two layers, which are units."""

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), middle(), nn.Linear(4, 3))

    return Task(
        model_fn=model,
        units_fn=units_of,
        loss_fn=functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.1),
        example_inputs=torch.zeros(1, 4),
        example_targets=torch.zeros(1, dtype=torch.long),
    )


def peaks(task: Task) -> tuple[int, int]:
    """Predict and measure the whole route."""
    profile = profile_chain(build_chain(task), batch_size=BATCH_SIZE, task=task)
    predicted = predicted_peak_bytes(profile, Route.whole())
    batches = example_batches(task, batch_size=BATCH_SIZE)
    with RouteChecker(task, batches) as checker:
        return predicted, checker.check(Route.whole()).measured_peak_bytes


GROWS = {
    "in place in a dead branch": partial(Aside, in_place=True),
    "a list of results": partial(Keeping, how="all"),
}
STEADY = {
    "a dead branch": partial(Aside, in_place=False),
    "the last result": partial(Keeping, how="last"),
    "the first result": partial(Keeping, how="first"),
}


@pytest.mark.parametrize("name", GROWS)
def test_it_is_refused_with_the_bytes(name: str) -> None:
    """And with what to change."""
    with pytest.raises(InvalidTask, match=r"grows by \d+ B with each.*y = y \+ x"):
        peaks(task_of(GROWS[name]))


@pytest.mark.every(3)
@pytest.mark.parametrize("name", STEADY)
def test_what_does_not_grow_is_predicted(name: str) -> None:
    """Also what is kept from step to step."""
    predicted, measured = peaks(task_of(STEADY[name]))
    assert predicted == measured


def test_the_stock_loop_grows_too() -> None:
    """PyTorch does not free such a branch, by no collection of garbage either."""
    alive = {}
    for name in ("in place in a dead branch", "a dead branch"):
        model = nn.Sequential(nn.Linear(4, 4), GROWS.get(name, STEADY.get(name))())
        seen: list[weakref.ref[Tensor]] = []
        model[1].norm.register_forward_hook(
            lambda _, __, y, seen=seen: seen.append(weakref.ref(y.untyped_storage()))
        )
        saved = [y for _ in range(3) for y in [model(torch.zeros(4, 4)).sum()]]
        for loss in saved:
            loss.backward()
        del saved, loss
        gc.collect()
        alive[name] = len([ref for ref in seen if ref() is not None])
    assert alive == {"in place in a dead branch": 3, "a dead branch": 0}


def test_unnoticed_it_would_break_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: without the refusal, more is measured than predicted."""
    monkeypatch.setattr(StepLogger, "require_steady_memory", lambda _: None)
    predicted, measured = peaks(task_of(GROWS["in place in a dead branch"]))
    assert predicted < measured
