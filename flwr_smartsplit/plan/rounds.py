"""plan_round: who trains what where. The one entry that strategies call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from random import Random

import numpy as np

from flwr_smartsplit.errors import NoFeasibleRoute
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.menu import Menu, Offer, Terms, menu_of
from flwr_smartsplit.plan.routes import (
    ChooseRoute,
    RouteRequest,
    check_route,
    plan_of,
)
from flwr_smartsplit.plan.selection.by_utility import BY_UTILITY
from flwr_smartsplit.plan.selection.candidates import (
    Candidate,
    by_batch_size,
    candidates_of,
)
from flwr_smartsplit.plan.selection.history import NO_HISTORY, History
from flwr_smartsplit.plan.selection.selection import Chosen, Select, SelectionRequest
from flwr_smartsplit.plan.selection.speed_estimates import with_speeds
from flwr_smartsplit.plan.timing import round_seconds, work_of
from flwr_smartsplit.types import (
    Assignment,
    ChainProfile,
    DeviceProfile,
    EdgeProfile,
    RoundPlan,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How clients and routes are chosen in a round.

    Parameters
    ----------
    edges : tuple[EdgeProfile, ...]
        The edges that are ready.
    select : Callable[[SelectionRequest], Selection]
        Chooses clients, with one of the routes and plans that each can take.
    choose_route : Callable[[RouteRequest], Route], optional
        Chooses the route of each client beforehand; without it, ``select`` may choose
        from all.
    kept_units : frozenset[int]
        Units that must be on the device on every route.
    min_device_units : int
        How many units a cut leaves on the device at least.
    recompute : bool
        Whether a device may recompute activations.
    """

    edges: tuple[EdgeProfile, ...] = ()
    select: Select = BY_UTILITY
    choose_route: ChooseRoute | None = None
    kept_units: frozenset[int] = frozenset()
    min_device_units: int = 1
    recompute: bool = True


def plan_round(  # noqa: PLR0913 - all that a plan hangs on
    fleet: Sequence[DeviceProfile],
    profiles: Mapping[int, ChainProfile],
    *,
    round_number: int,
    num_clients: int,
    routing: Routing,
    rng: Random,
    history: History = NO_HISTORY,
) -> RoundPlan:
    """Plan one round: who has a route at all, and then who takes which.

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
        How clients and routes are chosen.
    rng : random.Random
        Where chance comes from.
    history : History
        What earlier rounds brought.

    Returns
    -------
    RoundPlan
        Assignments in client_key order, and for everybody else the reason.

    Raises
    ------
    InvalidRoute
        If ``choose_route`` returns a route that this chain cannot have.
    """
    devices = [
        with_speeds(device, history.speeds.get(device.client_key), routing.edges)
        for device in sorted(fleet, key=_client_key)
    ]
    if routing.choose_route is None:
        candidates, unfit = _free(devices, profiles, routing)
    else:
        candidates, unfit = _routed(devices, profiles, routing, routing.choose_route)
    selection = routing.select(
        SelectionRequest(
            candidates=candidates,
            num_clients=num_clients,
            round_number=round_number,
            edges=routing.edges,
            history=history,
            rng=rng,
        )
    )
    chosen = sorted(
        selection.chosen, key=lambda each: _client_key(each.candidate.device)
    )
    reasons = {**unfit, **selection.passed}
    return RoundPlan(
        round_number=round_number,
        assignments=tuple(map(_assigned, chosen)),
        skipped={key: reasons[key] for key in sorted(reasons)},
        unfit=frozenset(unfit),
    )


def _free(
    devices: Sequence[DeviceProfile],
    profiles: Mapping[int, ChainProfile],
    routing: Routing,
) -> tuple[list[Candidate], dict[str, str]]:
    """List everybody with all offers within its budget."""
    candidates: list[Candidate] = []
    unfit: dict[str, str] = {}
    for batch_size, group in by_batch_size(devices).items():
        menu = _menu(profiles[batch_size], group, routing)
        found, left_out = candidates_of(group, menu, routing.edges)
        candidates += found
        unfit |= left_out
    return sorted(candidates, key=lambda each: _client_key(each.device)), unfit


def _menu(
    profile: ChainProfile, devices: Sequence[DeviceProfile], routing: Routing
) -> Menu:
    """Make the menu; plans that recompute only where a budget is short."""
    terms = Terms(
        has_edges=bool(routing.edges),
        kept_units=routing.kept_units,
        min_device_units=routing.min_device_units,
        recompute=False,
    )
    menu = menu_of(profile, terms)
    most = int(menu.peaks.max(initial=0))
    budgets = [device.budget_bytes for device in devices]
    is_short = any(budget is not None and budget < most for budget in budgets)
    if not (routing.recompute and is_short):
        return menu
    return menu_of(
        profile,
        Terms(
            has_edges=terms.has_edges,
            kept_units=terms.kept_units,
            min_device_units=terms.min_device_units,
        ),
    )


def _routed(
    devices: Sequence[DeviceProfile],
    profiles: Mapping[int, ChainProfile],
    routing: Routing,
    choose_route: ChooseRoute,
) -> tuple[list[Candidate], dict[str, str]]:
    """List everybody with the one route that was chosen for it."""
    candidates: list[Candidate] = []
    unfit: dict[str, str] = {}
    edges = {edge.name: edge for edge in routing.edges}
    for index, device in enumerate(devices):
        request = RouteRequest(
            device=device,
            profile=profiles[device.batch_size],
            edges=tuple(edges),
            index=index,
            kept_units=routing.kept_units,
            recompute=routing.recompute,
            min_device_units=routing.min_device_units,
        )
        try:
            offer = _only_offer(request, choose_route)
        except NoFeasibleRoute as error:
            unfit[device.client_key] = str(error)
            continue
        edge = edges[offer.route.edges()[0]] if offer.route.edges() else None
        known = round_seconds(offer.work, device, edge)
        seconds = nan if known is None else known
        menu = Menu(request.profile, (offer,))
        only = np.zeros(1, np.int64)
        candidates.append(
            Candidate(device, menu, only, np.array([seconds]), 0, seconds)
        )
    return candidates, unfit


def _only_offer(request: RouteRequest, choose_route: ChooseRoute) -> Offer:
    """Let a client's route be chosen, and plan what it runs twice on it.

    Raises
    ------
    NoFeasibleRoute
        If it can take none.
    """
    route = choose_route(request)
    check_route(route, request)
    recompute = plan_of(route, request)
    return Offer(
        route=route,
        recompute=recompute,
        peak_bytes=predicted_peak_bytes(request.profile, route, recompute),
        work=work_of(request.profile, route, recompute),
        is_placed=True,
    )


def _assigned(chosen: Chosen) -> Assignment:
    candidate, offer = chosen.candidate, chosen.offer
    (taken,) = (candidate.fits == candidate.menu.offers.index(offer)).nonzero()
    seconds = float(candidate.seconds[taken[0]])
    return Assignment(
        client_key=candidate.device.client_key,
        route=offer.at(chosen.edge),
        budget_bytes=candidate.device.budget_bytes,
        predicted_peak_bytes=offer.peak_bytes,
        recompute=offer.recompute,
        predicted_seconds=None if isnan(seconds) else seconds,
        why=chosen.why,
        features=chosen.features,
    )


def _client_key(device: DeviceProfile) -> str:
    return device.client_key
