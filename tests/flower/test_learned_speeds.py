"""Clients that say nothing of their speed: both APIs learn it from their steps."""

from typing import Any

import pytest
from flwr.app import Context
from flwr.clientapp import ClientApp

from flwr_smartsplit import (
    DeviceTraits,
    RecomputePlan,
    Route,
    SmartSplitNumPyClient,
)
from flwr_smartsplit.flower.rounds.observations import measured_seconds
from flwr_smartsplit.types import ClientPlan
from tests.flower.apps import make_client, run, smart_split
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.flower.test_moved_clients import EDGES, KINDS, Kind
from tests.tasks import differences

NUM_ROUNDS = 3


def paced(plan: ClientPlan, route: Route, recompute: RecomputePlan) -> float:
    """Let c0 be slow at whatever it does itself, and c1 be quick."""
    del recompute
    at_device = route.cuts[0] if route.cuts else 9
    return at_device * (1.0 if plan.client_key == "c0" else 1e-9) + 1e-3


def apps(kind: Kind) -> list[ClientApp]:
    """Make two clients with room for the whole model."""
    return clients(kind, step_seconds=paced)


def clients(kind: Kind, **changes: Any) -> list[ClientApp]:
    """Make two clients."""

    def app(index: int) -> ClientApp:
        def client_fn(context: Context) -> SmartSplitNumPyClient:
            return make_client(index, edges=EDGES, context=context, **changes)

        return kind(client_fn)

    return [app(index) for index in range(2)]


def run_with(kind: Kind, **changes: Any) -> Any:
    """Run the clients under the strategy that speaks their API."""
    if kind is KINDS[0]:
        strategy = smart_split(EDGES, **changes)
        return run(apps(kind), strategy, num_rounds=NUM_ROUNDS)
    legacy = legacy_smart_split(EDGES, **changes)
    return run_legacy(apps(kind), legacy, num_rounds=NUM_ROUNDS)


@pytest.mark.every(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learns", [True, False])
def test_a_slow_client_leaves_more_to_the_edge_once_it_was_seen(
    kind: Kind, *, learns: bool
) -> None:
    """Only if somebody says what times count; and it changes no number."""
    rows: list[Any] = []
    seconds = {"client_seconds": measured_seconds} if learns else {}
    ended = run_with(kind, on_row=(rows.append,), **seconds)
    routes: dict[str, list[str]] = {"c0": [], "c1": []}
    for row in rows:
        if row["kind"] == "client" and row["phase"] == "train":
            routes[row["client_key"]].append(row["route"])
    assert routes["c0"][0] == "whole"
    assert (routes["c0"][-1] != "whole") == learns
    plain = run_with(kind)
    assert differences(ended.state, plain.state) == []


@pytest.mark.every(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learns", [True, False])
def test_a_link_that_nobody_tells_gets_its_codec_once_it_was_seen(
    kind: Kind, *, learns: bool
) -> None:
    """Each client tells its speed only; c0's way takes a second a step, c1's none."""

    def at_a_relu(plan: ClientPlan, route: Route, recompute: RecomputePlan) -> float:
        del route, recompute
        return 1.0 if plan.client_key == "c0" else 1e-8

    rows: list[Any] = []
    made = clients(
        kind, step_seconds=at_a_relu, traits=DeviceTraits(flops_per_second=1e12)
    )
    seconds = {"client_seconds": measured_seconds} if learns else {}
    options: dict[str, Any] = {
        "choose_route": lambda _: Route.split(3, edge="near"),
        "on_row": (rows.append,),
        **seconds,
    }
    if kind is KINDS[0]:
        run(made, smart_split(EDGES, **options), num_rounds=NUM_ROUNDS)
    else:
        legacy = legacy_smart_split(EDGES, **options)
        run_legacy(made, legacy, num_rounds=NUM_ROUNDS)
    codecs: dict[str, list[Any]] = {"c0": [], "c1": []}
    for row in rows:
        if row["kind"] == "client" and row["phase"] == "train":
            codecs[row["client_key"]].append(row.get("codecs", []))
    packed = [["packed"]] * (NUM_ROUNDS - 1) if learns else [[]] * (NUM_ROUNDS - 1)
    assert codecs == {"c0": [[], *packed], "c1": [[]] * NUM_ROUNDS}
