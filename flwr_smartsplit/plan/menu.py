"""The menu: every route and plan that devices can choose from, with their prices.

It is made once for a chain's profile and serves the whole fleet: which offers a device
can take is a comparison of its budget with their peaks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.search_space import choices_of_route, routes_worth_a_plan
from flwr_smartsplit.plan.tail_memory import tail_bytes
from flwr_smartsplit.plan.timing import Work, work_of
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    RecomputePlan,
    Route,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What limits the menu.

    Parameters
    ----------
    has_edges : bool
        Whether any edge is ready; without one, there are whole models only.
    kept_units : frozenset[int]
        Units that must be on the device, since their state is the client's own.
    min_device_units : int
        How many units a cut leaves on the device at least: shallow boundaries leak.
    recompute : bool
        Whether devices may recompute activations.
    """

    has_edges: bool
    kept_units: frozenset[int] = frozenset()
    min_device_units: int = 1
    recompute: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A route, what its device recomputes, and what both cost.

    Parameters
    ----------
    route : Route
        With an edge that stands for any.
    recompute : RecomputePlan
        What the device runs twice.
    peak_bytes : int
        The most that the device holds during a step, as predicted.
    work : Work
        What it asks of device, link and edge.
    edge_memory_bytes, edge_disk_bytes : int
        What the rest of the model takes at the edge, and sealed on its disk.
    is_placed : bool
        Whether the route names its edges already.
    """

    route: Route
    recompute: RecomputePlan
    peak_bytes: int
    work: Work
    edge_memory_bytes: int = 0
    edge_disk_bytes: int = 0
    is_placed: bool = False

    def at(self, edge: str | None) -> Route:
        """Return the route with the edge that hosts its rest."""
        if edge is None or not self.route.cuts:
            return self.route
        return Route.split(self.route.cuts[0], edge=edge)


@dataclass(frozen=True, eq=False)
class Menu:
    """All offers of a chain, the most wanted first where nothing is known of speed.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at one batch size.
    offers : tuple[Offer, ...]
        First those that recompute nothing, the deepest first, since they leave the
        least leaky boundary; then the others, again the deepest first.
    """

    profile: ChainProfile
    offers: tuple[Offer, ...]
    peaks: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        """Line the peaks up."""
        peaks = np.array([offer.peak_bytes for offer in self.offers], np.int64)
        object.__setattr__(self, "peaks", peaks)

    @cached_property
    def whole_peak_bytes(self) -> int:
        """What the whole model needs if nothing is recomputed."""
        return predicted_peak_bytes(self.profile, Route.whole())

    @cached_property
    def cheapest(self) -> Offer | None:
        """The offer that takes the least memory; None on an empty menu."""
        return min(self.offers, key=lambda offer: offer.peak_bytes, default=None)


@lru_cache(maxsize=64)
def menu_of(profile: ChainProfile, terms: Terms) -> Menu:
    """List all offers.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the clients' batch size.
    terms : Terms
        What limits the menu.

    Notes
    -----
    Each route is offered as it is. With what runs twice, only routes are that no other
    beats in memory and traffic, each for a few budgets: planning takes time.
    """
    routes = [route for route in _routes(profile) if _is_within(profile, route, terms)]
    plain = [_offer(profile, route, KEEP_ALL) for route in routes]
    planned: list[Offer] = []
    if terms.recompute:
        worth = set(routes_worth_a_plan(profile)) & set(routes)
        planned = [
            _offer(profile, route, choice.recompute)
            for route in routes
            if route in worth
            for choice in reversed(choices_of_route(profile, route))
            if not choice.recompute.is_empty
        ]
    return Menu(profile, (*plain, *planned))


def _routes(profile: ChainProfile) -> Iterator[Route]:
    yield Route.whole()
    yield from map(Route.split, range(len(profile.units) - 1, 0, -1))


def _is_within(profile: ChainProfile, route: Route, terms: Terms) -> bool:
    if not route.cuts:
        return True
    (cut,) = route.cuts
    return (
        terms.has_edges
        and cut >= terms.min_device_units
        and terms.kept_units <= frozenset(range(cut))
    )


def _offer(profile: ChainProfile, route: Route, recompute: RecomputePlan) -> Offer:
    memory = disk = 0
    if route.cuts:
        memory, disk = tail_bytes(profile, route.cuts[0], len(profile.units))
    return Offer(
        route=route,
        recompute=recompute,
        peak_bytes=predicted_peak_bytes(profile, route, recompute),
        work=work_of(profile, route, recompute),
        edge_memory_bytes=memory,
        edge_disk_bytes=disk,
    )
