"""plan_recompute on real costs: within the budget, never worse with more memory."""

from dataclasses import replace
from functools import cache, partial
from itertools import combinations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_smartsplit import (
    RecomputePlan,
    Route,
    plan_recompute,
    predicted_peak_bytes,
    profile_chain,
)
from flwr_smartsplit.errors import InvalidPlan, NoFeasiblePlan
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.plan.checkpointing import plan as plan_module
from flwr_smartsplit.plan.checkpointing.plan import (
    cheapest_plan,
    extra_flops,
    floor_bytes,
    least_bytes,
)
from flwr_smartsplit.plan.checkpointing.stages import stages_of
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.types import KEEP_ALL, ChainProfile, Leg, Rerun
from tests.models import OPTIMIZERS, batches_of, small_cnn, task_of, unet

BATCH_SIZE = 4
SHAPE = (3, 32, 32)


class Positioned(torch.nn.Module):
    """Layers that all use a table, which the first unit makes of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        layers = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.layers, self.last = torch.nn.ModuleList(layers), torch.nn.Linear(3, 10)

    def forward(self, images):
        table = torch.cos(images)
        for layer in self.layers:
            images = torch.tanh(layer(images)) + table
        return self.last(images.mean((2, 3)))


MODELS = {
    "small": small_cnn,
    "unet": unet,
    "a table for all": Positioned,
    "squeezenet1_1": torchvision.models.squeezenet1_1,
    "shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
}
MANY_UNITS = 40
SEVERAL = {"unet": 8, "a table for all": 2}
"""How many tensors may cross a cut, where it is more than one."""

MOST_ABOVE = {name: 1.15 if name in SEVERAL else 1.05 for name in MODELS}
"""A prediction may be so much too high, and never too low."""


@cache
def made(name: str) -> tuple[Task, ChainProfile]:
    """Make a model's task and find its costs."""
    momentum = OPTIMIZERS["momentum"]
    task = task_of(
        MODELS[name],
        optimizer=momentum,
        shape=SHAPE,
        max_boundary_tensors=SEVERAL.get(name, 1),
    )
    return task, profile_chain(build_chain(task), batch_size=BATCH_SIZE, task=task)


def routes_of(name: str) -> list[Route]:
    """Choose the whole model if it is short, and cuts within it."""
    if name in SEVERAL:
        return [Route.whole()]
    size = len(made(name)[1].units)
    cuts = [Route.split(size * 6 // 10), Route.split(size * 3 // 10)]
    return cuts if size > MANY_UNITS else [Route.whole(), *cuts]


def measured_bytes(task: Task, route: Route, plan: RecomputePlan) -> int:
    """Do two real steps of a device's only segment, and return the peak."""
    chain = build_chain(task)
    leg = route.device_legs(len(chain))[0]
    segment = materialise(chain, leg.start, leg.stop, state_of(task.model_fn()))
    runner = SegmentRunner(
        segment, task, streams=UnitStreams(0, 1, "a"), steps_in_backward=True
    )
    runner.recompute = plan
    meter = MemoryMeter()
    for step, (inputs, targets) in enumerate(batches_of(2, BATCH_SIZE, shape=SHAPE)):
        meter.track(segment, runner.optimizer, inputs, targets)
        with meter:
            if leg.stop == len(chain):
                runner.finish(inputs, targets, step=step, inputs_are_boundary=False)
            else:
                sent = runner.forward(inputs, step=step, inputs_are_boundary=False)
                make = partial(torch.empty_strided, sent[0].shape, sent[0].stride())
                del sent
                runner.backward(lambda make=make: (make(),))
        meter.forget(inputs, targets)
    return meter.peak_bytes


def budgets_between(profile: ChainProfile, route: Route) -> list[int]:
    """Spread budgets from the least that does to all that could be used."""
    least, most = least_bytes(profile, route), predicted_peak_bytes(profile, route)
    return [least + (most - least) * part // 4 for part in range(5)]


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "shuffle" in name else [])
        for name in MODELS
    ],
)
def test_a_plan_holds_what_was_predicted(name):
    """Never more, and at most a twentieth less; within the budget in any case."""
    task, profile = made(name)
    for route in routes_of(name):
        for budget in budgets_between(profile, route):
            plan = plan_recompute(profile, route, budget_bytes=budget)
            predicted = predicted_peak_bytes(profile, route, plan)
            measured = measured_bytes(task, route, plan)
            assert measured <= predicted <= budget, (route, plan)
            assert predicted <= measured * MOST_ABOVE[name], (route, plan)


def test_what_later_units_use_is_held_while_a_unit_runs_again():
    """A plan that reruns all units counts their context; a planted 0 is less."""
    task, profile = made("a table for all")
    units = [replace(u, step=replace(u.step, context_bytes=0)) for u in profile.units]
    wrong = replace(profile, units=tuple(units))
    stages = stages_of(profile, Leg("device", 0, len(units)))
    plan = RecomputePlan(tuple(Rerun(s.start, s.stop) for s in stages if s.can_rerun))
    predicted = predicted_peak_bytes(profile, Route.whole(), plan)
    assert measured_bytes(task, Route.whole(), plan) <= predicted
    assert predicted_peak_bytes(wrong, Route.whole(), plan) < predicted


def test_a_prediction_that_forgets_a_gradient_is_too_low():
    """The comparison above would see it."""
    task, profile = made("squeezenet1_1")
    units = []
    for unit in profile.units:
        less = unit.step.backward_peak_bytes - unit.step.gradient_bytes
        units.append(replace(unit, step=replace(unit.step, backward_peak_bytes=less)))
    wrong = replace(profile, units=tuple(units))
    route, plan = Route.split(12), RecomputePlan((Rerun(0, 3),))
    predicted = predicted_peak_bytes(wrong, route, plan)
    assert predicted < measured_bytes(task, route, plan)


