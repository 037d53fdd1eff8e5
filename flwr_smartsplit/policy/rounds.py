"""plan_round: who trains what where. The one entry that strategies call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from flwr_smartsplit.errors import NoFeasibleRoute
from flwr_smartsplit.policy.cuts import (
    ChooseRoute,
    RouteRequest,
    check_route,
    deepest_split,
    plan_of,
)
from flwr_smartsplit.policy.predict import predicted_peak_bytes
from flwr_smartsplit.policy.selection import sample_clients
from flwr_smartsplit.types import (
    Assignment,
    ChainProfile,
    DeviceProfile,
    RoundPlan,
)

NOT_SAMPLED = "not sampled in this round"


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How routes are chosen in a round.

    Parameters
    ----------
    edges : tuple[str, ...]
        Names of the edges that are ready; clients are dealt out to them in
        client_key order.
    choose_route : Callable[[RouteRequest], Route]
        Chooses the route of one client.
    kept_units : frozenset[int]
        Units that must be on the device on every route.
    recompute : bool
        Whether a device may recompute activations where nothing else fits.
    """

    edges: tuple[str, ...] = ()
    choose_route: ChooseRoute = deepest_split
    kept_units: frozenset[int] = frozenset()
    recompute: bool = True


def plan_round(
    fleet: Sequence[DeviceProfile],
    profiles: Mapping[int, ChainProfile],
    *,
    round_number: int,
    num_clients: int,
    routing: Routing,
    rng: Random,
) -> RoundPlan:
    """Plan one round: feasible routes first, then a sample of who has one.

    Parameters
    ----------
    fleet : Sequence[DeviceProfile]
        Every client that could take part.
    profiles : Mapping[int, ChainProfile]
        The chain's costs by batch size.
    round_number : int
        The round, counted from 1.
    num_clients : int
        How many to choose.
    routing : Routing
        How each client's route is chosen.
    rng : random.Random
        Where chance comes from.

    Returns
    -------
    RoundPlan
        Assignments in client_key order, and for everybody else the reason.

    Raises
    ------
    InvalidRoute
        If ``choose_route`` returns a route that this chain cannot have.
    """
    assignments: dict[str, Assignment] = {}
    skipped: dict[str, str] = {}
    for index, device in enumerate(sorted(fleet, key=_client_key)):
        request = _request(device, profiles[device.batch_size], index, routing)
        try:
            assignments[device.client_key] = _assigned(request, routing)
        except NoFeasibleRoute as error:
            skipped[device.client_key] = str(error)
    chosen = sample_clients(list(assignments), num_clients=num_clients, rng=rng)
    skipped |= {key: NOT_SAMPLED for key in assignments if key not in chosen}
    return RoundPlan(
        round_number=round_number,
        assignments=tuple(a for key, a in assignments.items() if key in chosen),
        skipped=skipped,
    )


def _request(
    device: DeviceProfile, profile: ChainProfile, index: int, routing: Routing
) -> RouteRequest:
    return RouteRequest(
        device=device,
        profile=profile,
        edges=routing.edges,
        index=index,
        kept_units=routing.kept_units,
        recompute=routing.recompute,
    )


def _assigned(request: RouteRequest, routing: Routing) -> Assignment:
    """Choose a client's route, and what it runs twice on it.

    Raises
    ------
    NoFeasibleRoute
        If it can take none.
    """
    route = routing.choose_route(request)
    check_route(route, request)
    recompute = plan_of(route, request)
    return Assignment(
        client_key=request.device.client_key,
        route=route,
        budget_bytes=request.device.budget_bytes,
        predicted_peak_bytes=predicted_peak_bytes(request.profile, route, recompute),
        recompute=recompute,
    )


def _client_key(device: DeviceProfile) -> str:
    return device.client_key
