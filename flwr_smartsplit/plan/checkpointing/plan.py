"""plan_recompute: which units of a device run twice, so that its route fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from flwr_smartsplit.errors import NoFeasiblePlan, bytes_text
from flwr_smartsplit.plan.checkpointing.optimal import Rotor
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.stages import (
    Stage,
    always_held_bytes,
    stages_of,
)
from flwr_smartsplit.plan.checkpointing.step_memory import held_by
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    Leg,
    RecomputePlan,
    Rerun,
    Route,
)
from flwr_smartsplit.types.sizes import whole_bytes


def plan_recompute(
    profile: ChainProfile, route: Route, *, budget_bytes: int
) -> RecomputePlan:
    """Choose what a device recomputes so that its route fits a budget.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size and optimizer.
    route : Route
        Any route of the chain.
    budget_bytes : int
        What the device's tensors may take at any moment.

    Returns
    -------
    RecomputePlan
        The plan of least extra cost; empty if everything fits. Sizes are rounded up to
        1/500 of the budget, so a plan never exceeds it.

    Raises
    ------
    NoFeasiblePlan
        With the least bytes that would do, and the nearest route that fits.

    Notes
    -----
    Optimal for one device segment. A U-shaped route has two, planned one after the
    other: first what waits, then what the rest leaves room for.
    """
    budget_bytes = whole_bytes(budget_bytes, "budget_bytes")
    found = cheapest_plan(profile, route, budget_bytes)
    if found is not None:
        return found
    needed = least_bytes(profile, route)
    nearest = _nearest_that_fits(profile, route, budget_bytes)
    advice = (
        f"the nearest route that fits is {nearest}"
        if nearest is not None
        else "no other cut of it fits either; lower the batch size"
    )
    raise NoFeasiblePlan(
        f"no recompute plan of {route} fits: the least is {bytes_text(needed)} at "
        f"batch size {profile.batch_size}, the budget is {bytes_text(budget_bytes)}; "
        f"{advice}.",
        needed_bytes=needed,
        budget_bytes=budget_bytes,
        route=nearest,
    )


@lru_cache(maxsize=4096)
def cheapest_plan(
    profile: ChainProfile, route: Route, budget_bytes: int
) -> RecomputePlan | None:
    """Choose as ``plan_recompute`` does; return None where no plan fits."""
    if predicted_peak_bytes(profile, route) <= budget_bytes:
        return KEEP_ALL
    segments = _segments(profile, route)
    fitting = [
        (_extra(segments, plan), index, plan)
        for index, plan in enumerate(_candidates(segments, budget_bytes))
        if predicted_peak_bytes(profile, route, plan) <= budget_bytes
    ]
    if fitting:
        return min(fitting)[2]
    fits = least_bytes(profile, route) <= budget_bytes
    return _plan_of_least_memory(profile, route) if fits else None


def least_bytes(profile: ChainProfile, route: Route) -> int:
    """Find the least that a device needs for a route, whatever runs twice."""
    return predicted_peak_bytes(profile, route, _plan_of_least_memory(profile, route))


@lru_cache(maxsize=4096)
def floor_bytes(profile: ChainProfile, route: Route) -> int:
    """Bound from below, and quickly, what any plan of a route needs."""
    segments = _segments(profile, route)
    needs = [0]
    for stages in (segments.head, segments.tail):
        for before, stage in zip((None, *stages), stages, strict=False):
            held = before.output_bytes if before is not None else 0
            least = min(run.backward_peak_bytes for run in stage.runs)
            needs.append(held + least)
    return min(segments.static_bytes + max(needs), predicted_peak_bytes(profile, route))


def extra_flops(profile: ChainProfile, route: Route, plan: RecomputePlan) -> int:
    """Count the FLOPs that a plan adds to a step's forward."""
    return round(_extra(_segments(profile, route), plan))


@dataclass(frozen=True, slots=True)
class _Segments:
    """The device segments of a route as stages, and what stays besides."""

    head: tuple[Stage, ...]
    tail: tuple[Stage, ...]
    static_bytes: int
    entered_bytes: int
    legs: tuple[Leg, ...]


@lru_cache(maxsize=1024)
def _segments(profile: ChainProfile, route: Route) -> _Segments:
    legs = route.device_legs(len(profile.units))
    head, *tail = (stages_of(profile, leg) for leg in legs)
    static = always_held_bytes(profile, legs)
    entered = profile.units[legs[1].start - 1].boundary_bytes if tail else 0
    return _Segments(head, tail[0] if tail else (), static, entered, legs)


