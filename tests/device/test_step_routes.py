"""A step of progressive training along every kind of route: the stock step's bits.

The truth is torch's own loop over the step's module; that module itself is compared
with one that is written by hand. Peaks are those that are predicted, to the byte.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from flwr_smartsplit import Float16, Integer, RecomputePlan, Route, Task
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.coding import route_profile
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.stages import staged as staged_module
from flwr_smartsplit.types import Rerun, Variant
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from simulations.experiments.models import image_task
from tests.device.test_variant_routes import TASKS, task_of
from tests.models import resnet18
from tests.tasks import BATCH_SIZE, TASK, tiny_cnn

FIRST = Variant("block 1 of 2", proxies=((4, 7),))
MIDDLE = Variant("block 2 of 3", frozen=2, proxies=((5, 7),))
LAST = Variant("block 2 of 2", frozen=4)
STEPS = {each.name: each for each in (FIRST, MIDDLE, LAST)}


def routes_of(size: int) -> list[Route]:
    """List every cut, and a u-shape and hops below and above what is frozen."""
    return [
        Route.whole(),
        *map(Route.split, range(1, size)),
        Route.u_shape(1, 3),
        Route.u_shape(3, size - 1),
        Route.hops((1, 5), edges=("near", "far")),
        Route((2, 4, size - 1), ("device", "near", "far", "device")),
    ]


def checker(task: Task, variant: Variant) -> RouteChecker:
    """Compare with the stock step."""
    batches = example_batches(task, batch_size=BATCH_SIZE)
    return RouteChecker(task, batches, variant=variant)


@pytest.mark.every(4)
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("variant", STEPS.values(), ids=STEPS)
def test_every_route_is_the_stock_step(name: str, variant: Variant) -> None:
    """Loss, gradients, state, evaluation; and the predicted peak, to the byte."""
    task = task_of(name)
    profile = profile_of(task, batch_size=BATCH_SIZE, variant=variant)
    with checker(task, variant) as compared:
        for route in routes_of(len(compared.chain)):
            check = compared.check(route)
            assert check.differences == (), route
            assert check.measured_peak_bytes == predicted_peak_bytes(profile, route)


def by_hand(variant: Variant, model: nn.Sequential) -> nn.Sequential:
    """Write a step of the tiny network as plain torch, with a model's values."""
    layers = list(copy.deepcopy(model))
    for layer in layers[: variant.frozen]:
        layer.requires_grad_(False)
    for start, stop in variant.proxies:
        name = f"proxy.{start}_{stop}.weight"
        values = staged_of(variant, model).state_dict()[name]
        stride = {(4, 7): 3, (5, 7): 1}[start, stop]
        proxy = nn.Conv2d(
            values.shape[1], values.shape[0], 3, stride, padding=1, bias=False
        )
        proxy.weight.data.copy_(values)
        layers = [*layers[:start], proxy, *layers[stop:]]
    return nn.Sequential(*layers)


def staged_of(variant: Variant, model: nn.Module) -> nn.Module:
    """Make the package's module of a step."""
    return build_chain(TASK).narrowed(model, variant)


def trained(model: nn.Module, frozen: int = 0) -> list[torch.Tensor]:
    """Train three steps in torch's own loop; return losses, then what is trained."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.01)
    model.train()
    if isinstance(model, nn.Sequential):
        for layer in list(model)[:frozen]:
            layer.eval()
    torch.manual_seed(5)
    losses = []
    for step in range(3):
        inputs = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(inputs), torch.arange(4) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    sums = sorted(float(w.detach().double().sum()) for w in weights)
    buffers = sorted(float(b.double().sum()) for b in model.buffers())
    return [*losses, torch.tensor(sums), torch.tensor(buffers)]


@pytest.mark.parametrize("variant", STEPS.values(), ids=STEPS)
def test_the_module_of_a_step_is_the_one_written_by_hand(variant: Variant) -> None:
    """Three steps with momentum and weight decay, in every bit."""
    model = tiny_cnn()
    wanted = trained(by_hand(variant, model), variant.frozen)
    found = trained(staged_of(variant, model))
    if variant.proxies:  # Units that it lacks keep their statistics beside it.
        wanted, found = wanted[:-1], found[:-1]
    assert all(map(torch.equal, found, wanted))
    assert len({float(loss) for loss in found[:3]}) == 3


@pytest.mark.parametrize("error", ["bias", "decay", "mode"])
def test_a_wrong_step_is_seen(error: str) -> None:
    """Planted: one value off by little, a frozen weight decays, a BatchNorm moves."""
    model = tiny_cnn()
    right = trained(by_hand(LAST, model), LAST.frozen)
    wrong = by_hand(LAST, model)
    if error == "bias":
        wrong[8].bias.data[0] += 1e-4
    if error == "decay":
        wrong[0].requires_grad_(True)
    frozen = 1 if error == "mode" else LAST.frozen
    assert not all(map(torch.equal, trained(wrong, frozen), right))


@pytest.mark.parametrize("cut", [1, 6])
def test_a_front_in_the_wrong_mode_is_seen(
    cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: the stock step trains in the mode that it is set to."""
    task = task_of("momentum")
    assert build_chain(task).under(LAST).model is not None  # Made before the error
    monkeypatch.setattr(staged_module.Staged, "train", nn.Module.train)
    with checker(task, LAST) as wrong:
        assert wrong.check(Route.split(cut)).differences


