"""What less memory costs: plans of one cut under the optimum and two simpler rules."""

from collections.abc import Iterator
from itertools import pairwise

from flwr_smartsplit import Route, predicted_peak_bytes
from flwr_smartsplit.errors import InvalidPlan
from flwr_smartsplit.plan.checkpointing.plan import (
    cheapest_plan,
    extra_flops,
    least_bytes,
)
from flwr_smartsplit.plan.checkpointing.stages import stages_of
from flwr_smartsplit.types import ChainProfile, RecomputePlan, Rerun
from simulations.studies.memory.greedy import greedy_plan

NUM_BUDGETS = 16
PROGRAMME, GREEDY, SEQUENTIAL = (
    "dynamic programme",
    "greedy rule",
    "checkpoint_sequential",
)

Point = tuple[int, float]
"""Predicted peak in bytes, and what it adds to the model's forward FLOPs."""


def plan_curves(profile: ChainProfile, cut: int) -> dict[str, list[Point]]:
    """Compare what each rule adds to a forward for which peak, at one cut.

    Returns
    -------
    dict[str, list[tuple[int, float]]]
        For each rule: predicted peaks in bytes, and the extra FLOPs of that plan as a
        fraction of the whole model's forward. A budget that a rule finds no plan for
        has no point.
    """
    route = Route.split(cut)
    total = max(1, sum(unit.forward_flops for unit in profile.units))

    def points(plans: Iterator[RecomputePlan | None]) -> list[Point]:
        found = {
            (
                predicted_peak_bytes(profile, route, plan),
                extra_flops(profile, route, plan) / total,
            )
            for plan in plans
            if plan is not None
        }
        return sorted(found)

    limits = budgets(profile, route)
    others = {
        GREEDY: points(
            greedy_plan(profile, route, budget_bytes=limit) for limit in limits
        ),
        SEQUENTIAL: points(sequential_plans(profile, route)),
    }
    # At the others' own peaks, too: between two budgets it would look worse.
    reached = {peak for own in others.values() for peak, _ in own}
    limits = sorted({*limits, *(peak for peak in reached if peak <= limits[-1])})
    plans = (cheapest_plan(profile, route, limit) for limit in limits)
    return {PROGRAMME: points(plans), **others}


def budgets(profile: ChainProfile, route: Route) -> list[int]:
    """Spread budgets evenly from the least that does to where all is kept."""
    least, most = least_bytes(profile, route), predicted_peak_bytes(profile, route)
    steps = NUM_BUDGETS - 1
    return sorted(
        {least + (most - least) * step // steps for step in range(NUM_BUDGETS)}
    )


def sequential_plans(profile: ChainProfile, route: Route) -> Iterator[RecomputePlan]:
    """Plan as ``torch.utils.checkpoint.checkpoint_sequential`` would, for every k.

    It divides the stages into k segments of equal length and keeps the last, which
    takes the remainder.
    """
    (leg,) = route.device_legs(len(profile.units))
    stages = stages_of(profile, leg)
    for num in range(2, len(stages) + 1):
        size = len(stages) // num
        ends = [stages[size * part].start for part in range(num)]
        plan = RecomputePlan(tuple(Rerun(low, high) for low, high in pairwise(ends)))
        try:
            predicted_peak_bytes(profile, route, plan)
        except InvalidPlan:
            continue  # One of its stages must not run twice.
        yield plan
