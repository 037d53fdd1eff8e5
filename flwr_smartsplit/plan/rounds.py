"""plan_round: who trains what where. The one entry that strategies call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from random import Random

import numpy as np

from flwr_smartsplit.errors import NoFeasibleRoute
from flwr_smartsplit.plan.coding import CodecChoice, chosen_codecs, coded_profile
from flwr_smartsplit.plan.routes import ChooseRoute, RouteRequest, chosen_option
from flwr_smartsplit.plan.search_space import SearchSpace, search_space
from flwr_smartsplit.plan.selection.candidates import Candidate, candidates_of
from flwr_smartsplit.plan.selection.history import NO_HISTORY, History
from flwr_smartsplit.plan.selection.selection import Select, SelectionRequest
from flwr_smartsplit.plan.selection.speed_estimates import with_speeds
from flwr_smartsplit.plan.selection.utility import BY_UTILITY
from flwr_smartsplit.plan.timing import over_limit, round_seconds, why_over_limit
from flwr_smartsplit.types import (
    NO_CONSTRAINTS,
    RAW,
    WHOLE,
    BatchKind,
    ChainProfile,
    Codec,
    Constraints,
    DeviceProfile,
    EdgeProfile,
    RoundPlan,
    Route,
    RouteOption,
    Variant,
)

Profiles = Mapping[BatchKind, ChainProfile]
"""The chain's costs by batch size, or kind of batch."""

Found = tuple[list[Candidate], dict[str, str]]
"""Who has a route, and for all others, by client_key, why not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How clients and routes are chosen in a round.

    ``select`` chooses clients, and one option for each. ``codec`` is that of every cut,
    or chooses them. ``choose_route`` leaves one
    route to each client; without it, ``select`` sees all that fit. ``costs``
    returns those of a batch size in so many micro-batches under a variant; without it,
    nobody accumulates more than the profiles do, and everybody trains the whole model.
    """

    edges: tuple[EdgeProfile, ...] = ()
    select: Select = BY_UTILITY
    choose_route: ChooseRoute | None = None
    constraints: Constraints = NO_CONSTRAINTS
    codec: CodecChoice = RAW
    variants: tuple[Variant, ...] = ()
    costs: Callable[[BatchKind, int, Variant], ChainProfile] | None = None


