"""Choose a client's route by a function, and check what that function chose."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from flwr_smartsplit.errors import InvalidRoute, NoFeasibleRoute, bytes_text
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import (
    floor_bytes,
    least_bytes,
    plan_recompute,
)
from flwr_smartsplit.plan.search_space import option_of, split_routes, u_shape_routes
from flwr_smartsplit.types import (
    GATE,
    KEEP_ALL,
    NO_CONSTRAINTS,
    ChainProfile,
    Constraints,
    DeviceProfile,
    Route,
    RouteOption,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """What is known when a client's route is chosen.

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
    constraints : Constraints
        What the user allows.
    """

    device: DeviceProfile
    profile: ChainProfile
    edges: tuple[str, ...] = ()
    index: int = 0
    constraints: Constraints = NO_CONSTRAINTS

    @property
    def edge(self) -> str | None:
        """The edge whose turn it is; None if there is none."""
        return self.edges[self.index % len(self.edges)] if self.edges else None

    @property
    def num_units(self) -> int:
        """The length of the chain."""
        return len(self.profile.units)


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
    return first_that_fits(split_routes(request.num_units, edge=request.edge), request)


def deepest_route(
    profile: ChainProfile, *, budget_bytes: int | None, edge: str | None
) -> Route:
    """Choose as ``deepest_split`` does, without a client; None means no limit."""
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
    routes = u_shape_routes(request.num_units, edge=request.edge)
    return first_that_fits(routes, request)


def cut_at_gate(request: RouteRequest) -> Route:
    """Choose the cut behind a gate, so that only its open channels cross.

    The deepest gate that fits; else what ``deepest_split`` chooses, which computes the
    same, and sends all of a boundary.

    Parameters
    ----------
    request : RouteRequest
        The client, the costs and the edges.

    Raises
    ------
    InvalidRoute
        If no cut lies behind a gate.
    NoFeasibleRoute
        With the least bytes that would do.
    """
    names = [unit.name.rpartition(".")[2] for unit in request.profile.units]
    cuts = [index + 1 for index, name in enumerate(names) if name == GATE]
    if not cuts:
        raise InvalidRoute(
            "cut_at_gate finds no gate that a cut follows: wrap Task.model_fn in "
            "gated(model_fn, after=...), with a module that no skip connection spans, "
            "or with Task(max_boundary_tensors=...)."
        )
    if request.edge is not None:
        at_gates = [Route.split(cut, edge=request.edge) for cut in reversed(cuts)]
        with suppress(NoFeasibleRoute):
            return first_that_fits(at_gates, request)
    return deepest_split(request)


def first_that_fits(routes: Iterable[Route], request: RouteRequest) -> Route:
    """Return the first of some routes that the client can take.

    Without recomputation if that is possible; else with, unless the constraints forbid
    it.

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
    budget_bytes, constraints = request.device.budget_bytes, request.constraints
    size = request.num_units
    allowed = [each for each in routes if constraints.allow(each, num_units=size)]
    if not allowed:
        raise NoFeasibleRoute(
            f"no route keeps the first {constraints.min_device_units} units on the "
            "device, and those whose state is its own "
            f"({sorted(constraints.kept_units)}): lower min_device_units, or let fewer "
            "names be local."
        )
    if budget_bytes is None:
        return allowed[0]
    tried: list[tuple[int, Route]] = []
    for peak, route in _peaks(allowed, request, budget_bytes):
        if peak <= budget_bytes:
            return route
        tried.append((peak, route))
    least, route = min(tried, key=lambda each: each[0])
    advice = ", give the strategy an edge" if request.edge is None else ""
    raise NoFeasibleRoute(
        f"no route fits: the cheapest ({route}) needs {bytes_text(least)} "
        f"at batch size {request.profile.batch_size}, the budget is "
        f"{bytes_text(budget_bytes)}. Lower the batch size{advice} or raise the "
        "budget.",
        needed_bytes=least,
        budget_bytes=budget_bytes,
    )


def _peaks(
    routes: Iterable[Route], request: RouteRequest, budget_bytes: int
) -> Iterator[tuple[int, Route]]:
    """Say what each route needs: as it is, and then with recomputation."""
    for route in routes:
        yield predicted_peak_bytes(request.profile, route), route
    if request.constraints.recompute:
        for route in routes:
            if floor_bytes(request.profile, route) <= budget_bytes:
                yield least_bytes(request.profile, route), route


def chosen_option(request: RouteRequest, choose_route: ChooseRoute) -> RouteOption:
    """Let a function choose a client's route, check it, and plan for its memory.

    Raises ``InvalidRoute`` if it cannot be laid along the chain or edges feed one
    another in circles, and ``NoFeasibleRoute`` if an edge, memory or a required unit is
    missing.
    """
    route = choose_route(request)
    _check_route(route, request)
    budget_bytes = request.device.budget_bytes
    recompute = KEEP_ALL
    if budget_bytes is not None:
        recompute = plan_recompute(request.profile, route, budget_bytes=budget_bytes)
    return option_of(request.profile, route, recompute).at(None)


def _check_route(route: Route, request: RouteRequest) -> None:
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