def _candidates(segments: _Segments, budget_bytes: int) -> list[RecomputePlan]:
    """Plan each segment with the memory that the other leaves it."""
    free = budget_bytes - segments.static_bytes
    if free <= 0:
        return []
    plans = [_best(segments.head, free)]
    if not segments.tail:
        return [plan for plan in plans if plan is not None]
    plans.append(KEEP_ALL)
    plans.append(_best(segments.head, free, is_rerun=True))
    joined = []
    for head in filter(None, dict.fromkeys(plans)):
        waiting = held_by(segments.head, head).waiting_bytes
        room = free - waiting - segments.entered_bytes
        tail = _best(segments.tail, room) if room > 0 else None
        if tail is not None:
            joined.append(_joined(head, tail))
    return joined


def _best(
    stages: Sequence[Stage], free_bytes: int, *, is_rerun: bool = False
) -> RecomputePlan | None:
    return Rotor(stages, free_bytes, is_rerun=is_rerun).best_within(free_bytes)


def _joined(head: RecomputePlan, tail: RecomputePlan) -> RecomputePlan:
    return RecomputePlan(
        (*head.reruns, *tail.reruns), (*head.selective, *tail.selective)
    )


@lru_cache(maxsize=1024)
def _plan_of_least_memory(profile: ChainProfile, route: Route) -> RecomputePlan:
    """Find the plan of least memory, to a slot."""
    segments = _segments(profile, route)
    best, least = KEEP_ALL, (predicted_peak_bytes(profile, route), 0.0)
    for _ in range(3):  # Each time with finer slots.
        found = {
            plan: (predicted_peak_bytes(profile, route, plan), _extra(segments, plan))
            for plan in _plans_of_least_memory(
                segments, least[0] - segments.static_bytes
            )
        }
        better = {plan: each for plan, each in found.items() if each < least}
        if not better:
            break
        best = min(better, key=better.__getitem__)
        least = better[best]
    return best


def _plans_of_least_memory(segments: _Segments, free_bytes: int) -> list[RecomputePlan]:
    if free_bytes <= 0:
        return []
    kinds = (False, True) if segments.tail else (False,)
    rotors = [Rotor(segments.head, free_bytes, is_rerun=kind) for kind in kinds]
    found = [
        head for rotor in rotors if (head := rotor.plan_of_least_memory()) is not None
    ]
    if not segments.tail:
        return found
    tail = Rotor(segments.tail, free_bytes).plan_of_least_memory()
    return [] if tail is None else [_joined(head, tail) for head in found]


def _extra(segments: _Segments, plan: RecomputePlan) -> float:
    pairs = zip(segments.legs, (segments.head, segments.tail), strict=False)
    return sum(
        cost_of(stages, plan.within(leg.start, leg.stop)) for leg, stages in pairs
    )


def cost_of(stages: Sequence[Stage], plan: RecomputePlan) -> float:
    """Add up the cost of what a plan of one segment runs again."""
    selective = sum(
        run.extra_cost
        for stage in stages
        for run in stage.runs[1:]
        if set(run.selective) <= set(plan.selective)
    )
    return selective + sum(_rerun_cost(stages, part) for part in plan.reruns)


def _rerun_cost(stages: Sequence[Stage], part: Rerun) -> float:
    """Add up what one part runs again; a rerun ends at the last tensor it saves."""
    inside = [s for s in stages if part.start <= s.start < s.stop <= part.stop]
    cost = sum(stage.cost for stage in inside[:-1]) + inside[-1].rerun_cost
    if part.inner and part.inner[-1].stop == part.stop:
        last = part.inner[-1]
        cost = sum(stage.cost for stage in inside if stage.stop <= last.start)
    return cost + sum(_rerun_cost(stages, each) for each in part.inner)


def _nearest_that_fits(
    profile: ChainProfile, route: Route, budget_bytes: int
) -> Route | None:
    """Find the deepest earlier first cut at which some plan fits."""
    first = route.cuts[0] if route.cuts else len(profile.units)
    earlier = (
        route.with_first_cut(cut) if route.cuts else Route.split(cut)
        for cut in range(first - 1, 0, -1)
    )
    fitting = (each for each in earlier if least_bytes(profile, each) <= budget_bytes)
    return next(fitting, None)
