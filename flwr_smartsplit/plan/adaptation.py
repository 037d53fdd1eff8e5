"""What a device changes between two steps: its recompute plan and its cut.

When its budget falls, it takes a tighter plan, then an earlier cut. When the budget
rises it goes back, but not at once, so that a budget that swings does not change it at
every step. On its edge's advice it moves to the next cut that fits and helps.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flwr_smartsplit.errors import NoFeasiblePlan, bytes_text
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import (
    cheapest_plan,
    extra_flops,
    least_bytes,
)
from flwr_smartsplit.plan.search_space import earlier_routes, later_routes
from flwr_smartsplit.plan.timing import work_of
from flwr_smartsplit.types import (
    KEEP_ALL,
    NO_CONSTRAINTS,
    Action,
    ChainProfile,
    Cohort,
    Constraints,
    RecomputePlan,
    Route,
    RouteOption,
)

PATIENCE_STEPS = 5  # In a row with room to spare, before anything is loosened
MARGIN = 0.02  # Share of the budget to leave free then

SecondsOf = Callable[[Route, RecomputePlan], float]
"""What a training step takes on a route, under a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a device stands between two steps."""

    planned: Route  # The route to go back to
    option: RouteOption  # Route and plan as they are
    calm_steps: int = 0  # Steps in a row with room for something cheaper
    is_fixed: bool = False  # Whether its cut cannot move
    constraints: Constraints = NO_CONSTRAINTS


# --- a budget that moves ----------------------------------------------------------


def adapted(
    profile: ChainProfile, standing: Standing, budget_bytes: int | None
) -> tuple[RouteOption, str] | None:
    """Decide what changes before the next step, and say why; None if nothing does.

    A budget of None means no limit. If nothing fits, ``NoFeasiblePlan`` says the least
    bytes that would do.
    """
    option = standing.option
    needed = predicted_peak_bytes(profile, option.route, option.recompute)
    if budget_bytes is not None and needed > budget_bytes:
        found = _first_fit(profile, option.route, standing, budget_bytes)
        return found, (
            f"the budget is {bytes_text(budget_bytes)}, {bytes_text(needed)} are needed"
        )
    if standing.calm_steps < PATIENCE_STEPS:
        return None
    better = _cheaper(profile, standing, budget_bytes)
    if better is None:
        return None
    room = "no limit" if budget_bytes is None else bytes_text(budget_bytes)
    return better, f"the budget allows {room} for {standing.calm_steps} steps"


def is_calm(
    profile: ChainProfile, standing: Standing, budget_bytes: int | None
) -> bool:
    """Say whether there is room for something cheaper than what is done now."""
    return _cheaper(profile, standing, budget_bytes) is not None


def _cheaper(
    profile: ChainProfile, standing: Standing, budget_bytes: int | None
) -> RouteOption | None:
    """Find what the device would do if it began anew, if that is better."""
    now = standing.option
    if now.route == standing.planned and now.recompute.is_empty:
        return None
    try:
        fit = _first_fit(profile, standing.planned, standing, _room(budget_bytes))
    except NoFeasiblePlan:
        return None
    if fit.route.cuts != now.route.cuts:
        return fit if fit.route.cuts > now.route.cuts else None
    return fit if _extra_work(profile, fit) < _extra_work(profile, now) else None


def _room(budget_bytes: int | None) -> int | None:
    return None if budget_bytes is None else int(budget_bytes * (1 - MARGIN))


def _extra_work(profile: ChainProfile, option: RouteOption) -> tuple[int, bool]:
    """Say what a plan adds: FLOPs, and then whether it adds anything."""
    plan = option.recompute
    return extra_flops(profile, option.route, plan), not plan.is_empty


def _first_fit(
    profile: ChainProfile, start: Route, standing: Standing, budget_bytes: int | None
) -> RouteOption:
    """Find the first route that fits, from ``start`` on with ever earlier cuts."""
    now = standing.option.route
    routes = [
        route
        for route in (start, *earlier_routes(start, standing.constraints))
        if can_move(profile, now, route)
    ]
    if standing.is_fixed or not routes:
        routes = [now]
    may_recompute = standing.constraints.recompute
    for route in routes:
        plan = _plan(profile, route, budget_bytes, may_recompute)
        if plan is not None:
            return _changed(standing.option, route, plan)
    least_of = least_bytes if may_recompute else predicted_peak_bytes
    needs = [(least_of(profile, route), route) for route in routes]
    needed, least = min(needs, key=lambda each: each[0])
    raise NoFeasiblePlan(
        f"nothing fits: the cheapest ({least}) needs {bytes_text(needed)} at "
        f"batch size {profile.batch_size}, whatever runs twice, and the budget has "
        f"become {bytes_text(budget_bytes or 0)}. This client sits the round out.",
        needed_bytes=needed,
        budget_bytes=budget_bytes,
    )


def can_move(profile: ChainProfile, before: Route, after: Route) -> bool:
    """Say whether every unit between the first cuts of two routes can move."""
    if not before.cuts or not after.cuts:
        return True
    low, high = sorted((before.cuts[0], after.cuts[0]))
    return all(unit.can_move for unit in profile.units[low:high])


def _plan(
    profile: ChainProfile, route: Route, budget_bytes: int | None, may_recompute: bool
) -> RecomputePlan | None:
    """Find the cheapest plan that is allowed and fits; None if there is none."""
    if budget_bytes is None:
        return KEEP_ALL
    if may_recompute:
        return cheapest_plan(profile, route, budget_bytes)
    return KEEP_ALL if predicted_peak_bytes(profile, route) <= budget_bytes else None


def _changed(option: RouteOption, route: Route, plan: RecomputePlan) -> RouteOption:
    """Change route and plan, not what is trained; the price is not worked out."""
    return RouteOption(
        route=route,
        recompute=plan,
        variant=option.variant,
        codecs=option.codecs,
        accumulate=option.accumulate,
    )


# --- an edge that advises ---------------------------------------------------------


def followed(  # noqa: PLR0913 - what bounds a move
    profile: ChainProfile,
    option: RouteOption,
    action: Action,
    *,
    budget_bytes: int | None,
    cohort: Cohort,
    seconds_of: SecondsOf,
    constraints: Constraints = NO_CONSTRAINTS,
) -> RouteOption | None:
    """Find where a device's cut goes on its edge's advice; None if nowhere.

    ``EARLIER`` is the nearest earlier cut at which some plan fits and a step takes less
    time. ``LATER`` is the nearest later cut that fits with a margin and without
    recomputation, and where the device does more of the work; a step must still take no
    longer than the median. So a device that moves one way is not sent back.
    """
    if action is Action.EARLIER:
        now = seconds_of(option.route, option.recompute)
        for route in earlier_routes(option.route, constraints):
            if not can_move(profile, option.route, route):
                break
            plan = _plan(profile, route, budget_bytes, constraints.recompute)
            if plan is not None and seconds_of(route, plan) < now:
                return _changed(option, route, plan)
        return None
    room = _room(budget_bytes)
    flops = work_of(profile, option.route).model_flops
    for route in later_routes(option.route, len(profile.units)):
        if not can_move(profile, option.route, route):
            break
        fits_plainly = room is None or predicted_peak_bytes(profile, route) <= room
        does_more = work_of(profile, route).model_flops > flops
        if fits_plainly and does_more:
            is_quick = seconds_of(route, KEEP_ALL) <= cohort.median_step_seconds
            return _changed(option, route, KEEP_ALL) if is_quick else None
    return None


def scaled(
    profile: ChainProfile, option: RouteOption, step_seconds: float
) -> SecondsOf:
    """Estimate other routes' times from one that was measured, by the device's FLOPs.

    All of the time counts as the device's own work; link and edge are not told apart.
    """
    measured = max(work_of(profile, option.route, option.recompute).device_flops, 1)

    def seconds_of(route: Route, recompute: RecomputePlan) -> float:
        flops = work_of(profile, route, recompute).device_flops
        return step_seconds * flops / measured

    return seconds_of
