"""The greedy rule: its plans fit, are needed, and are never better than the optimum."""

from itertools import pairwise
from random import Random

import pytest

from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import (
    cheapest_plan,
    extra_flops,
    least_bytes,
)
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    RecomputePlan,
    Route,
    StepBytes,
    UnitCost,
)
from simulations.studies.memory.greedy import greedy_plan
from tests.models import resnet18, small_cnn, task_of
from tests.tasks import TASK

REAL = {
    "tiny": TASK,
    "small_cnn": task_of(small_cnn),
    "resnet18": task_of(resnet18, shape=(3, 32, 32)),
}


def unit_of(name: str, step: StepBytes, *, peak_bytes: int, flops: int) -> UnitCost:
    """Make a unit without parameters."""
    return UnitCost(
        name=name,
        parameter_bytes=0,
        buffer_bytes=0,
        gradient_bytes=0,
        optimizer_state_bytes=0,
        saved_bytes=step.saved_bytes,
        boundary_bytes=step.output_bytes,
        forward_flops=flops,
        device_peak_bytes=peak_bytes,
        waiting_bytes=0,
        return_bytes=0,
        step=step,
    )


def chain_of_outputs(outputs: list[int], flops: list[int]) -> ChainProfile:
    """Make a chain whose units keep their input and output, and nothing else."""
    units, held = [], 0
    for index, (output, cost) in enumerate(zip(outputs, flops, strict=True)):
        before = outputs[index - 1] if index else 0
        step = StepBytes(
            saved_bytes=output,
            kept_bytes=output,
            forward_peak_bytes=output,
            rerun_peak_bytes=output,
            passing_peak_bytes=output,
            backward_peak_bytes=2 * output + before,
            output_bytes=output,
            gradient_bytes=output,
            arriving_bytes=output,
            rerun_flops=cost,
        )
        peaks = [held + step.forward_peak_bytes, held + step.backward_peak_bytes]
        held += output
        most = max([*peaks, *(unit.device_peak_bytes for unit in units)])
        units.append(unit_of(str(index), step, peak_bytes=most, flops=cost))
    return ChainProfile(batch_size=1, batch_bytes=0, units=tuple(units))


def random_chain(rng: Random) -> ChainProfile:
    """Draw a chain of a few units."""
    size = rng.randint(4, 9)
    outputs = [rng.randint(1, 40) * 100 for _ in range(size)]
    return chain_of_outputs(outputs, [rng.randint(1, 50) for _ in range(size)])


def slack_bytes(profile: ChainProfile, budget_bytes: int) -> int:
    """Bound what the optimum loses by rounding each size up to 1/500 of a budget."""
    return (len(profile.units) + 1) * budget_bytes // 500


def problems(
    profile: ChainProfile, route: Route, found: RecomputePlan | None, budget_bytes: int
) -> list[str]:
    """Say what is wrong with a plan that a rule of thumb made for a budget.

    The optimum is given a little more, as it counts in slots.
    """
    if found is None:
        return []
    peak = predicted_peak_bytes(profile, route, found)
    wrong = [f"{found} needs {peak} of {budget_bytes}"] if peak > budget_bytes else []
    best = cheapest_plan(
        profile, route, budget_bytes + slack_bytes(profile, budget_bytes)
    )
    if best is None:
        return [*wrong, f"{found} fits, and the optimum does not"]
    cost, least = (extra_flops(profile, route, plan) for plan in (found, best))
    if cost < least:
        wrong.append(f"{found} costs {cost} and the optimum {best} costs {least}")
    for part in found.reruns:
        fewer = RecomputePlan(tuple(p for p in found.reruns if p != part))
        if predicted_peak_bytes(profile, route, fewer) <= budget_bytes:
            wrong.append(f"{part} of {found} is not needed")
    return wrong