@pytest.mark.parametrize("name", ["squeezenet1_1", "small"])
def test_more_memory_never_gives_a_worse_plan(name):
    """Extra work falls as the budget grows, down to none."""
    _, profile = made(name)
    for route in routes_of(name):
        plans = [
            plan_recompute(profile, route, budget_bytes=budget)
            for budget in budgets_between(profile, route)
        ]
        extra = [extra_flops(profile, route, plan) for plan in plans]
        assert extra == sorted(extra, reverse=True)
        assert plans[-1] == KEEP_ALL


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3 * 2**20), st.integers(1, 23))
def test_any_budget_gives_a_plan_within_it_or_a_refusal(budget, cut):
    """And the refusal says what would do, and that does."""
    _, profile = made("squeezenet1_1")
    route = Route.split(cut)
    try:
        plan = plan_recompute(profile, route, budget_bytes=budget)
    except NoFeasiblePlan as error:
        assert error.budget_bytes == budget < error.needed_bytes
        found = plan_recompute(profile, route, budget_bytes=error.needed_bytes)
        assert predicted_peak_bytes(profile, route, found) == error.needed_bytes
        assert floor_bytes(profile, route) > budget or least_bytes(profile, route)
    else:
        assert predicted_peak_bytes(profile, route, plan) <= budget


def test_a_refusal_names_the_nearest_route_that_fits():
    """An earlier cut, at which a plan of the budget exists."""
    _, profile = made("squeezenet1_1")
    budget = least_bytes(profile, Route.split(4))
    with pytest.raises(NoFeasiblePlan, match="nearest route that fits is device") as e:
        plan_recompute(profile, Route.whole(), budget_bytes=budget)
    assert cheapest_plan(profile, e.value.route, budget) is not None
    with pytest.raises(NoFeasiblePlan, match="lower the batch size"):
        plan_recompute(profile, Route.whole(), budget_bytes=0)


def test_both_segments_of_a_route_that_returns_are_planned():
    """What waits and what comes back share the budget."""
    _, profile = made("squeezenet1_1")
    route = Route.u_shape(8, 16)
    most, least = predicted_peak_bytes(profile, route), least_bytes(profile, route)
    assert least < most
    plan = plan_recompute(profile, route, budget_bytes=(least + most) // 2)
    assert predicted_peak_bytes(profile, route, plan) <= (least + most) // 2
    assert not plan.is_empty


@pytest.mark.parametrize("budget", [-1, float("nan"), "64MiB", True, None])
def test_what_is_no_budget_is_refused(budget):
    """With what it is and what to give."""
    _, profile = made("small")
    with pytest.raises(ValueError, match="give a whole number of bytes"):
        plan_recompute(profile, Route.whole(), budget_bytes=budget)


def test_a_plan_that_is_not_this_routes_is_refused():
    """Parts at the edge, across a cut, or where nothing is kept to start from."""
    _, profile = made("small")
    for part, problem in [
        (Rerun(9, 11), "do not run on the device"),
        (Rerun(7, 10), "lies across an end"),
        (Rerun(4, 6), "where nothing is kept"),
    ]:
        with pytest.raises(InvalidPlan, match=problem):
            predicted_peak_bytes(profile, Route.split(8), RecomputePlan((part,)))


class Counting(torch.nn.Module):
    """A layer that keeps a mean of what it saw, so it must not run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, values):
        if self.training:
            self.mean.mul_(0.9).add_(values.detach().mean(0), alpha=0.1)
        return torch.tanh(values - self.mean)


def counting(place: int) -> torch.nn.Module:
    """Put one such layer somewhere."""
    layers = [torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32)]
    layers += [torch.nn.Tanh(), torch.nn.Linear(32, 10)]
    layers.insert(place, Counting())
    return torch.nn.Sequential(*layers)


def normed() -> torch.nn.Module:
    """Normalise a weight, whose estimate changes with each run."""
    model = counting(5)[:5]
    torch.nn.utils.parametrizations.spectral_norm(model[0])
    return model


ONCE = {f"a mean at {place}": partial(counting, place) for place in range(5)}
ONCE["a spectral norm"] = normed


def planned_everywhere(name: str) -> None:
    """Plan every route that comes back, for budgets from the least to the most."""
    task = task_of(ONCE[name], optimizer=OPTIMIZERS["momentum"], shape=(32,))
    profile = profile_chain(build_chain(task), batch_size=8, task=task)
    size = len(profile.units)
    assert any(not unit.step.can_rerun for unit in profile.units)
    for first, last in combinations(range(1, size), 2):
        route = Route.u_shape(first, last)
        for budget in budgets_between(profile, route):
            plan = plan_recompute(profile, route, budget_bytes=budget)
            assert predicted_peak_bytes(profile, route, plan) <= budget


@pytest.mark.parametrize("name", ONCE)
def test_routes_that_come_back_are_planned_around_units_that_run_once(name):
    planned_everywhere(name)


def test_a_plan_that_reruns_such_a_unit_would_be_seen(monkeypatch):
    """Planted: the whole front runs again, whatever is in it."""
    monkeypatch.setattr(plan_module._Segments, "head_can_rerun", True)
    plan_module._plan_of_least_memory.cache_clear()
    with pytest.raises(InvalidPlan, match="must not run twice"):
        planned_everywhere("a mean at 0")
    plan_module._plan_of_least_memory.cache_clear()
