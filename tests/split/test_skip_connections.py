"""Cuts that several tensors cross: skip connections, exact at every place."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Segment
from flwr_smartsplit.task import Task
from flwr_smartsplit.train import segment_runner
from flwr_smartsplit.train.optimizer_in_backward import GradientEntry
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.models import (
    OPTIMIZERS,
    densenet,
    frozen_unet,
    residual_blocks,
    seeded,
    task_of,
    unet,
)
from tests.slow_cases import daily

MANY, NUM_BATCHES = 16, 3
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "unet": (unet, 7, 16),
    "frozen unet": (frozen_unet, 7, 18),
    "densenet": (densenet, 8, 23),
    "residual blocks": (residual_blocks, 5, 13),
}
"""Each model with its number of units if one tensor may cross, and if many may."""


def task_with(name: str, optimizer: str = "sgd") -> Task:
    """Make the task of one of the models, cut wherever that is possible."""
    task = task_of(
        MODELS[name][0],
        optimizer=OPTIMIZERS[optimizer],
        max_boundary_tensors=MANY,
    )
    return replace(task, example_targets=torch.arange(10))


def checker_of(task: Task) -> RouteChecker:
    """Compare routes of a task with the stock model."""
    return RouteChecker(task, example_batches(task, batch_size=3))


@pytest.mark.parametrize("name", MODELS)
def test_more_tensors_give_more_cuts_and_keep_those_there_were(name):
    """With one tensor, the chain is what it is by default."""
    model_fn, few, many = MODELS[name]
    inputs = torch.zeros(1, 3, 12, 12)
    default = Chain.from_module(model_fn(), inputs)
    wide = Chain.from_module(model_fn(), inputs, max_boundary_tensors=MANY)
    assert (len(default), len(wide)) == (few, many)
    assert max(len(unit.gradients) for unit in default.units) == 1
    assert max(len(unit.gradients) for unit in wide.units) > 1
    assert set(default.unit_names[:-1]) <= set(wide.unit_names)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("name", "optimizer"),
    daily(lambda _, optimizer: optimizer == "adam", product(MODELS, OPTIMIZERS)),
)
def test_every_cut_is_exact(name, optimizer):
    """Over the wire: gradients, losses, buffers and states are the stock model's."""
    with checker_of(task_with(name, optimizer)) as checker:
        cuts = range(1, len(checker.chain))
        found = {cut: checker.check(Route.split(cut)).differences for cut in cuts}
    assert found == dict.fromkeys(cuts, ())


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MODELS)
def test_routes_of_several_segments_are_exact(name):
    """A tensor may pass a segment that does nothing with it, or a little."""
    with checker_of(task_with(name, "momentum")) as checker:
        size = len(checker.chain)
        for first in range(2, size - 2, 5):
            for last in (first + 1, (first + size) // 2):
                hops = Route.hops((first, last), edges=("a", "b"))
                for route in (Route.u_shape(first, last), hops):
                    assert checker.check(route).differences == (), str(route)


# --- planted errors -------------------------------------------------------------------


class AddedLast(GradientEntry):
    """Add what comes over the wire to what is there, instead of the reverse."""

    def __init__(self, boundary: list[Tensor]) -> None:
        super().__init__(boundary)
        self.late: list[Tensor] = []
        for index, tensor in enumerate(boundary[:-1]):
            tensor.register_hook(lambda g, index=index: g + self.late[index])

    def backward(self, receive: Callable[[], tuple[Tensor, ...]]) -> None:
        self.late = list(receive())
        first = (*map(torch.zeros_like, self.late[:-1]), self.late[-1])
        super().backward(lambda: first)


def test_a_sum_in_another_order_would_be_seen(monkeypatch):
    """Three terms or more: the far side's sum comes first, as autograd runs back."""
    monkeypatch.setattr(segment_runner, "GradientEntry", AddedLast)
    with checker_of(task_with("densenet")) as checker:
        names = checker.chain.unit_names
        cut = names.index("features.denseblock1.denselayer3.conv1") + 1
        assert sum(checker.chain.units[cut - 1].gradients) > 2
        assert checker.check(Route.split(cut)).differences


def test_a_flag_that_is_wrong_would_be_seen(monkeypatch):
    """A skip connection without its gradient trains the front wrongly."""
    init = Segment.__init__

    def forgetful(self, units, start, source, odd_modes=None, entering=()):
        entering = (False, *entering[1:]) if len(entering) > 1 else entering
        init(self, units, start, source, odd_modes, entering)

    with checker_of(task_with("unet")) as checker:
        flags = [unit.gradients for unit in checker.chain.units]
        cut = flags.index((True, True)) + 1
        assert not checker.check(Route.split(cut)).differences
        monkeypatch.setattr(Segment, "__init__", forgetful)
        assert checker.check(Route.split(cut)).differences


# --- one way --------------------------------------------------------------------------


def replies_to(checker: RouteChecker, route: Route, monkeypatch) -> list[wire.Stepped]:
    """Check a route and return what the edge answered to its steps."""
    replies: list[wire.Stepped] = []
    send = wire.LocalTransport.send

    def spy(self: wire.LocalTransport, request: object) -> object:
        reply = send(self, request)
        if isinstance(reply, wire.Stepped):
            replies.append(reply)
        return reply

    monkeypatch.setattr(wire.LocalTransport, "send", spy)
    assert checker.check(route).differences == ()
    return replies


def test_nothing_comes_back_for_a_frozen_front(monkeypatch):
    """Neither gradients nor, but for what a BatchNorm counts, a changed state."""
    with checker_of(task_with("frozen unet")) as checker:
        flags = [unit.gradients for unit in checker.chain.units]
        first = next(i for i, each in enumerate(flags) if any(each))
        trained = replies_to(checker, Route.split(first + 1), monkeypatch)
        frozen = replies_to(checker, Route.split(first), monkeypatch)
        changed = checker.chain.changed_names(0, first)
    assert sum(bool(reply.gradients) for reply in trained) == NUM_BATCHES
    assert not any(reply.gradients for reply in frozen)
    assert {name.rpartition(".")[2] for name in changed} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_what_cannot_change_is_not_named():
    """A frozen layer stays as it is; without a BatchNorm nothing of a front changes."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    model[0].requires_grad_(False)
    chain = Chain.from_module(model, torch.zeros(1, 4))
    assert chain.changed_names(0, 1) == ()
    assert chain.changed_names(0, 2) == ("1.weight", "1.bias")


def matrices_only(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build an optimizer that leaves all else as it is, as Muon's authors advise."""
    return torch.optim.SGD([p for p in parameters if p.ndim > 1], lr=0.1)


def norm_first() -> nn.Module:
    """Begin with a layer that has no matrix."""
    return seeded(lambda: nn.Sequential(nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 10)))


