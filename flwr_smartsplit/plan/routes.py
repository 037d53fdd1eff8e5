"""Which routes fit a client's memory, and which of them to take.

The first policies: the route that fits with the most units on the device, since it
leaves the least leaky boundary. Peaks do not grow evenly with depth (a pooled boundary
can cost less than the one before it), so every cut is tried.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flwr_smartsplit.errors import InvalidRoute, NoFeasibleRoute, bytes_text
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import (
    floor_bytes,
    least_bytes,
    plan_recompute,
)
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    DeviceProfile,
    RecomputePlan,
    Route,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """What there is to know when a client's route is chosen.

    Parameters
    ----------
    device : DeviceProfile
        The client.
    profile : ChainProfile
        Exact costs at the client's batch size.
    edges : tuple[str, ...]
        The edges that are ready, in the strategy's order.
    index : int
        The client's place in client_key order, to deal clients out to edges.
    kept_units : frozenset[int]
        Units that must be on the device, since their state is the client's own.
    recompute : bool
        Whether the device may recompute activations where nothing else fits.
    min_device_units : int
        Fewest units that a cut leaves at the device.
    """

    device: DeviceProfile
    profile: ChainProfile
    edges: tuple[str, ...] = ()
    index: int = 0
    kept_units: frozenset[int] = frozenset()
    recompute: bool = True
    min_device_units: int = 1

    @property
    def edge(self) -> str | None:
        """The edge that is this client's turn; None if there is none."""
        return self.edges[self.index % len(self.edges)] if self.edges else None

    @property
    def num_units(self) -> int:
        """The length of the chain."""
        return len(self.profile.units)

    def keeps(self, route: Route) -> bool:
        """Say whether the units that must be on the device are there."""
        if route.cuts and route.cuts[0] < self.min_device_units:
            return False
        if not self.kept_units:
            return True
        on_device: set[int] = set()
        for leg in route.device_legs(self.num_units):
            on_device |= set(range(leg.start, leg.stop))
        return self.kept_units <= on_device


ChooseRoute = Callable[[RouteRequest], Route]
"""Chooses a client's route, or raises ``NoFeasibleRoute`` if it has none."""


def deepest_split(request: RouteRequest) -> Route:
    """Choose the whole model if it fits, else the deepest single cut that does.

    Parameters
    ----------
    request : RouteRequest
        The client, the costs and the edges.

    Raises
    ------
    NoFeasibleRoute
        With the least bytes that would do.
    """
    return first_that_fits(_whole_or_split(request), request)


def _whole_or_split(request: RouteRequest) -> Iterator[Route]:
    yield Route.whole()
    if request.edge is not None:
        for cut in range(request.num_units - 1, 0, -1):
            yield Route.split(cut, edge=request.edge)


def deepest_route(
    profile: ChainProfile, *, budget_bytes: int | None, edge: str | None
) -> Route:
    """Choose as ``deepest_split`` does, for a budget without a client.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the batch size.
    budget_bytes : int or None
        What the device's tensors may take; None means no limit.
    edge : str or None
        The edge that may host the rest; None allows whole models only.
    """
    device = DeviceProfile(
        client_key="",
        budget_bytes=budget_bytes,
        num_examples=0,
        batch_size=profile.batch_size,
    )
    edges = () if edge is None else (edge,)
    return deepest_split(RouteRequest(device=device, profile=profile, edges=edges))


def deepest_u_shape(request: RouteRequest) -> Route:
    """Choose a route whose labels stay on the device.

    The whole model if it fits; else as few of the last units as possible, and then as
    many of the first ones as fit.

    Parameters
    ----------
    request : RouteRequest
        The client, the costs and the edges.

    Raises
    ------
    NoFeasibleRoute
        With the least bytes that would do.
    """
    return first_that_fits(_whole_or_u_shape(request), request)


def _whole_or_u_shape(request: RouteRequest) -> Iterator[Route]:
    yield Route.whole()
    if request.edge is not None:
        for last in range(request.num_units - 1, 1, -1):
            for first in range(last - 1, 0, -1):
                yield Route.u_shape(first, last, edge=request.edge)


def first_that_fits(routes: Iterable[Route], request: RouteRequest) -> Route:
    """Return the first of some routes that the client can take.

    Without running anything twice, if that is possible; else with, unless the request
    forbids it.

    Parameters
    ----------
    routes : Iterable[Route]
        In the order of preference.
    request : RouteRequest
        The client, the costs and the edges.

    Raises
    ------
    NoFeasibleRoute
        With the least bytes that would do.
    """
    budget_bytes = request.device.budget_bytes
    kept = list(filter(request.keeps, routes))
    if budget_bytes is None and kept:
        return kept[0]
    needs = _least_first(kept, request)
    least: tuple[int, Route] | None = None
    for peak, route in needs:
        if budget_bytes is not None and peak <= budget_bytes:
            return route
        if least is None or peak < least[0]:
            least = (peak, route)
    if least is None or budget_bytes is None:
        raise NoFeasibleRoute(
            f"no route keeps the first {request.min_device_units} units on the device, "
            f"and those whose state is its own ({sorted(request.kept_units)}): lower "
            "min_device_units, or let fewer names be local.",
        )
    advice = ", give the strategy an edge" if request.edge is None else ""
    raise NoFeasibleRoute(
        f"no route fits: the cheapest ({least[1]}) needs {bytes_text(least[0])} "
        f"at batch size {request.profile.batch_size}, the budget is "
        f"{bytes_text(budget_bytes)}. Lower the batch size{advice} or raise the "
        "budget.",
        needed_bytes=least[0],
        budget_bytes=budget_bytes,
    )


def _least_first(
    routes: Iterable[Route], request: RouteRequest
) -> Iterator[tuple[int, Route]]:
    """Say what each route needs: as it is, and then with what can run twice."""
    for route in routes:
        yield predicted_peak_bytes(request.profile, route), route
    if request.recompute:
        budget_bytes = request.device.budget_bytes or 0
        for route in routes:
            if floor_bytes(request.profile, route) <= budget_bytes:
                yield least_bytes(request.profile, route), route


def plan_of(route: Route, request: RouteRequest) -> RecomputePlan:
    """Choose what a client recomputes on a route that was checked."""
    budget_bytes = request.device.budget_bytes
    if budget_bytes is None:
        return KEEP_ALL
    return plan_recompute(request.profile, route, budget_bytes=budget_bytes)


def check_route(route: Route, request: RouteRequest) -> None:
    """Make sure that a client can take a route that was chosen for it.

    Raises
    ------
    InvalidRoute
        If it cannot be laid along the chain, or edges feed one another in circles.
    NoFeasibleRoute
        If an edge is not there, the memory is not enough, or the device lacks units
        that it must have.
    """
    if not isinstance(route, Route):
        raise InvalidRoute(
            f"choose_route returns a {type(route).__name__} for client "
            f"{request.device.client_key!r}; return a Route."
        )
    route.legs(request.num_units)
    missing = [edge for edge in route.edges() if edge not in request.edges]
    if missing:
        raise NoFeasibleRoute(
            f"route {route} needs the edges {missing}; ready are {list(request.edges)}."
        )
    order = [request.edges.index(edge) for edge in route.edges()]
    if order != sorted(order):
        raise InvalidRoute(
            f"route {route} visits edges against the strategy's order "
            f"{list(request.edges)}: edges that wait for each other could wait for "
            "ever. Reorder the strategy's edges, or the route."
        )
    first_that_fits([route], request)
