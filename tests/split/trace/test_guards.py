"""What torch.fx would lose without a word is refused, and what it keeps is not."""

import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.models import OPTIMIZERS, task_of


class Middle(nn.Module):
    """Two layers with an operation between them that is given the model."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.between = between
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x).relu()))


def in_context(context: Callable[[], Any], model: Any, x: Tensor) -> Tensor:
    with context():
        return model.second(x)


def counted(model: Any, x: Tensor) -> Tensor:
    model.count += 1
    return x * model.count


def noisy(model: Any, x: Tensor) -> Tensor:
    return x + torch.randn(8) * 0.1


def dropped(model: Any, x: Tensor) -> Tensor:
    return model.second(x) if random.random() < 0.5 else x


def dropped_by_numpy(model: Any, x: Tensor) -> Tensor:
    return model.second(x) if np.random.rand() < 0.5 else x  # noqa: NPY002


def saved_again(model: Any, x: Tensor) -> Tensor:
    return checkpoint(model.second, x, use_reentrant=False)


def saved_reentrantly(model: Any, x: Tensor) -> Tensor:
    return checkpoint(model.second, x, use_reentrant=True)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "no_grad": (partial(in_context, torch.no_grad), "without gradients"),
    "inference": (partial(in_context, torch.inference_mode), "without gradients"),
    "autocast": (
        partial(in_context, partial(torch.autocast, "cpu", dtype=torch.bfloat16)),
        "under autocast",
    ),
    "checkpointing": (saved_again, "under activation checkpointing"),
    "reentrant checkpointing": (saved_reentrantly, "forward runs .* which torch.fx"),
    "noise": (noisy, "draws random numbers"),
    "python's chance": (dropped, "draws random numbers"),
    "numpy's chance": (dropped_by_numpy, "draws random numbers"),
    "a counter": (counted, "its forward changes count"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("between", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_trace_would_lose_is_refused(between, reason):
    """The text says what it is, and what to do."""
    with pytest.raises(NotSplittable, match=reason) as info:
        Chain.from_module(Middle(between), torch.zeros(1, 8))
    assert "Task(units_fn=...)" in str(info.value)


KEPT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "an empty context": partial(in_context, nullcontext),
    "gradients on": partial(in_context, torch.enable_grad),
    "dropout": lambda model, x: functional.dropout(x, 0.5, model.training),
    "a constant": lambda model, x: x + torch.ones(8),
}


@pytest.mark.parametrize("between", KEPT.values(), ids=KEPT)
def test_what_a_trace_keeps_is_not_refused(between):
    """Contexts without effect, chance in operators, and constants."""
    task = task_of(partial(Middle, between), shape=(8,))
    with RouteChecker(task, batches(task)) as checker:
        assert len(checker.chain) > 2
        for cut in range(1, len(checker.chain)):
            assert checker.check(Route.split(cut)).differences == ()


def batches(task: Task) -> Any:
    return example_batches(task, batch_size=3)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10))
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10))
    model.forward = MethodType(lambda self, x: self[1](self[0](x)) * 2, model)
    return model


@pytest.mark.parametrize("model_fn", [hooked, patched])
def test_a_forward_that_is_changed_from_outside_is_refused(model_fn):
    """torch.fx reads the class's forward only."""
    with pytest.raises(NotSplittable, match="by a hook or on the instance"):
        build_chain(task_of(model_fn, shape=(8,)))


# --- sizes and gradients that tracing keeps, but that are easily lost -----------------


class Reshapes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze_(1)


class ReadsLate(nn.Module):
    """Read a number of dimensions after a leaf has changed it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.leaf, self.last = Reshapes(), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        x = self.second(self.leaf(first).relu()).relu()
        return self.last((x * first.dim()).flatten(1))


class NegativeSizes(nn.Module):
    """Carry the -1 of a view, and a negative number, over cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:1] + (-1,)  # noqa: RUF005 - as GPT-2 writes it
        below = x.size(0) - x.size(1)
        x = self.first(x).relu().sigmoid()
        return self.last(x.view(shape) * below)


class HalfSizes(NegativeSizes):
    """Carry a fraction, which is no size."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.size(1) * 0.5
        x = self.first(x).relu().sigmoid()
        return self.last(x * half)


@pytest.mark.parametrize("model_fn", [ReadsLate, NegativeSizes, HalfSizes])
def test_unusual_sizes_are_exact_wherever_a_cut_is_offered(model_fn):
    """In-place reshapes, negative numbers, and fractions."""
    task = task_of(model_fn, optimizer=OPTIMIZERS["adam"], shape=(8,))
    with RouteChecker(task, batches(task)) as checker:
        for cut in range(len(checker.chain)):
            route = Route.split(cut) if cut else Route.whole()
            assert checker.check(route).differences == ()


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).detach())


def test_no_cut_where_no_gradient_comes_back():
    """What is detached later is not trained; there is nothing to send."""
    chain = Chain.from_module(Detached(), torch.zeros(1, 8))
    assert chain.unit_names == ("last",)
    assert chain.refusals["first"].startswith("no gradient comes back to it")


def test_bfloat16_is_refused_before_it_is_sent():
    """Flower's arrays are NumPy's, which has none."""
    task = task_of(lambda: nn.Linear(8, 10).bfloat16(), shape=(8,))
    with pytest.raises(InvalidTask, match="bfloat16, which NumPy does not have"):
        build_chain(task)


@pytest.mark.slow
def test_what_another_thread_draws_is_not_the_models() -> None:
    """Ray and Flower draw from the same generators while a model is read."""
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            random.random()
            stop.wait(0.0005)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(20):
            Chain.from_module(
                nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(1, 4)
            )
    finally:
        stop.set()
        thread.join()
