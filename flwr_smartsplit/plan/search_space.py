"""What a client may choose from: routes with plans that nothing else beats.

A route and a plan trade memory for work and traffic. Of all pairs, only those are worth
a look that no other beats in all three; a person or a policy takes one of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import (
    cheapest_plan,
    check_budget,
    extra_flops,
    least_bytes,
)
from flwr_smartsplit.types import KEEP_ALL, ChainProfile, RecomputePlan, Route

NUM_BETWEEN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A route, what its device recomputes, and what that costs.

    Parameters
    ----------
    route : Route
        Where the segments run.
    recompute : RecomputePlan
        What the device runs twice.
    peak_bytes : int
        The most that the device holds during a step, as predicted.
    extra_flops : int
        What the plan adds to a step's forward, in floating-point operations.
    extra_flops_fraction : float
        The same, as a fraction of what the device's forward takes if each of its units
        runs once; 0 if that is 0.
    boundary_bytes : int
        What a step sends over the cuts; as much comes back as gradients.
    device_flops_fraction : float
        The device's share of the whole model's forward FLOPs; 1 if there are none.
    """

    route: Route
    recompute: RecomputePlan
    peak_bytes: int
    extra_flops: int
    extra_flops_fraction: float
    boundary_bytes: int
    device_flops_fraction: float

    @property
    def work(self) -> tuple[int, bool]:
        """What to compare extra work by: to run units without FLOPs again is work."""
        return self.extra_flops, not self.recompute.is_empty

    def dominates(self, other: "Choice") -> bool:
        """Say whether it is nowhere worse than another, and better in something.

        Compared are ``peak_bytes``, ``work`` and ``boundary_bytes``.
        """
        return (
            self._costs != other._costs
            and self.peak_bytes <= other.peak_bytes
            and self.work <= other.work
            and self.boundary_bytes <= other.boundary_bytes
        )

    @property
    def _costs(self) -> tuple[int, tuple[int, bool], int]:
        return self.peak_bytes, self.work, self.boundary_bytes


def front_of_choices(
    profile: ChainProfile,
    *,
    budget_bytes: int | None = None,
    num_between: int = NUM_BETWEEN,
    with_u_shapes: bool = False,
) -> tuple[Choice, ...]:
    """List the choices that no other beats in memory, extra work and traffic together.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size and optimizer.
    budget_bytes : int, optional
        What the device's tensors may take at any moment; without it, all are listed.
    num_between : int
        How many budgets are planned for on each route, between the least that it can do
        with and the peak if nothing is recomputed.
    with_u_shapes : bool
        Whether routes count that bring the last units back to the device.

    Returns
    -------
    tuple[Choice, ...]
        By memory, the least first; empty if nothing fits.

    Raises
    ------
    ValueError
        If ``budget_bytes`` is no number of bytes, or ``num_between`` less than 0.

    Notes
    -----
    The budgets in between do not depend on ``budget_bytes``, which only leaves out what
    is above it: for the best plan of one route and budget, see ``plan_recompute``.

    Examples
    --------
    >>> from flwr_smartsplit.types import UnitCost
    >>> costs = dict.fromkeys(
    ...     ("parameter_bytes", "buffer_bytes", "gradient_bytes",
    ...      "optimizer_state_bytes", "saved_bytes", "waiting_bytes",
    ...      "return_bytes"), 0)
    >>> small, large = (
    ...     UnitCost(name="", forward_flops=5, boundary_bytes=4, device_peak_bytes=peak,
    ...              **costs) for peak in (8, 16))
    >>> profile = ChainProfile(batch_size=1, batch_bytes=8, units=(small, large))
    >>> front = front_of_choices(profile, num_between=0)
    >>> [(str(c.route), c.peak_bytes, c.device_flops_fraction) for c in front][0]
    ('device[:1] > edge[1:]', 8, 0.5)
    """
    routes = routes_worth_a_plan(profile, with_u_shapes=with_u_shapes)
    found = [
        choice
        for route in routes
        for choice in choices_of_route(profile, route, num_between=num_between)
    ]
    return undominated(found, budget_bytes=budget_bytes)


def routes_worth_a_plan(
    profile: ChainProfile, *, with_u_shapes: bool = False
) -> tuple[Route, ...]:
    """List the routes to plan for, the shallowest first.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size and optimizer.
    with_u_shapes : bool
        Whether routes count that bring the last units back to the device.

    Notes
    -----
    A route is left out if another sends as little and, with nothing recomputed, holds
    as little: of EfficientNet-B0's 62 routes, seven remain. That it then holds more
    with recomputation, too, is nearly always true, and saves minutes. Of seven profiles
    of torchvision models planned on all routes, one (MobileNetV3-Large, 224×224) had a
    better choice among those left out, with 4 % less memory.
    """
    routes = list(_routes(profile, with_u_shapes=with_u_shapes))
    costs = {
        route: (boundary_bytes(profile, route), predicted_peak_bytes(profile, route))
        for route in routes
    }
    kept: list[Route] = []
    # Of equal ones the deepest comes first, and stays: it leaks the least.
    for route in sorted(routes, key=costs.__getitem__):
        if not kept or costs[route][1] < costs[kept[-1]][1]:
            kept.append(route)
    worth = frozenset(kept)
    return tuple(filter(worth.__contains__, reversed(routes)))


