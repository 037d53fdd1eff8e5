"""What a device does when its budget moves: a tighter plan, then an earlier cut.

And back again, but not at once: a budget that goes up and down would otherwise have
the device change with every step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from flwr_smartsplit.errors import NoFeasiblePlan, bytes_text
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import (
    cheapest_plan,
    extra_flops,
    least_bytes,
)
from flwr_smartsplit.types import KEEP_ALL, ChainProfile, RecomputePlan, Route

PATIENCE_STEPS = 5
"""For so many steps in a row there must be room before anything is loosened."""

MARGIN = 0.02
"""And it must be more than is needed, by this share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a device stands between two steps.

    Parameters
    ----------
    planned, route : Route
        The route that the strategy planned, and the one it is on.
    recompute : RecomputePlan
        What it runs twice.
    calm_steps : int
        For how many steps in a row there was room for something cheaper.
    is_fixed : bool
        Whether its cut cannot move.
    min_device_units : int
        Fewest units that stay at the device.
    """

    planned: Route
    route: Route
    recompute: RecomputePlan = KEEP_ALL
    calm_steps: int = 0
    is_fixed: bool = False
    min_device_units: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What to change to, and why."""

    route: Route
    recompute: RecomputePlan
    reason: str


def adapted(
    profile: ChainProfile, standing: Standing, budget_bytes: int | None
) -> Change | None:
    """Decide what changes before the next step.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size.
    standing : Standing
        Route and plan as they are.
    budget_bytes : int or None
        What the tensors may take from now on; None means no limit.

    Returns
    -------
    Change or None
        None if all stays, also where something cheaper would fit, but not for long
        enough yet (see ``is_calm``).

    Raises
    ------
    NoFeasiblePlan
        If nothing fits, with the least bytes that would do.
    """
    needed = predicted_peak_bytes(profile, standing.route, standing.recompute)
    if budget_bytes is not None and needed > budget_bytes:
        route, plan = _first_fit(profile, standing.route, standing, budget_bytes)
        reason = (
            f"the budget is {bytes_text(budget_bytes)}, {bytes_text(needed)} are needed"
        )
        return Change(route=route, recompute=plan, reason=reason)
    if standing.calm_steps < PATIENCE_STEPS:
        return None
    better = _cheaper(profile, standing, budget_bytes)
    if better is None:
        return None
    room = "no limit" if budget_bytes is None else bytes_text(budget_bytes)
    reason = f"the budget allows {room} for {standing.calm_steps} steps"
    return Change(route=better[0], recompute=better[1], reason=reason)


def is_calm(
    profile: ChainProfile, standing: Standing, budget_bytes: int | None
) -> bool:
    """Say whether there is room for something cheaper than what is done now."""
    return _cheaper(profile, standing, budget_bytes) is not None


def _cheaper(
    profile: ChainProfile, standing: Standing, budget_bytes: int | None
) -> tuple[Route, RecomputePlan] | None:
    """Find what the device would do if it began anew, if that is better."""
    if standing.route == standing.planned and standing.recompute.is_empty:
        return None
    if budget_bytes is None:
        fit = (standing.route if standing.is_fixed else standing.planned, KEEP_ALL)
    else:
        room = int(budget_bytes * (1 - MARGIN))
        try:
            fit = _first_fit(profile, standing.planned, standing, room)
        except NoFeasiblePlan:
            return None
    if fit[0].cuts != standing.route.cuts:
        return fit if fit[0].cuts > standing.route.cuts else None
    now = _work(profile, standing.route, standing.recompute)
    return fit if _work(profile, *fit) < now else None


def _work(profile: ChainProfile, route: Route, plan: RecomputePlan) -> tuple[int, bool]:
    """Say what a plan adds: FLOPs, and then whether it adds anything."""
    return extra_flops(profile, route, plan), not plan.is_empty


def _first_fit(
    profile: ChainProfile, start: Route, standing: Standing, budget_bytes: int
) -> tuple[Route, RecomputePlan]:
    """Find the first route from ``start`` on, with earlier and earlier cuts, that fits.

    Raises
    ------
    NoFeasiblePlan
        With the least bytes that would do.
    """
    least: tuple[int, Route] | None = None
    least_units = standing.min_device_units
    routes = [standing.route] if standing.is_fixed else _earlier(start, least_units)
    for route in routes:
        plan = cheapest_plan(profile, route, budget_bytes)
        if plan is not None:
            return route, plan
        needed = least_bytes(profile, route)
        if least is None or needed < least[0]:
            least = needed, route
    if least is None:
        raise RuntimeError("a route has itself to fall back on.")
    raise NoFeasiblePlan(
        f"nothing fits: the cheapest ({least[1]}) needs {bytes_text(least[0])} at "
        f"batch size {profile.batch_size}, whatever runs twice, and the budget has "
        f"become {bytes_text(budget_bytes)}. This client sits the round out.",
        needed_bytes=least[0],
        budget_bytes=budget_bytes,
    )


def _earlier(route: Route, min_device_units: int) -> Iterator[Route]:
    yield route
    if route.cuts:
        for cut in range(route.cuts[0] - 1, min_device_units - 1, -1):
            yield route.with_first_cut(cut)
