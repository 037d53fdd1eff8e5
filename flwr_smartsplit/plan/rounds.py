"""plan_round: who trains what where. The one entry that strategies call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from random import Random

import numpy as np

from flwr_smartsplit.errors import NoFeasibleRoute
from flwr_smartsplit.plan.codec_choice import CodecChoice, chosen_codecs
from flwr_smartsplit.plan.coding import coded_profile
from flwr_smartsplit.plan.routes import ChooseRoute, RouteRequest, chosen_option
from flwr_smartsplit.plan.search_space import SearchSpace, joined, search_space
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

Codings = tuple[tuple[Codec, ...], ...]
"""Choices of the codec at each cut of a chain, the most wanted first."""

Offers = Callable[[DeviceProfile], tuple[Variant, ...]]


def _whole(device: DeviceProfile) -> tuple[Variant, ...]:
    del device
    return (WHOLE,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How clients and routes are chosen in a round.

    ``select`` chooses clients, and one option for each. ``codec`` says what each cut
    may have, and of several the fastest is best. ``choose_route`` leaves one
    route to each client; without it, ``select`` sees all that fit. ``costs``
    returns those of a batch size in so many micro-batches under a variant; without it,
    nobody accumulates more than the profiles do, and everybody trains the whole model.
    ``variants`` says which a device is offered, the most wanted first.
    """

    edges: tuple[EdgeProfile, ...] = ()
    select: Select = BY_UTILITY
    choose_route: ChooseRoute | None = None
    constraints: Constraints = NO_CONSTRAINTS
    codec: CodecChoice = RAW
    variants: Offers = _whole
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
        with_speeds(device, history.steps.get(device.client_key, ()), routing.edges)
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


_Alike = tuple[BatchKind, Codings, tuple[Variant, ...]]
"""What devices have in common that see the same options."""


def _free(
    devices: Sequence[DeviceProfile], profiles: Profiles, routing: Routing
) -> Found:
    """List everybody with all options within its budget."""
    candidates: list[Candidate] = []
    unfit: dict[str, str] = {}
    groups: dict[_Alike, list[DeviceProfile]] = {}
    for device in devices:
        codings = _codings(device, profiles, routing)
        alike = device.batch_kind, codings, routing.variants(device)
        groups.setdefault(alike, []).append(device)
    for (kind, codings, variants), group in groups.items():
        waiting, left_out = group, dict[str, str]()
        for variant, accumulate, plain in _profiles(kind, variants, profiles, routing):
            how = variant, accumulate
            coded = (coded_profile(plain, codecs) for codecs in codings)
            space = joined([_space(each, how, waiting, routing) for each in coded])
            found, left_out = candidates_of(waiting, space, routing.edges)
            candidates += found
            waiting = [each for each in waiting if each.client_key in left_out]
            if not waiting:
                break
        unfit |= left_out
    return sorted(candidates, key=lambda each: each.client_key), unfit


def _codings(
    device: DeviceProfile,
    profiles: Profiles,
    routing: Routing,
    *,
    route: Route | None = None,
) -> Codings:
    """Choose what each cut may have for a device, or those of a route."""
    profile = profiles[device.batch_kind]
    return chosen_codecs(routing.codec, device, profile, routing.edges, route=route)


def _profiles(
    kind: BatchKind,
    variants: Sequence[Variant],
    profiles: Profiles,
    routing: Routing,
) -> Iterator[tuple[Variant, int, ChainProfile]]:
    """Yield the costs under each variant in 1, 2, 4, 8... micro-batches."""
    most = min(routing.constraints.max_accumulate, profiles[kind].batch_size)
    for variant in variants:
        accumulate = 1
        while accumulate <= most:
            if (variant, accumulate) == (WHOLE, 1):
                yield WHOLE, 1, profiles[kind]
            elif routing.costs is not None:
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
        variants = routing.variants(device)
        costs = _profiles(device.batch_kind, variants, profiles, routing)
        codings = partial(_codings, device, profiles, routing)
        try:
            options = _chosen(request, costs, choose_route, codings)
        except NoFeasibleRoute as error:
            unfit[device.client_key] = str(error)
            continue
        at = [edges[name] for name in options[0].route.edges()]
        found = _fastest(device, request.profile, options, at)
        if isinstance(found, str):
            unfit[device.client_key] = found
        else:
            candidates.append(found)
    return candidates, unfit


def _fastest(
    device: DeviceProfile,
    profile: ChainProfile,
    options: Sequence[RouteOption],
    edges: Sequence[EdgeProfile],
) -> Candidate | str:
    """Make a candidate of one route under several codecs, or say why it is none."""
    over = [over_limit(option.work, device, edges[:1]) for option in options]
    kept = [o for o, limit in zip(options, over, strict=True) if limit is None]
    if not kept:
        return why_over_limit(*min(filter(None, over)))
    known = [round_seconds(option.work, device, *edges) for option in kept]
    seconds = np.array([nan if each is None else each for each in known])
    best = 0 if None in known else int(seconds.argmin())
    fits = np.arange(len(kept), dtype=np.int64)
    space = SearchSpace(profile, tuple(kept))
    return Candidate(device, space, fits, seconds, best, float(seconds[best]))


def _priced(request: RouteRequest, route: Route) -> RouteOption:
    """Check and plan a route that was chosen before."""
    return chosen_option(request, lambda _: route)


def _chosen(
    request: RouteRequest,
    profiles: Iterator[tuple[Variant, int, ChainProfile]],
    choose_route: ChooseRoute,
    codings: Callable[..., Codings],
) -> list[RouteOption]:
    """Let a route be chosen; if none fits, in more micro-batches, or a variant.

    It is chosen with the first codecs of split routes, and priced with each of its own.
    """
    problem = NoFeasibleRoute("there are no costs to choose by.")
    for variant, accumulate, plain in profiles:
        try:
            profile = coded_profile(plain, codings()[0])
            option = chosen_option(replace(request, profile=profile), choose_route)
        except NoFeasibleRoute as error:
            problem = error
            continue
        found: list[RouteOption] = []
        route = option.route
        for codecs in codings(route=route):
            own = coded_profile(plain, codecs)
            is_same = own == profile or not route.cuts
            try:
                found.append(
                    option if is_same else _priced(replace(request, profile=own), route)
                )
            except NoFeasibleRoute as error:
                problem = error
        if found:
            return [
                replace(each, accumulate=accumulate, variant=variant)
                for each in dict.fromkeys(found)
            ]
    raise problem