def plan_round(  # noqa: PLR0913 - all that a plan hangs on
    fleet: Sequence[DeviceProfile],
    profiles: Profiles,
    *,
    round_number: int,
    num_clients: int,
    routing: Routing,
    rng: Random,
    history: History = NO_HISTORY,
) -> RoundPlan:
    """Plan one round: who has a route at all, and then who takes which.

    Rounds count from 1. The plan names every client: chosen, or skipped for a reason.
    ``InvalidRoute`` is raised if ``choose_route`` returns one that this chain lacks.
    """
    devices = [
        with_speeds(device, history.speeds.get(device.client_key), routing.edges)
        for device in sorted(fleet, key=lambda each: each.client_key)
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
    reasons = {**unfit, **selection.passed}
    return RoundPlan(
        round_number=round_number,
        assignments=tuple(sorted(selection.chosen, key=lambda each: each.client_key)),
        skipped={key: reasons[key] for key in sorted(reasons)},
        unfit=frozenset(unfit),
    )


def _free(
    devices: Sequence[DeviceProfile], profiles: Profiles, routing: Routing
) -> Found:
    """List everybody with all options within its budget."""
    candidates: list[Candidate] = []
    unfit: dict[str, str] = {}
    groups: dict[tuple[BatchKind, tuple[Codec, ...]], list[DeviceProfile]] = {}
    for device in devices:
        codecs = _codecs(device, profiles, routing)
        groups.setdefault((device.batch_kind, codecs), []).append(device)
    for (kind, codecs), group in groups.items():
        waiting, left_out = group, dict[str, str]()
        for variant, accumulate, plain in _profiles(kind, profiles, routing):
            profile = coded_profile(plain, codecs)
            space = _space(profile, (variant, accumulate), waiting, routing)
            found, left_out = candidates_of(waiting, space, routing.edges)
            candidates += found
            waiting = [each for each in waiting if each.client_key in left_out]
            if not waiting:
                break
        unfit |= left_out
    return sorted(candidates, key=lambda each: each.client_key), unfit


def _codecs(
    device: DeviceProfile,
    profiles: Profiles,
    routing: Routing,
    *,
    route: Route | None = None,
) -> tuple[Codec, ...]:
    """Choose the codec of each cut for a device, or those of a route's cuts."""
    profile = profiles[device.batch_kind]
    return chosen_codecs(routing.codec, device, profile, routing.edges, route=route)


def _profiles(
    kind: BatchKind, profiles: Profiles, routing: Routing
) -> Iterator[tuple[Variant, int, ChainProfile]]:
    """Yield the costs in 1, 2, 4, 8... micro-batches, then those under variants."""
    yield WHOLE, 1, profiles[kind]
    if routing.costs is None:
        return
    most = min(routing.constraints.max_accumulate, profiles[kind].batch_size)
    for variant in (WHOLE, *routing.variants):
        accumulate = 2 if variant == WHOLE else 1
        while accumulate <= most:
            yield variant, accumulate, routing.costs(kind, accumulate, variant)
            accumulate *= 2


def _space(
    profile: ChainProfile,
    how: tuple[Variant, int],
    devices: Sequence[DeviceProfile],
    routing: Routing,
) -> SearchSpace:
    """List the options; plans that recompute only where a budget is short."""
    constraints, has_edges = routing.constraints, bool(routing.edges)
    plain = replace(constraints, recompute=False)
    listed = partial(
        search_space, profile, has_edges=has_edges, variant=how[0], accumulate=how[1]
    )
    space = listed(plain)
    most = int(space.peaks.max())
    budgets = [device.budget_bytes for device in devices]
    is_short = any(budget is not None and budget < most for budget in budgets)
    if not (constraints.recompute and is_short):
        return space
    return listed(constraints)


def _routed(
    devices: Sequence[DeviceProfile],
    profiles: Profiles,
    routing: Routing,
    choose_route: ChooseRoute,
) -> Found:
    """List everybody with the one route that was chosen for it."""
    candidates: list[Candidate] = []
    unfit: dict[str, str] = {}
    edges = {edge.name: edge for edge in routing.edges}
    for index, device in enumerate(devices):
        request = RouteRequest(
            device=device,
            profile=profiles[device.batch_kind],
            edges=tuple(edges),
            index=index,
            constraints=routing.constraints,
        )
        costs = _profiles(device.batch_kind, profiles, routing)
        codecs = partial(_codecs, device, profiles, routing)
        try:
            option = _chosen(request, costs, choose_route, codecs)
        except NoFeasibleRoute as error:
            unfit[device.client_key] = str(error)
            continue
        edge = edges[option.route.edges()[0]] if option.route.edges() else None
        over = over_limit(option.work, device, [] if edge is None else [edge])
        if over is not None:
            unfit[device.client_key] = why_over_limit(*over)
            continue
        known = round_seconds(option.work, device, edge)
        seconds = nan if known is None else known
        space, only = SearchSpace(request.profile, (option,)), np.zeros(1, np.int64)
        candidates.append(
            Candidate(device, space, only, np.array([seconds]), 0, seconds)
        )
    return candidates, unfit


def _priced(request: RouteRequest, route: Route) -> RouteOption:
    """Check and plan a route that was chosen before."""
    return chosen_option(request, lambda _: route)


def _chosen(
    request: RouteRequest,
    profiles: Iterator[tuple[Variant, int, ChainProfile]],
    choose_route: ChooseRoute,
    codecs: Callable[..., tuple[Codec, ...]],
) -> RouteOption:
    """Let a route be chosen; if none fits, in more micro-batches, or a variant.

    It is chosen with the codecs of split routes, and priced with its own.
    """
    problem = NoFeasibleRoute("there are no costs to choose by.")
    for variant, accumulate, plain in profiles:
        try:
            profile = coded_profile(plain, codecs())
            option = chosen_option(replace(request, profile=profile), choose_route)
            route = option.route
            own = coded_profile(plain, codecs(route=route))
            if own != profile and route.cuts:
                option = _priced(replace(request, profile=own), route)
        except NoFeasibleRoute as error:
            problem = error
        else:
            return replace(option, accumulate=accumulate, variant=variant)
    raise problem
