"""A narrow model along every kind of route: the stock narrow model, bit for bit.

The truth is torch's own loop over a narrow module. Peaks are those that are predicted,
to the byte; costs are found once for all windows of one width.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from flwr_smartsplit import Float16, Integer, Packed, RecomputePlan, Route, Task
from flwr_smartsplit.edge import service
from flwr_smartsplit.edge.regions import cut_state
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.coding import route_profile
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import Rerun, Variant, width_of
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from simulations.experiments.models import image_task
from tests.models import resnet18
from tests.tasks import BATCH_SIZE, TASK, tiny_chain

NEAR, FAR = "near", "far"
NUM_UNITS = len(tiny_chain())
ROUTES = [
    Route.whole(),
    *map(Route.split, range(1, NUM_UNITS)),
    Route.u_shape(3, 7),
    Route.hops((1, 5), edges=(NEAR, FAR)),
    Route((2, 4, 7), ("device", NEAR, FAR, "device")),
]
TASKS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "clipped": {"max_gradient_norm": 0.3},
    "accumulated": {"accumulate": 2},
    "adam": {"optimizer_fn": partial(torch.optim.Adam, lr=0.01)},
}


def no_norms() -> nn.Sequential:
    """Build a model whose outputs are scaled, since nothing normalises them."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 3),
    )


def task_of(name: str) -> Task:
    """Make the task with one thing more."""
    return replace(TASK, example_targets=torch.arange(3), **TASKS[name])


def at(task: Task, rate: float, *, shift: int = 1, is_scaled: bool = True) -> Variant:
    """Make a width of a task's model, with the channels from one of them on."""
    groups = build_chain(task).channels.groups
    return width_of(groups, rate, shift=shift, is_scaled=is_scaled)


def checker(task: Task, variant: Variant) -> RouteChecker:
    """Compare with the stock narrow model."""
    batches = example_batches(task, batch_size=BATCH_SIZE)
    return RouteChecker(task, batches, variant=variant)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("rate", [0.5, 0.25])
def test_every_route_is_the_stock_narrow_step(name: str, rate: float) -> None:
    """Loss, gradients, state, evaluation; and the predicted peak, to the byte."""
    task = task_of(name)
    variant = at(task, rate)
    profile = profile_of(task, batch_size=BATCH_SIZE, variant=variant)
    with checker(task, variant) as compared:
        for route in ROUTES:
            check = compared.check(route)
            assert check.differences == (), route
            assert check.measured_peak_bytes == predicted_peak_bytes(profile, route)


def test_scaled_outputs_are_the_same_on_every_route() -> None:
    """HeteroFL's scaler is a part of the narrow module, wherever it runs."""
    task = replace(task_of("momentum"), model_fn=no_norms)
    variant = at(task, 0.5)
    profile = profile_of(task, batch_size=BATCH_SIZE, variant=variant)
    with checker(task, variant) as compared:
        for route in (Route.whole(), *map(Route.split, range(1, 5))):
            check = compared.check(route)
            assert check.differences == (), route
            assert check.measured_peak_bytes == predicted_peak_bytes(profile, route)
        plan, route = RecomputePlan((Rerun(0, 2),)), Route.split(4)
        check = compared.check(route, recompute=(plan, plan))
    assert check.differences == ()
    assert check.measured_peak_bytes == predicted_peak_bytes(profile, route, plan)


@pytest.mark.parametrize("move_to", [2, 6])
def test_a_moved_cut_and_recomputed_units_change_nothing(move_to: int) -> None:
    """Between two steps of a narrow round."""
    task = task_of("adam")
    variant, route, plan = at(task, 0.5), Route.split(4), RecomputePlan((Rerun(0, 3),))
    profile = profile_of(task, batch_size=BATCH_SIZE, variant=variant)
    with checker(task, variant) as compared:
        assert compared.check(route, move_to=move_to).differences == ()
        check = compared.check(route, recompute=(plan, plan))
    assert check.differences == ()
    assert check.measured_peak_bytes == predicted_peak_bytes(profile, route, plan)


@pytest.mark.parametrize("codec", [Float16(), Integer(), Packed()], ids=str)
def test_codecs_act_as_on_the_whole_model(codec: Any) -> None:
    """On a boundary with fewer channels, and at the predicted peak."""
    task = task_of("momentum")
    variant, route = at(task, 0.5), Route.split(4)
    profile = profile_of(task, batch_size=BATCH_SIZE, variant=variant)
    with checker(task, variant) as compared:
        check = compared.check(route, codecs=(codec,))
    coded = route_profile(profile, route, (codec,))
    assert check.differences == ()
    predicted = predicted_peak_bytes(coded, route)
    if codec == Packed():  # What it saves depends on the values.
        assert check.measured_peak_bytes <= predicted
    else:
        assert check.measured_peak_bytes == predicted


def test_another_slice_at_the_edge_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: the edge takes the first channels, the device the later."""
    task = task_of("momentum")
    first = build_chain(task).regions(at(task, 0.5, shift=0))
    monkeypatch.setattr(service, "cut_state", lambda state, _: cut_state(state, first))
    with checker(task, at(task, 0.5)) as compared:
        assert compared.check(Route.whole()).differences == ()
        assert compared.check(Route.split(4)).differences


def test_a_residual_network_is_exact_along_its_cuts() -> None:
    """ResNet-18 at a quarter of its width."""
    task = image_task(resnet18)
    task = replace(task, example_targets=torch.arange(5))
    variant = at(task, 0.25, shift=3)
    profile = profile_of(task, batch_size=4, variant=variant)
    routes = [Route.whole(), Route.split(2), Route.split(7)]
    batches = example_batches(task, batch_size=4)[:2]
    with RouteChecker(task, batches, variant=variant) as compared:
        for route in routes:
            check = compared.check(route)
            assert check.differences == (), route
            assert check.measured_peak_bytes == predicted_peak_bytes(profile, route)


def test_windows_of_one_width_cost_the_same() -> None:
    """So a round whose windows have moved needs no other dry run."""
    task = task_of("momentum")
    profiles = [
        profile_of(task, batch_size=BATCH_SIZE, variant=at(task, 0.5, shift=shift))
        for shift in range(3)
    ]
    assert profiles[0] is profiles[1] is profiles[2]
    assert profiles[0] is not profile_of(task, batch_size=BATCH_SIZE)
