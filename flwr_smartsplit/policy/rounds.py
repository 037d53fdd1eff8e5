"""plan_round: who trains what where. The one entry that strategies call."""

from collections.abc import Mapping, Sequence
from random import Random

from flwr_smartsplit.errors import NoFeasibleRoute
from flwr_smartsplit.policy.cuts import deepest_route
from flwr_smartsplit.policy.predict import predicted_peak_bytes
from flwr_smartsplit.policy.selection import sample_clients
from flwr_smartsplit.types import (
    Assignment,
    ChainProfile,
    DeviceProfile,
    RoundPlan,
)

NOT_SAMPLED = "not sampled in this round"


def plan_round(
    fleet: Sequence[DeviceProfile],
    profiles: Mapping[int, ChainProfile],
    *,
    round_number: int,
    num_clients: int,
    edges: Sequence[str],
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
    edges : Sequence[str]
        Names of the edges that can host tails; clients are dealt out to them in
        client_key order.
    rng : random.Random
        Where chance comes from.

    Returns
    -------
    RoundPlan
        Assignments in client_key order, and for everybody else the reason.
    """
    assignments: dict[str, Assignment] = {}
    skipped: dict[str, str] = {}
    for index, device in enumerate(sorted(fleet, key=_client_key)):
        edge = edges[index % len(edges)] if edges else None
        profile = profiles[device.batch_size]
        try:
            route = deepest_route(profile, budget_bytes=device.budget_bytes, edge=edge)
        except NoFeasibleRoute as error:
            skipped[device.client_key] = str(error)
            continue
        assignments[device.client_key] = Assignment(
            client_key=device.client_key,
            route=route,
            budget_bytes=device.budget_bytes,
            predicted_peak_bytes=predicted_peak_bytes(profile, route),
        )
    chosen = sample_clients(list(assignments), num_clients=num_clients, rng=rng)
    skipped |= {key: NOT_SAMPLED for key in assignments if key not in chosen}
    return RoundPlan(
        round_number=round_number,
        assignments=tuple(a for key, a in assignments.items() if key in chosen),
        skipped=skipped,
    )


def _client_key(device: DeviceProfile) -> str:
    return device.client_key
