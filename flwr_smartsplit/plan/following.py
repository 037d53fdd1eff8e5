"""What a device makes of its edge's wish: the next cut that fits, and that helps."""

from collections.abc import Callable, Iterator

from flwr_smartsplit.plan.adapting import MARGIN
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import cheapest_plan
from flwr_smartsplit.plan.timing import work_of
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    Cohort,
    RecomputePlan,
    Route,
    Wish,
)

Way = tuple[Route, RecomputePlan]
SecondsOf = Callable[[Route, RecomputePlan], float]
"""What a training step takes on a route, under a plan."""


def followed(  # noqa: PLR0913 - what bounds a move
    profile: ChainProfile,
    way: Way,
    wish: Wish,
    *,
    budget_bytes: int | None,
    cohort: Cohort,
    seconds_of: SecondsOf,
    min_device_units: int = 1,
) -> Way | None:
    """Find where a device's cut goes by its edge's wish.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size.
    way : tuple[Route, RecomputePlan]
        Route and plan as they are.
    wish : Wish
        ``EARLIER``: the nearest earlier cut at which some plan fits and a step takes
        less time. ``LATER``: the nearest later cut that fits with a margin and without
        recomputing, where the device does more of the work, and a step still takes no
        longer than the median.
    budget_bytes : int or None
        What the tensors may take; None means no limit.
    cohort : Cohort
        Knows the median.
    seconds_of : Callable[[Route, RecomputePlan], float]
        What a step takes.
    min_device_units : int
        Fewest units that stay at the device.

    Returns
    -------
    tuple[Route, RecomputePlan] or None
        None if there is no such cut. A device that goes one way is then not sent
        back: earlier cuts take less time, and no later one is slow.
    """
    if wish is Wish.EARLIER:
        now = seconds_of(*way)
        fits = (
            (route, _plan(profile, route, budget_bytes))
            for route in _earlier(way[0], min_device_units)
        )
        faster = (
            (route, plan)
            for route, plan in fits
            if plan is not None and seconds_of(route, plan) < now
        )
        return next(faster, None)
    room = None if budget_bytes is None else int(budget_bytes * (1 - MARGIN))
    flops = work_of(profile, way[0]).device_flops
    for route in _later(way[0], len(profile.units)):
        fits_plainly = room is None or predicted_peak_bytes(profile, route) <= room
        does_more = work_of(profile, route).device_flops > flops
        if fits_plainly and does_more:
            usual = cohort.median_step_seconds
            is_quick = seconds_of(route, KEEP_ALL) <= usual
            return (route, KEEP_ALL) if is_quick else None
    return None


def scaled(profile: ChainProfile, way: Way, step_seconds: float) -> SecondsOf:
    """Estimate other routes' times from one that was measured, by the device's FLOPs.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size.
    way : tuple[Route, RecomputePlan]
        What was measured, and
    step_seconds : float
        how long a step took there.

    Notes
    -----
    As if all the time went into the device's own work: what the link and the edge take
    is not told apart. A later cut is thus never thought quicker than it is, unless its
    boundary is larger.
    """
    measured = max(work_of(profile, *way).device_flops, 1)

    def seconds_of(route: Route, recompute: RecomputePlan) -> float:
        flops = work_of(profile, route, recompute).device_flops
        return step_seconds * flops / measured

    return seconds_of


def _plan(
    profile: ChainProfile, route: Route, budget_bytes: int | None
) -> RecomputePlan | None:
    """Find the cheapest plan that fits, if one does."""
    if budget_bytes is None:
        return KEEP_ALL
    return cheapest_plan(profile, route, budget_bytes)


def _earlier(route: Route, min_device_units: int) -> Iterator[Route]:
    cuts = range(route.cuts[0] - 1, min_device_units - 1, -1)
    return (route.with_first_cut(cut) for cut in cuts)


def _later(route: Route, num_units: int) -> Iterator[Route]:
    stop = route.cuts[1] if len(route.cuts) > 1 else num_units
    return (route.with_first_cut(cut) for cut in range(route.cuts[0] + 1, stop))
