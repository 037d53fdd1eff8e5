"""The search space: every route, the plans worth a look on it, and what both cost.

Routes are enumerated here. Peaks are not monotonic in depth, so every cut counts.
Without recomputation the deepest route is wanted most: its boundary leaks the least.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import cheapest_plan, least_bytes
from flwr_smartsplit.plan.coding import codecs_of
from flwr_smartsplit.plan.tail_memory import tail_bytes
from flwr_smartsplit.plan.timing import work_of
from flwr_smartsplit.types import (
    EDGE,
    KEEP_ALL,
    NO_CONSTRAINTS,
    WHOLE,
    ChainProfile,
    Constraints,
    RecomputePlan,
    Route,
    RouteOption,
    Variant,
)
from flwr_smartsplit.types.sizes import whole_bytes

NUM_BETWEEN = 3

# --- routes -----------------------------------------------------------------------


def split_routes(num_units: int, *, edge: str | None = EDGE) -> Iterator[Route]:
    """Yield the whole model, then, with an edge, all single cuts, deepest first."""
    yield Route.whole()
    if edge is not None:
        for cut in range(num_units - 1, 0, -1):
            yield Route.split(cut, edge=edge)


def u_shape_routes(num_units: int, *, edge: str | None = EDGE) -> Iterator[Route]:
    """Yield the whole model, then all routes that bring the last units back.

    Those with the fewest last units come first; of these, those with the deepest front.
    """
    yield Route.whole()
    if edge is not None:
        for last, first in combinations(range(num_units - 1, 0, -1), 2):
            yield Route.u_shape(first, last, edge=edge)


def earlier_routes(route: Route, constraints: Constraints) -> Iterator[Route]:
    """Yield the route with its first cut moved towards the input, nearest first."""
    first = route.cuts[0] if route.cuts else 0
    for cut in range(first - 1, constraints.min_device_units - 1, -1):
        yield route.with_first_cut(cut)


def later_routes(route: Route, num_units: int) -> Iterator[Route]:
    """Yield the route with its first cut moved towards the output, nearest first."""
    first, stop = (*route.cuts, num_units)[:2]
    for cut in range(first + 1, stop):
        yield route.with_first_cut(cut)


# --- options ----------------------------------------------------------------------


def option_of(
    profile: ChainProfile, route: Route, recompute: RecomputePlan = KEEP_ALL
) -> RouteOption:
    """Work out what a route of the chain, and a plan of this route, cost."""
    memory = disk = 0
    if len(route.cuts) == 1:
        memory, disk = tail_bytes(profile, route.cuts[0], len(profile.units))
    return RouteOption(
        route=route,
        recompute=recompute,
        codecs=codecs_of(profile, route),
        peak_bytes=predicted_peak_bytes(profile, route, recompute),
        work=work_of(profile, route, recompute),
        edge_memory_bytes=memory,
        edge_disk_bytes=disk,
    )


def options_of_route(
    profile: ChainProfile, route: Route, *, num_between: int = NUM_BETWEEN
) -> tuple[RouteOption, ...]:
    """Plan one route for several budgets, from the least that it can do with.

    ``num_between`` more lie at equal distances up to its peak without recomputation.
    """
    if num_between < 0:
        raise ValueError(f"num_between is {num_between}: give 0 or more.")
    most, least = predicted_peak_bytes(profile, route), least_bytes(profile, route)
    parts = num_between + 1
    budgets = [least + (most - least) * part // parts for part in range(parts)]
    plans = [cheapest_plan(profile, route, budget) for budget in budgets]
    distinct = dict.fromkeys([*(plan for plan in plans if plan is not None), KEEP_ALL])
    return tuple(option_of(profile, route, plan) for plan in distinct)


def routes_worth_a_plan(
    profile: ChainProfile, *, with_u_shapes: bool = False
) -> tuple[Route, ...]:
    """List the routes to plan for, the shallowest first.

    A route is left out if another sends as little and, with nothing recomputed, holds
    as little: of EfficientNet-B0's 62 routes, seven remain. That it then holds more
    with recomputation, too, is nearly always true, and saves minutes. Of seven profiles
    of torchvision models planned on all routes, one (MobileNetV3-Large, 224×224) had a
    better choice among those left out, with 4 % less memory.
    """
    size = len(profile.units)
    routes = list(u_shape_routes(size) if with_u_shapes else split_routes(size))
    if with_u_shapes:
        routes += [route for route in split_routes(size) if route.cuts]
    costs = {}
    for route in routes:
        sent = sum(profile.units[cut - 1].boundary_bytes for cut in route.cuts)
        costs[route] = sent, predicted_peak_bytes(profile, route)
    kept: list[Route] = []
    # Of equal ones the deepest comes first, and stays: it leaks the least.
    for route in sorted(routes, key=costs.__getitem__):
        if not kept or costs[route][1] < costs[kept[-1]][1]:
            kept.append(route)
    worth = frozenset(kept)
    return tuple(filter(worth.__contains__, reversed(routes)))


# --- the space of a fleet ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """All options of a chain, the most wanted first where nothing is known of speed.

    First those that recompute nothing, then the others; the deepest first.
    """

    profile: ChainProfile
    options: tuple[RouteOption, ...]

    @cached_property
    def peaks(self) -> npt.NDArray[np.int64]:
        """The options' peaks, in bytes."""
        return np.array([option.peak_bytes for option in self.options], np.int64)

    @cached_property
    def whole_peak_bytes(self) -> int:
        """What the whole model needs if nothing is recomputed."""
        return predicted_peak_bytes(self.profile, Route.whole())

    @cached_property
    def cheapest(self) -> RouteOption:
        """The option that takes the least memory."""
        return min(self.options, key=lambda option: option.peak_bytes)