@pytest.mark.parametrize("move_to", [1, 3, 6])
def test_a_cut_moves_over_the_frozen_units(move_to: int) -> None:
    """From trained units to frozen ones, which makes the boundary one-way, and back."""
    task = task_of("adam")
    with checker(task, LAST) as compared:
        for start in (2, 5):
            assert compared.check(Route.split(start), move_to=move_to).differences == ()


@pytest.mark.parametrize("variant", STEPS.values(), ids=STEPS)
def test_recomputed_units_change_nothing(variant: Variant) -> None:
    """Behind the frozen ones; the peak is the predicted one."""
    task, route = task_of("momentum"), Route.split(6)
    begin, end = {FIRST.name: (3, 4), MIDDLE.name: (4, 6), LAST.name: (3, 5)}[
        variant.name
    ]
    plan = RecomputePlan((Rerun(begin, end),))
    profile = profile_of(task, batch_size=BATCH_SIZE, variant=variant)
    with checker(task, variant) as compared:
        check = compared.check(route, recompute=(plan, plan))
    assert check.differences == ()
    assert check.measured_peak_bytes == predicted_peak_bytes(profile, route, plan)


@pytest.mark.parametrize("codec", [Float16(), Integer()], ids=str)
@pytest.mark.parametrize("cut", [2, 4, 6])
def test_codecs_act_as_on_the_whole_model(codec: Any, cut: int) -> None:
    """Below, at and above what is frozen, at the predicted peak."""
    task, route = task_of("momentum"), Route.split(cut)
    profile = profile_of(task, batch_size=BATCH_SIZE, variant=LAST)
    with checker(task, LAST) as compared:
        check = compared.check(route, codecs=(codec,))
    assert check.differences == ()
    coded = route_profile(profile, route, (codec,))
    assert check.measured_peak_bytes == predicted_peak_bytes(coded, route)


@pytest.mark.slow
def test_a_residual_network_is_exact_in_each_step() -> None:
    """ResNet-18 in four blocks, at cuts below and above what is frozen."""
    task = replace(image_task(resnet18), example_targets=torch.arange(5))
    ends = (5, 7, 9, 11)
    for at in range(4):
        later = tuple(zip(ends[at:], ends[at + 1 :], strict=False))
        variant = Variant("step", frozen=(0, *ends)[at], proxies=later)
        profile = profile_of(task, batch_size=2, variant=variant)
        batches = example_batches(task, batch_size=2)
        with RouteChecker(task, batches, variant=variant) as compared:
            for cut in {1, variant.frozen, len(compared.chain) - 1} - {0}:
                check = compared.check(Route.split(cut))
                assert check.differences == (), (at, cut)
                peak = predicted_peak_bytes(profile, Route.split(cut))
                assert check.measured_peak_bytes == peak


@pytest.mark.parametrize(
    ("variant", "problem"),
    [
        (Variant("far", frozen=9), "has 9 units"),
        (Variant("flat", proxies=((4, 8),)), r"\(2, 4, 6, 6\) to \(2, 24\)"),
    ],
)
def test_what_is_no_step_of_a_model_is_refused(variant: Variant, problem: str) -> None:
    """With the step, and what it lacks."""
    with pytest.raises(InvalidTask, match=problem):
        build_chain(TASK).under(variant)


def test_what_a_proxy_is_like_follows_from_its_name() -> None:
    """An edge checks what it is sent; no other name is one of the model's."""
    chain = build_chain(TASK)
    names = "proxy.4_7.weight", "proxy.4_8.weight", "proxy.9_12.weight", "other.weight"
    assert chain.kinds_of(names).keys() - chain.kinds.keys() == {names[0]}
    assert chain.kinds_of(names)[names[0]] == ((6, 4, 3, 3), "float32")
    assert chain.kinds_of(["proxy.7_4.weight", "proxy.4_7.bias"]) == chain.kinds
