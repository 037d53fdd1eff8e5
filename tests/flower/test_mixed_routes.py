"""All kinds of route in one round, through both strategies: FedAvg, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest

from flwr_smartsplit import Route, deepest_u_shape
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.flower.serde.records import plan_from_config
from flwr_smartsplit.plan.routes import RouteRequest
from tests.flower.apps import (
    apps,
    legacy_app,
    message_app,
    messages,
    peak_of,
    run,
    smart_split,
)
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import differences, tiny_chain

EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
ROUTES = {
    "c0": Route.whole(),
    "c1": Route.split(2, edge="far"),
    "c2": Route.u_shape(3, 7, edge="near"),
    "c3": Route.hops((1, 5), edges=("near", "far")),
    "c4": Route((2, 4, 8), ("device", "near", "far", "device")),
}
NUM_CLIENTS = len(ROUTES)


def by_key(request: RouteRequest) -> Route:
    """Give each client its own kind of route."""
    return ROUTES[request.device.client_key]


def clients(make: Callable[..., Any]) -> list[Any]:
    """Make five clients that can reach both edges."""
    return [make(index, edges=EDGES) for index in range(NUM_CLIENTS)]


def mixed(**changes: Any) -> Any:
    """Make the strategy that mixes all kinds."""
    facts = {"choose_route": by_key, "fraction_evaluate": 1.0}
    return smart_split(EDGES, **{**facts, **changes})


@pytest.fixture(scope="module")
def whole_run() -> Any:
    """Train the same clients whole."""
    return run(clients(message_app), smart_split((), fraction_evaluate=1.0))


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_a_mixed_round_is_fedavg_bit_for_bit(
    make: Callable[..., Any], whole_run: Any
) -> None:
    """States after two rounds, training metrics and evaluation along the routes."""
    made = run(clients(make), mixed())
    assert made.kinds() == []
    routes = {
        a.client_key: a.option.route for a in made.strategy.round_plans[0].assignments
    }
    assert routes == ROUTES
    assert differences(made.state, whole_run.state) == []
    for phase in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        rounds = getattr(made.result, phase)
        expected = getattr(whole_run.result, phase)
        assert rounds.keys() == expected.keys() == {1, 2}
        for number, metrics in rounds.items():
            assert metrics["loss"] == expected[number]["loss"]


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_a_mixed_round_under_the_legacy_api_too(
    make: Callable[..., Any], whole_run: Any
) -> None:
    """The same bits."""
    strategy = legacy_smart_split(EDGES, choose_route=by_key, fraction_evaluate=1.0)
    made = run_legacy(clients(make), strategy)
    assert made.kinds() == []
    assert differences(made.state, whole_run.state) == []


def test_a_device_that_gets_the_end_back_is_sent_both_parts() -> None:
    """First and last units, and nothing of what lies between."""
    made = run(clients(message_app), mixed(), num_rounds=1)
    chain = tiny_chain()
    for message in messages(made.grid, "train", "evaluate"):
        (config,) = message.content.config_records.values()
        plan = plan_from_config(config)
        assert plan is not None
        own = [
            name
            for leg in plan.route.device_legs(len(chain))
            for name in chain.state_names(leg.start, leg.stop)
        ]
        (arrays,) = message.content.array_records.values()
        assert list(arrays) == own


def test_labels_stay_on_weak_devices() -> None:
    """A policy of the package: u-shaped where the whole model does not fit."""
    budget = peak_of(Route.u_shape(1, 8))
    strategy = smart_split(choose_route=deepest_u_shape)
    made = run([*apps([None, budget, 10**9]), message_app(3, 10)], strategy)
    plan = strategy.round_plans[0]
    routes = {a.client_key: str(a.option.route) for a in plan.assignments}
    assert routes["c0"] == routes["c2"] == "whole"
    assert routes["c1"].endswith("device[8:]")
    assert "no route fits" in plan.skipped["c3"]
    assert made.kinds() == []


def test_a_route_that_is_too_large_sits_out() -> None:
    """A function of the user's own cannot break a budget."""
    strategy = smart_split(choose_route=lambda request: Route.whole())
    made = run(apps([None, 10, None]), strategy, num_rounds=1)
    assert made.kinds() == []
    assert "the budget is 10 B" in strategy.round_plans[0].skipped["c1"]


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (Route.split(99), "cut 99 is outside a chain of 9 units"),
        (Route.hops((1, 2), edges=("far", "near")), "against the strategy's order"),
        ("whole", "choose_route returns a str"),
    ],
)
def test_a_route_that_cannot_be_is_an_error(route: Any, message: str) -> None:
    """It is the program that is wrong, not one client."""
    with pytest.raises(InvalidRoute, match=message):
        run(clients(message_app), mixed(choose_route=lambda request: route))


def test_an_edge_that_is_not_there_leaves_its_client_out() -> None:
    """With the reason; the others train."""
    strategy = mixed(
        choose_route=lambda request: (
            Route.split(2, edge="moon") if request.index == 1 else Route.whole()
        )
    )
    run(clients(message_app), strategy, num_rounds=1)
    plan = strategy.round_plans[0]
    assert "needs the edges ['moon']" in plan.skipped["c1"]
    assert len(plan.assignments) == NUM_CLIENTS - 1
