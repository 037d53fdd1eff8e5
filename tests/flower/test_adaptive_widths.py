"""Adaptive widths in whole runs: what gradients and speeds say decides who is wide."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr_smartsplit import AdaptiveWidths, Checkpoints, DeviceTraits, Route
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.plan.routes import RouteRequest
from tests.flower.apps import legacy_app, message_app, run
from tests.flower.apps import smart_split as strategy_of
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import differences

EDGES = (LocalEdge(name="near"),)
RULE = AdaptiveWidths(rates=(1.0, 0.5, 0.25), window=0, delay=1)
SPEEDS = (1e9, 1e8, 1e6)


def clients(make: Any, edges: Any = ()) -> list[Any]:
    """Make three clients, each slower than the one before."""
    return [
        make(index, edges=edges, traits=DeviceTraits(flops_per_second=speed))
        for index, speed in enumerate(SPEEDS)
    ]


def trained(num_rounds: int = 4, **changes: Any) -> tuple[list[dict[str, str]], Any]:
    """Name what each client trained in each round; return the state, too."""
    edges = changes.pop("edges", ())
    strategy = strategy_of(edges, variants=changes.pop("variants", RULE), **changes)
    made = run(clients(message_app, edges), strategy, num_rounds=num_rounds)
    return names_of(made.strategy), made.state


def names_of(strategy: Any) -> list[dict[str, str]]:
    """Name what was planned, round by round."""
    return [
        {a.client_key: a.option.variant.name for a in plan.assignments}
        for plan in strategy.round_plans
    ]


def test_all_begin_narrow_and_the_fast_become_wide() -> None:
    """Two rounds fill the window; then the largest utility is whole."""
    names, _ = trained()
    assert set(names[0].values()) == set(names[1].values()) == {"width 0.25"}
    assert (names[2]["c0"], names[2]["c2"]) == ("whole", "width 0.25")


def test_both_apis_choose_the_same() -> None:
    """And train the same bits."""
    names, state = trained()
    old = legacy_smart_split((), variants=RULE)
    made = run_legacy(clients(legacy_app), old, num_rounds=4)
    assert names_of(old) == names
    assert differences(made.state, state) == []


def test_a_resumed_run_chooses_the_same(tmp_path: Path) -> None:
    """What was learned is in the checkpoint."""
    names, state = trained()
    trained(2, checkpoints=Checkpoints(tmp_path))
    resumed, again = trained(4, checkpoints=Checkpoints(tmp_path))
    assert resumed[-2:] == names[-2:]
    assert differences(again, state) == []


def test_routes_choose_the_same() -> None:
    """The edge's gradients count as the device's own do."""

    def split(request: RouteRequest) -> Route:
        return Route.split(4, edge="near")

    names, state = trained(variants=RULE)
    along, same = trained(edges=EDGES, choose_route=split)
    assert along == names
    assert differences(same, state) == []


def test_a_rule_that_forgets_the_time_is_seen() -> None:
    """The planted error: by their gradients alone, others would be wide."""
    names, _ = trained()
    other, _ = trained(variants=replace(RULE, beta=0.0))
    assert other[2:] != names[2:]
