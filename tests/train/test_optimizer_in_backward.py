"""The lean step: nothing is held that need not be, and every number stays the same."""

from functools import partial, wraps

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.task import Task
from flwr_smartsplit.train import optimizer_in_backward as lean
from flwr_smartsplit.train.fedprox import proximal
from flwr_smartsplit.train.optimizer_in_backward import (
    GradientEntry,
    GradientExit,
    bare_step,
    one_by_one,
    stepped_in_backward,
    stepping_in_backward,
    steps_one_by_one,
)
from flwr_smartsplit.train.segment_runner import SegmentRunner
from tests.models import batches_of, seeded, task_of
from tests.tasks import differences

WIDE, SHAPE = 96, (48,)
LAYER_BYTES = 4 * WIDE * WIDE

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
    "radam": partial(torch.optim.RAdam, lr=0.01),
    "adamax": partial(torch.optim.Adamax, lr=0.01),
    "adadelta": partial(torch.optim.Adadelta, lr=0.5),
    "adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, centered=True, momentum=0.5),
    "asgd": partial(torch.optim.ASGD, lr=0.1),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
    "proximal": partial(
        proximal, optimizer_fn=partial(torch.optim.SGD, lr=0.1), mu=0.1
    ),
}


class Shared(nn.Module):
    """Wide layers, one of which is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(*SHAPE, WIDE)
        self.middle = nn.Linear(WIDE, WIDE)
        self.last = nn.Linear(WIDE, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x).tanh()).tanh()
        return self.last(self.middle(x).tanh())


def deep() -> nn.Module:
    """Build four wide layers in a row."""
    return nn.Sequential(*(nn.Linear(WIDE, WIDE) for _ in range(4)))


def task_with(optimizer_fn: object, **changes: object) -> Task:
    """Make the wide network's task."""
    task = task_of(partial(seeded, Shared), optimizer=optimizer_fn, shape=SHAPE)
    for name, value in changes.items():
        object.__setattr__(task, name, value)
    return task


def trained(
    task: Task, *, steps_in_backward: bool
) -> tuple[dict[str, object], SegmentRunner]:
    """Train a few steps on the whole network."""
    chain = build_chain(task)
    segment = materialise(chain, 0, len(chain), state_of(task.model_fn()))
    runner = SegmentRunner(segment, task, steps_in_backward=steps_in_backward)
    for step, (inputs, targets) in enumerate(batches_of(4, 6, shape=SHAPE)):
        runner.finish(inputs, targets, step=step, inputs_are_boundary=False)
    return state_of(segment), runner


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_inside_backward_are_the_same_to_the_bit(name):
    """For each optimizer that may do so, also where a layer is used twice."""
    task = task_with(OPTIMIZERS[name])
    late, plain = trained(task, steps_in_backward=False)
    early, lean_one = trained(task, steps_in_backward=True)
    assert (plain.steps_in_backward, lean_one.steps_in_backward) == (False, True)
    assert differences(early, late) == []


def test_several_groups_keep_their_own_settings():
    """A parameter is stepped with its own group's rate."""

    def grouped(parameters: object) -> torch.optim.Optimizer:
        large, small = [], []
        for parameter in parameters:
            (large if parameter.dim() > 1 else small).append(parameter)
        groups = [{"params": large, "lr": 0.1}, {"params": small, "lr": 0.5}]
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)

    task = task_with(grouped)
    assert (
        differences(
            trained(task, steps_in_backward=True)[0],
            trained(task, steps_in_backward=False)[0],
        )
        == []
    )


def test_a_schedule_is_stepped_once_per_step():
    """The rate does not fall faster because there are more updates."""

    def halved(optimizer: torch.optim.Optimizer, config: object) -> object:
        del config
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    task = task_with(OPTIMIZERS["momentum"], schedule_fn=halved)
    assert (
        differences(
            trained(task, steps_in_backward=True)[0],
            trained(task, steps_in_backward=False)[0],
        )
        == []
    )


def test_an_optimizer_that_does_more_is_asked_as_in_the_stock_loop():
    """Only torch's own record of a step is left out, and only its own ``zero_grad``."""
    torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)  # Torch wraps SGD's step.

    class Own(torch.optim.SGD):
        num_steps = num_freed = 0

        @wraps(torch.optim.SGD.step)  # Torch now believes that it wrapped this one.
        def step(self, closure: object = None) -> None:
            self.num_steps += 1
            super().step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.num_freed += 1
            super().zero_grad(set_to_none)

    _, runner = trained(task_with(partial(Own, lr=0.1)), steps_in_backward=False)
    assert (runner.optimizer.num_steps, runner.optimizer.num_freed) == (4, 4)