@lru_cache(maxsize=64)
def search_space(
    profile: ChainProfile,
    constraints: Constraints = NO_CONSTRAINTS,
    *,
    has_edges: bool = True,
    accumulate: int = 1,
    variant: Variant = WHOLE,
) -> SearchSpace:
    """List the options of a chain, once for all clients of a batch size.

    Without ``has_edges`` there are whole models only; ``accumulate`` is the number of
    micro-batches of the profile. Every route is there as it is. Plans that recompute
    are there for a few budgets, on routes that no other beats in memory and traffic:
    planning takes time.
    """
    size = len(profile.units)
    routes = [
        route
        for route in split_routes(size, edge=EDGE if has_edges else None)
        if not route.cuts or constraints.allow(route, num_units=size)
    ]
    plain = [option_of(profile, route) for route in routes]
    planned: list[RouteOption] = []
    if constraints.recompute:
        worth = set(routes_worth_a_plan(profile))
        planned = [
            option
            for route in routes
            if route in worth
            for option in reversed(options_of_route(profile, route))
            if not option.recompute.is_empty
        ]
    options = (
        replace(each, accumulate=accumulate, variant=variant)
        for each in (*plain, *planned)
    )
    return SearchSpace(profile, tuple(options))


def joined(spaces: Sequence[SearchSpace]) -> SearchSpace:
    """List the options of one chain under several choices of codecs.

    They keep their order, and each route has those of the first choice first.
    """
    if len(spaces) == 1:
        return spaces[0]
    options = list(dict.fromkeys(each for space in spaces for each in space.options))
    order: dict[Route, int] = {}
    for each in options:
        order.setdefault(each.route, len(order))
    options.sort(key=lambda each: (not each.recompute.is_empty, order[each.route]))
    return SearchSpace(spaces[0].profile, tuple(options))


# --- the Pareto front -------------------------------------------------------------


def extra_work(option: RouteOption) -> tuple[int, bool]:
    """Say what to compare recomputation by: units without FLOPs are work, too."""
    return option.work.extra_flops, not option.recompute.is_empty


def dominates(option: RouteOption, other: RouteOption) -> bool:
    """Say whether an option is better in memory, work or traffic, and worse in none."""
    mine, theirs = _costs(option), _costs(other)
    pairs = zip(mine, theirs, strict=True)
    return mine != theirs and all(own <= its for own, its in pairs)  # type: ignore[operator]


def undominated(
    options: Iterable[RouteOption], *, budget_bytes: int | None = None
) -> tuple[RouteOption, ...]:
    """Keep what no other option beats and a budget allows; the least memory first.

    Of equal options the deepest is kept. A budget that is no number of bytes raises
    ``ValueError``.
    """
    if budget_bytes is not None:
        budget_bytes = whole_bytes(budget_bytes, "budget_bytes")
    kept: list[RouteOption] = []
    # Whoever beats an option comes before it in this order.
    for option in sorted(options, key=lambda each: (_costs(each), _by_depth(each))):
        if budget_bytes is not None and option.peak_bytes > budget_bytes:
            break
        if not any(
            dominates(each, option) or _costs(each) == _costs(option) for each in kept
        ):
            kept.append(option)
    return tuple(kept)


def recommended_option(
    profile: ChainProfile, front: Iterable[RouteOption], *, budget_bytes: int
) -> RouteOption | None:
    """Take the deepest option that recomputes nothing, else the one of least work.

    If it recomputes, its route is planned anew for exactly this budget, so it may be
    none of the front. None if no option fits; ``ValueError`` as in ``undominated``.
    """
    fitting = undominated(front, budget_bytes=budget_bytes)
    if not fitting:
        return None
    best = min(fitting, key=lambda each: (extra_work(each), _by_depth(each)))
    plan = cheapest_plan(profile, best.route, budget_bytes)
    exact = best if plan is None else option_of(profile, best.route, plan)
    return exact if extra_work(exact) < extra_work(best) else best


def _costs(option: RouteOption) -> tuple[int, tuple[int, bool], int]:
    return option.peak_bytes, extra_work(option), option.work.boundary_bytes


def _by_depth(option: RouteOption) -> tuple[float, int]:
    """Sort the deepest first; the whole model is deeper than any cut."""
    cuts = option.route.cuts
    return -option.work.device_fraction, -cuts[0] if cuts else -(10**9)
