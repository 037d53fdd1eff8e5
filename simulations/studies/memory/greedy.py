"""greedy_plan: a rule of thumb for what to recompute, to compare the optimum with.

It looks at the whole step's peak, not at one unit's bytes, and never nests reruns.
`recompute_plan` is never worse; this one can be followed by hand.
"""

from collections.abc import Iterator, Sequence

from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import cost_of
from flwr_smartsplit.plan.checkpointing.stages import Stage, stages_of
from flwr_smartsplit.plan.checkpointing.step_memory import held_by
from flwr_smartsplit.types import ChainProfile, RecomputePlan, Rerun, Route


def greedy_plan(
    profile: ChainProfile, route: Route, *, budget_bytes: int
) -> RecomputePlan | None:
    """Rerun, one after the other, the stages that lower the peak most for their cost.

    The plan has no rerun that it could do without. None means that the rule finds none,
    not that there is none.
    """
    legs = route.device_legs(len(profile.units))
    if len(legs) > 1:
        raise ValueError(f"{route} comes back: the greedy rule plans one segment.")
    stages = stages_of(profile, legs[0])
    plan = RecomputePlan()
    while predicted_peak_bytes(profile, route, plan) > budget_bytes:
        better = _next(stages, plan)
        if better is None:
            return None
        plan = better
    for part in plan.reruns:
        fewer = RecomputePlan(tuple(other for other in plan.reruns if other != part))
        if predicted_peak_bytes(profile, route, fewer) <= budget_bytes:
            plan = fewer
    return plan


def _next(stages: Sequence[Stage], plan: RecomputePlan) -> RecomputePlan | None:
    """Find the rerun that lowers the peak most per FLOP; None if none lowers it."""
    peak, cost = held_by(stages, plan).peak_bytes, cost_of(stages, plan)
    best, most = None, (0.0, 0)
    for candidate in _extended(stages, plan):
        gain = peak - held_by(stages, candidate).peak_bytes
        score = gain / max(cost_of(stages, candidate) - cost, 1.0), gain
        if gain > 0 and score > most:
            best, most = candidate, score
    return best


def _extended(stages: Sequence[Stage], plan: RecomputePlan) -> Iterator[RecomputePlan]:
    """List the plans with one rerun more; it takes in those it overlaps."""
    for index, first in enumerate(stages):
        for last in stages[index:]:
            if not last.can_rerun:
                break
            low, high = first.start, last.stop
            met = [p for p in plan.reruns if p.start < high and low < p.stop]
            others = [p for p in plan.reruns if p not in met]
            low = min([low, *(p.start for p in met)])
            high = max([high, *(p.stop for p in met)])
            reruns = sorted([*others, Rerun(low, high)], key=lambda p: p.start)
            yield RecomputePlan(tuple(reruns))