def budgets_of(profile: ChainProfile, route: Route) -> list[int]:
    """Spread budgets from below what can be done to where all is kept."""
    least, most = least_bytes(profile, route), predicted_peak_bytes(profile, route)
    return [least - 1, *(least + (most - least) * part // 8 for part in range(9))]


@pytest.mark.every(3)
@pytest.mark.parametrize("name", REAL)
def test_on_real_models_it_fits_and_the_optimum_is_never_worse(name: str) -> None:
    """At several cuts and budgets; and it does find plans."""
    task = REAL[name]
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=16, task=task)
    num_plans = 0
    for cut in {len(chain) // 2, len(chain) - 2, len(chain) - 1}:
        route = Route.split(cut)
        for budget in budgets_of(profile, route):
            found = greedy_plan(profile, route, budget_bytes=budget)
            num_plans += found not in (None, KEEP_ALL)
            assert problems(profile, route, found, budget) == []
    assert num_plans or name == "tiny"


def test_on_random_chains_it_fits_and_the_optimum_is_never_worse() -> None:
    """Where sizes have nothing to do with costs."""
    rng, num_plans = Random(0), 0
    for _ in range(40):
        profile = random_chain(rng)
        route = Route.split(len(profile.units) - 1)
        for budget in budgets_of(profile, route):
            found = greedy_plan(profile, route, budget_bytes=budget)
            num_plans += found not in (None, KEEP_ALL)
            assert problems(profile, route, found, budget) == []
    assert num_plans > 40


def test_it_takes_the_bytes_that_cost_least() -> None:
    """Of two units of one size, the cheap one runs twice."""
    outputs = [10, 1000, 10, 1000, 10, 3000, 10]
    profile = chain_of_outputs(outputs, [1, 90, 1, 5, 1, 1, 1])
    route = Route.split(6)
    kept = predicted_peak_bytes(profile, route)
    plan = greedy_plan(profile, route, budget_bytes=kept - 1)
    assert plan is not None
    assert [plan.num_runs(unit) for unit in (1, 3, 5)] == [1, 2, 1]


def test_where_all_fits_nothing_runs_twice_and_where_nothing_does_it_says_so() -> None:
    """The two ends of the budgets."""
    profile = chain_of_outputs([10, 20, 30, 20], [1, 1, 1, 1])
    route = Route.split(3)
    most = predicted_peak_bytes(profile, route)
    assert greedy_plan(profile, route, budget_bytes=most) == KEEP_ALL
    assert greedy_plan(profile, route, budget_bytes=1) is None


def test_a_route_that_comes_back_is_refused() -> None:
    """It plans one segment."""
    profile = chain_of_outputs([10, 20, 30, 20], [1, 1, 1, 1])
    route = Route((1, 3), ("device", "edge", "device"))
    with pytest.raises(ValueError, match="comes back"):
        greedy_plan(profile, route, budget_bytes=10)


def test_less_memory_never_costs_less() -> None:
    """Each budget that is smaller costs as much, or more."""
    task = REAL["resnet18"]
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=16, task=task)
    route = Route.split(8)
    plans = [
        greedy_plan(profile, route, budget_bytes=budget)
        for budget in budgets_of(profile, route)
    ]
    costs = [extra_flops(profile, route, plan) for plan in plans if plan is not None]
    assert all(tight >= loose for tight, loose in pairwise(costs))
    assert costs[0] > costs[-1] == 0


def test_a_plan_that_is_too_large_or_runs_too_much_is_seen() -> None:
    """The check of these tests can fail."""
    profile = chain_of_outputs([10, 1000, 10, 1000, 10, 10], [1, 90, 1, 5, 1, 1])
    route = Route.split(5)
    most = predicted_peak_bytes(profile, route)
    idle = RecomputePlan.from_lists([[[0, 2, []]], []])
    assert problems(profile, route, KEEP_ALL, most - 1)
    assert problems(profile, route, idle, most) == ["[0:2] of [0:2] is not needed"]
