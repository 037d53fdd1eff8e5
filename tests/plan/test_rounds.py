"""plan_round: everybody has a route or a reason, and the fleet's order is no matter."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.plan.rounds import Routing, plan_round
from flwr_smartsplit.plan.routes import deepest_split
from flwr_smartsplit.plan.selection.selection import NOT_SAMPLED, select_at_random
from flwr_smartsplit.types import (
    WHOLE,
    ChainProfile,
    Constraints,
    DeviceProfile,
    EdgeProfile,
    RoundPlan,
    Route,
    Variant,
)
from tests.plan.profiles import chain_of, device

PROFILES = {4: chain_of([10, 20, 30, 40]), 8: chain_of([20, 40, 60, 80], batch_size=8)}
EDGE_X = (EdgeProfile(name="x"),)
FLEET = [
    device("d", 25),
    device("a"),
    device("c", 5),
    device("b", 40),
    device("e", 45, batch_size=8),
]


def plan(fleet: list[DeviceProfile] = FLEET, **changes: Any) -> RoundPlan:
    """Plan a round for a fleet."""
    edges = tuple(EdgeProfile(name=name) for name in changes.pop("edges", ["x"]))
    facts: dict[str, Any] = {
        "round_number": 3,
        "num_clients": 10,
        "routing": Routing(edges=edges),
        "rng": Random(0),
    }
    profiles: dict[int, ChainProfile] = PROFILES
    return plan_round(fleet, profiles, **{**facts, **changes})


def test_everybody_gets_the_deepest_route_that_fits() -> None:
    """Budgets and batch sizes are the client's own; order is client_key's."""
    found = plan()
    assert found.round_number == 3
    assert [(a.client_key, str(a.option.route)) for a in found.assignments] == [
        ("a", "whole"),
        ("b", "whole"),
        ("d", "device[:2] > x[2:]"),
        ("e", "device[:2] > x[2:]"),
    ]
    assert [a.option.peak_bytes for a in found.assignments] == [40, 40, 20, 40]
    assert [a.budget_bytes for a in found.assignments] == [None, 40, 25, 45]


def test_who_cannot_take_part_has_a_reason_with_numbers() -> None:
    """The reason is the policy's own error."""
    found = plan()
    assert list(found.skipped) == ["c"]
    assert "no route fits" in found.skipped["c"]
    assert "batch size 4" in found.skipped["c"]


def test_who_is_not_drawn_has_that_reason() -> None:
    """Sampling happens among those who have a route."""
    found = plan(num_clients=2, routing=Routing(select=select_at_random, edges=EDGE_X))
    assert len(found.assignments) == 2
    assert found.unfit == {"c"}
    assert list(found.skipped.values()).count(NOT_SAMPLED) == 2


@given(
    order=st.permutations(FLEET),
    num_clients=st.integers(0, 6),
    seed=st.integers(0, 50),
    edges=st.lists(st.sampled_from("xyz"), unique=True),
)
def test_the_order_in_which_a_fleet_is_listed_is_no_matter(
    order: list[DeviceProfile], num_clients: int, seed: int, edges: list[str]
) -> None:
    """The same seed plans the same round, and everybody is accounted for once."""
    facts: dict[str, Any] = {"num_clients": num_clients, "edges": edges}
    found = plan(order, rng=Random(seed), **facts)
    assert found == plan(FLEET, rng=Random(seed), **facts)
    chosen = [assignment.client_key for assignment in found.assignments]
    assert chosen == sorted(chosen)
    assert sorted([*chosen, *found.skipped]) == ["a", "b", "c", "d", "e"]
    assert len(chosen) <= num_clients


def test_clients_are_dealt_out_to_edges_in_turn() -> None:
    """By their place in the fleet, so that a client's edge does not hang on chance."""
    weak = [device(key, 15) for key in "abcd"]
    found = plan(weak, edges=["x", "y"])
    assert [a.option.route for a in found.assignments] == [
        Route.split(1, edge=edge) for edge in "xyxy"
    ]
    fewer = plan(weak, edges=["x", "y"], num_clients=2)
    edge_of = {a.client_key: a.option.route for a in found.assignments}
    assert all(edge_of[a.client_key] == a.option.route for a in fewer.assignments)