def test_an_optimizer_may_take_none_of_a_segments_parameters():
    """Then nothing is stepped there, and nobody frees the gradients, as in stock."""
    task = task_of(norm_first, optimizer=matrices_only, shape=(4,))
    profile = profile_chain(build_chain(task), batch_size=3, task=task)
    first = profile.units[0]
    assert first.optimizer_state_bytes == first.gradient_bytes
    with checker_of(replace(task, example_targets=torch.arange(10))) as checker:
        for cut in range(1, len(checker.chain)):
            assert checker.check(Route.split(cut)).differences == ()


# --- refused --------------------------------------------------------------------------


class Reads(nn.Module):
    """Compute something of two layers' outputs that is not cut between them."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(x, self.first(x)))


@pytest.mark.parametrize(
    ("operation", "place", "reason"),
    [
        (lambda x, y: y.relu() * x, "relu", "the input x is needed after it, and must"),
        (lambda x, y: y + y.relu(), "relu", "add alone uses first and relu"),
        (
            lambda x, y: torch.cat([y, y.tanh().view(-1, 4)], 1)[:, :4],
            "tanh",
            "cat alone uses first and tanh",
        ),
        (lambda x, y: y.tanh() + y.relu_(), "tanh", "relu_ writes into it"),
    ],
    ids=["input", "sum", "view", "in place"],
)
def test_places_where_something_would_not_be_exact_are_refused(
    operation, place, reason
):
    """The raw input stays on the device; gradients do not share memory on the wire."""
    chain = Chain.from_module(
        Reads(operation), torch.zeros(1, 4), max_boundary_tensors=2
    )
    assert reason in chain.refusals[place]


def test_a_boundary_has_at_least_one_tensor():
    """The error names the number."""
    with pytest.raises(ValueError, match="max_boundary_tensors is 0"):
        task_of(unet, max_boundary_tensors=0)