def choices_of_route(
    profile: ChainProfile, route: Route, *, num_between: int = NUM_BETWEEN
) -> tuple[Choice, ...]:
    """Plan one route for several budgets, from the least that it can do with.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size and optimizer.
    route : Route
        Any route of the chain.
    num_between : int
        How many budgets, at equal distances, lie between the least and the peak if
        nothing is recomputed.

    Raises
    ------
    InvalidRoute
        If a cut lies outside the chain.
    ValueError
        If ``num_between`` is less than 0.
    """
    if num_between < 0:
        raise ValueError(f"num_between is {num_between}: give 0 or more.")
    most, least = predicted_peak_bytes(profile, route), least_bytes(profile, route)
    parts = num_between + 1
    budgets = [least + (most - least) * part // parts for part in range(parts)]
    plans = [cheapest_plan(profile, route, budget) for budget in budgets]
    kinds = dict.fromkeys([*(plan for plan in plans if plan is not None), KEEP_ALL])
    return tuple(choice_of(profile, route, plan) for plan in kinds)


def choice_of(profile: ChainProfile, route: Route, recompute: RecomputePlan) -> Choice:
    """Add up what a route and a plan cost.

    Raises
    ------
    InvalidRoute
        If a cut lies outside the chain.
    InvalidPlan
        If the plan is none of this route.
    """
    legs = route.device_legs(len(profile.units))
    flops = [unit.forward_flops for unit in profile.units]
    own, total = sum(sum(flops[leg.start : leg.stop]) for leg in legs), sum(flops)
    extra = extra_flops(profile, route, recompute)
    return Choice(
        route=route,
        recompute=recompute,
        peak_bytes=predicted_peak_bytes(profile, route, recompute),
        extra_flops=extra,
        extra_flops_fraction=extra / own if own else 0.0,
        boundary_bytes=boundary_bytes(profile, route),
        device_flops_fraction=own / total if total else 1.0,
    )


def boundary_bytes(profile: ChainProfile, route: Route) -> int:
    """Add up what a step sends over a route's cuts; as much comes back."""
    return sum(profile.units[cut - 1].boundary_bytes for cut in route.cuts)


def undominated(
    choices: Iterable[Choice], *, budget_bytes: int | None = None
) -> tuple[Choice, ...]:
    """Keep what no other choice beats and a budget allows; the least memory first.

    Parameters
    ----------
    choices : Iterable[Choice]
        In any order; of equal ones, the deepest is kept.
    budget_bytes : int, optional
        What the device's tensors may take.

    Raises
    ------
    ValueError
        If ``budget_bytes`` is no number of bytes.
    """
    if budget_bytes is not None:
        check_budget(budget_bytes)
    kept: list[Choice] = []
    # Whoever beats a choice comes before it in this order.
    for choice in sorted(choices, key=_by_memory):
        if budget_bytes is not None and choice.peak_bytes > budget_bytes:
            break
        if not any(
            each.dominates(choice) or each._costs == choice._costs for each in kept
        ):
            kept.append(choice)
    return tuple(kept)


def recommended_choice(
    profile: ChainProfile, front: Iterable[Choice], *, budget_bytes: int
) -> Choice | None:
    """Take the deepest choice that recomputes nothing, else the one of least work.

    Parameters
    ----------
    profile : ChainProfile
        What the choices were made from.
    front : Iterable[Choice]
        Choices that no other beats.
    budget_bytes : int
        What the device's tensors may take at any moment.

    Returns
    -------
    Choice or None
        If it recomputes, its route is planned anew for exactly this budget, so it may
        be none of the front. None if no choice fits.

    Raises
    ------
    ValueError
        If ``budget_bytes`` is no number of bytes.
    """
    fitting = undominated(front, budget_bytes=budget_bytes)
    if not fitting:
        return None
    best = min(fitting, key=lambda each: (each.work, *_by_depth(each)))
    plan = cheapest_plan(profile, best.route, budget_bytes)
    exact = best if plan is None else choice_of(profile, best.route, plan)
    return exact if exact.work < best.work else best


def _by_memory(choice: Choice) -> tuple[object, ...]:
    return *choice._costs, *_by_depth(choice)


def _by_depth(choice: Choice) -> tuple[float, int]:
    """Sort the deepest first; the whole model is deeper than any cut."""
    cuts = choice.route.cuts
    return -choice.device_flops_fraction, -cuts[0] if cuts else -(10**9)


def _routes(profile: ChainProfile, *, with_u_shapes: bool) -> Iterator[Route]:
    """Yield the whole model and every way to cut it, the deepest first."""
    size = len(profile.units)
    yield Route.whole()
    if with_u_shapes:
        for last, first in combinations(range(size - 1, 0, -1), 2):
            yield Route.u_shape(first, last)
    yield from map(Route.split, range(size - 1, 0, -1))