def test_without_edges_only_whole_models_train() -> None:
    """Who cannot hold the model sits out, with the reason."""
    found = plan(edges=[])
    assert [a.client_key for a in found.assignments] == ["a", "b"]
    assert sorted(found.skipped) == ["c", "d", "e"]


def test_an_empty_fleet_is_an_empty_plan() -> None:
    """Nobody to choose from is no error."""
    assert plan([]) == RoundPlan(round_number=3, assignments=(), skipped={})


def test_a_seed_draws_other_clients_in_other_rounds() -> None:
    """The generator goes on, so that the rounds of one run differ."""
    rng = Random(1)
    fleet = [device(f"{k:02}") for k in range(20)]
    rounds = [plan(fleet, num_clients=3, rng=rng) for _ in range(4)]
    drawn = {tuple(a.client_key for a in r.assignments) for r in rounds}
    assert len(drawn) > 1


def test_a_plan_cannot_be_changed() -> None:
    """Plans are values."""
    found = plan()
    with pytest.raises(AttributeError):
        found.assignments = ()  # type: ignore[misc]
    assert replace(found, round_number=4).round_number == 4


# --- gradient accumulation ------------------------------------------------------------


def parts_of(batch_size: int, accumulate: int, _: Variant) -> ChainProfile:
    """Halve every peak with each doubling of the micro-batches."""
    peaks = [unit.device_peak_bytes for unit in PROFILES[batch_size].units]
    return chain_of([peak // accumulate for peak in peaks], batch_size=batch_size)


@pytest.mark.parametrize("choose_route", [None, deepest_split])
@pytest.mark.parametrize(
    ("most", "found"),
    [
        (1, {"a": ("whole", 1), "d": ("device[:2] > x[2:]", 1)}),
        (3, {"a": ("whole", 1), "c": ("device[:1] > x[1:]", 2)}),
        (8, {"c": ("device[:1] > x[1:]", 2), "f": ("device[:1] > x[1:]", 4)}),
    ],
)
def test_who_fits_nothing_accumulates_as_little_as_it_can(
    choose_route: Any, most: int, found: dict[str, tuple[str, int]]
) -> None:
    """c has 5 bytes of 10, f 2; nobody else's step is divided, and none beyond most."""
    routing = Routing(
        edges=EDGE_X,
        choose_route=choose_route,
        constraints=Constraints(max_accumulate=most, recompute=False),
        costs=parts_of,
    )
    made = plan([*FLEET, device("f", 2)], routing=routing)
    options = {each.client_key: each.option for each in made.assignments}
    for key, (route, accumulate) in found.items():
        assert (str(options[key].route), options[key].accumulate) == (route, accumulate)
    assert all(o.accumulate == 1 for key, o in options.items() if key not in "cf")
    assert made.unfit == {1: {"c", "f"}, 3: {"f"}, 8: set()}[most]


def test_without_profiles_of_micro_batches_nobody_accumulates() -> None:
    """The costs of parts are measured, never guessed."""
    routing = Routing(edges=EDGE_X, constraints=Constraints(max_accumulate=8))
    assert plan(routing=routing).unfit == {"c"}


def test_the_reason_says_in_how_many_parts_it_was_tried() -> None:
    """With the least bytes that would do."""
    routing = Routing(
        edges=EDGE_X,
        constraints=Constraints(max_accumulate=2, recompute=False),
        costs=parts_of,
    )
    made = plan([device("f", 2)], routing=routing)
    assert (
        "needs 5 B at batch size 4 in 2 parts, the budget is 2 B" in made.skipped["f"]
    )


@pytest.mark.parametrize("choose_route", [None, deepest_split])
def test_a_variant_is_for_who_fits_nothing_else(choose_route: Any) -> None:
    """The first that fits, at its own costs; whoever fits whole trains whole."""
    parts = {"half": 2, "quarter": 4}
    routing = Routing(
        edges=EDGE_X,
        choose_route=choose_route,
        constraints=Constraints(recompute=False),
        variants=lambda _: (WHOLE, *map(Variant, parts)),
        costs=lambda size, _, variant: parts_of(size, parts[variant.name], variant),
    )
    made = plan([*FLEET, device("f", 2)], routing=routing)
    found = {e.client_key: e.option.variant.name for e in made.assignments}
    assert {key: name for key, name in found.items() if name != "whole"} == {
        "c": "half",
        "f": "quarter",
    }
    assert made.unfit == set()