def test_a_step_that_somebody_wrapped_stays_wrapped():
    """On one optimizer, as a scheduler does; by a hook; or nobody."""
    plain, wrapped, hooked = (
        torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1) for _ in range(3)
    )
    assert bare_step(plain) != plain.step
    wrapped.step = lambda: None
    assert bare_step(wrapped) is wrapped.step
    hooked.register_step_pre_hook(lambda *_: None)
    assert bare_step(hooked) == hooked.step


@pytest.mark.parametrize(
    "optimizer_fn",
    [
        partial(torch.optim.SGD, lr=0.1, foreach=True),
        partial(torch.optim.LBFGS, lr=0.1),
        type("Mine", (torch.optim.SGD,), {}),
    ],
)
def test_optimizers_that_nobody_knows_wait_for_all_gradients(optimizer_fn):
    """Such as those that step all parameters at once."""
    assert not steps_one_by_one(optimizer_fn([nn.Parameter(torch.ones(2))]))


def test_hooks_that_nobody_knows_wait_too():
    """A hook may look at all gradients."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.register_step_pre_hook(one_by_one(lambda *_: None))
    assert steps_one_by_one(optimizer)
    optimizer.register_step_pre_hook(lambda *_: None)
    assert not steps_one_by_one(optimizer)


def test_gradients_that_are_clipped_together_wait():
    """Their common norm is known when all of them are."""
    task = task_with(OPTIMIZERS["sgd"], max_gradient_norm=1.0)
    assert not trained(task, steps_in_backward=True)[1].steps_in_backward


def test_large_gradients_are_gone_after_backward():
    """Small ones wait for the end, since each update costs time."""
    model = seeded(Shared)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with stepping_in_backward(optimizer):
        model(torch.ones(2, *SHAPE)).sum().backward()
    large = stepped_in_backward(model.parameters())
    assert [parameter.shape for parameter in large] == [(WIDE, *SHAPE), (WIDE, WIDE)]
    gone = [parameter for parameter in model.parameters() if parameter.grad is None]
    assert [id(parameter) for parameter in gone] == [id(p) for p in large]
    before = [parameter.clone() for parameter in large]
    model(torch.ones(2, *SHAPE)).sum().backward()
    assert all(map(torch.equal, before, large)), "the hooks are still there"


def test_a_lean_step_holds_one_large_gradient_at_a_time(monkeypatch):
    """Planted: with a limit that nothing reaches, all of them are held."""

    def peak() -> int:
        model, meter = seeded(deep), MemoryMeter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        meter.track(model)
        with meter, stepping_in_backward(optimizer):
            model(torch.ones(1, WIDE)).sum().backward()
        return meter.peak_bytes

    lean_peak = peak()
    monkeypatch.setattr(lean, "LEAST_EARLY_BYTES", 2**40)
    assert peak() > lean_peak + 2 * LAYER_BYTES


def test_a_boundarys_gradient_goes_out_as_it_was_made():
    """The same storage, also where several users add to it: nothing copies it."""
    caught: list[Tensor] = []
    boundary, trigger = torch.randn(3, 4), torch.empty(0, requires_grad=True)
    (inside,) = GradientExit.apply(trigger, caught, boundary)
    seen: list[int] = []
    inside.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    (inside * 2 + inside.tanh()).sum().backward()
    (gradient,) = caught
    assert gradient.data_ptr() == seen[0]
    assert torch.allclose(gradient, 2 + 1 - boundary.tanh() ** 2)
    assert trigger.grad is None


def test_a_tensor_that_nobody_uses_has_no_gradient():
    """An empty tensor goes over the wire for it, and none arrives."""
    caught: list[Tensor] = []
    used, unused = torch.randn(3), torch.randn(3)
    trigger = torch.empty(0, requires_grad=True)
    inside, _ = GradientExit.apply(trigger, caught, used, unused)
    inside.sum().backward()
    assert [gradient.numel() for gradient in caught] == [3, 0]
    fronts = [torch.ones(3, requires_grad=True) for _ in range(2)]
    boundary = [front * 2 for front in fronts]
    GradientEntry(boundary).backward(lambda: tuple(caught))
    assert torch.equal(fronts[0].grad, torch.full((3,), 2.0))
    assert fronts[1].grad is None
