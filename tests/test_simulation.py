"""Whole runs under Flower's simulation engine: any mix of routes is FedAvg, exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import (
    Planning,
    RayEdge,
    Route,
    SmartSplit,
    Widths,
    predicted_peak_bytes,
)
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from flwr_smartsplit.plan.routes import deepest_route
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from tests.simulated_app import (
    BATCH_SIZE,
    EDGES,
    TASK,
    all_kinds,
    run_here,
    simulate,
)

NUM_CLIENTS = 6
NUM_ROUNDS = 3

pytestmark = pytest.mark.ray


def budgets_for_every_cut() -> list[int]:
    """Choose budgets under which the deepest route differs from client to client."""
    chain = build_chain(TASK)
    profile = profile_chain(chain, batch_size=BATCH_SIZE, task=TASK)
    budgets = {}
    for cut in range(1, len(chain)):
        budget = predicted_peak_bytes(profile, Route.split(cut))
        route = deepest_route(profile, budget_bytes=budget, edge="edge")
        if route.cuts:
            budgets[route] = budget
    return list(budgets.values())[:NUM_CLIENTS]


def fedavg() -> FedAvg:
    """Make the strategy inside; everybody takes part."""
    return FedAvg(fraction_evaluate=0.0, min_available_nodes=NUM_CLIENTS)


def smart_split(journal: Path | None = None) -> SmartSplit:
    """Make the strategy under test."""
    return SmartSplit(
        TASK,
        (RayEdge(),),
        seed=7,
        strategy=fedavg(),
        journal=journal,
    )


def differences(one: ArrayRecord, other: ArrayRecord) -> list[str]:
    """Name the arrays whose bits differ."""
    assert list(one) == list(other)
    return [n for n in one if one[n].numpy().tobytes() != other[n].numpy().tobytes()]


@pytest.fixture(scope="module")
def split_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArrayRecord, Path]:
    """Run six clients with different cuts on two workers."""
    journal = tmp_path_factory.mktemp("split") / "journal.jsonl"
    result = simulate(
        smart_split(journal),
        budgets_for_every_cut(),
        num_rounds=NUM_ROUNDS,
        num_workers=2,
    )
    return result.arrays, journal


@pytest.fixture(scope="module")
def whole_run() -> ArrayRecord:
    """Train the same six clients whole, and without Flower's engine."""
    strategy = SmartSplit(TASK, seed=7, strategy=fedavg(), journal=None)
    return run_here(strategy, num_clients=NUM_CLIENTS, num_rounds=NUM_ROUNDS).arrays


@pytest.mark.slow
def test_six_different_cuts_equal_the_whole_model_bit_for_bit(
    split_run: tuple[ArrayRecord, Path], whole_run: ArrayRecord
) -> None:
    """Three rounds with six cuts give the bits of three rounds of FedAvg."""
    arrays, journal = split_run
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    routes = {row["route"] for row in rows if row["kind"] == "client"}
    assert len(routes) == NUM_CLIENTS
    assert all("edge" in route for route in routes)
    assert differences(arrays, whole_run) == []


@pytest.mark.slow
def test_one_worker_and_two_give_the_same_bits(
    split_run: tuple[ArrayRecord, Path],
) -> None:
    """The number of worker processes changes nothing."""
    arrays, _ = split_run
    alone = simulate(
        smart_split(), budgets_for_every_cut(), num_rounds=NUM_ROUNDS, num_workers=1
    )
    assert differences(arrays, alone.arrays) == []


@pytest.mark.slow  # tests/contracts does it at the same hosts, without Flower's engine.
def test_all_kinds_of_route_in_one_round_equal_the_whole_model(
    whole_run: ArrayRecord, tmp_path: Path
) -> None:
    """Over two Ray edges that talk to each other; nobody failed."""
    journal = tmp_path / "journal.jsonl"
    strategy = SmartSplit(
        TASK,
        EDGES,
        seed=7,
        strategy=fedavg(),
        planning=Planning(choose_route=all_kinds),
        journal=journal,
    )
    mixed = simulate(
        strategy, [None] * NUM_CLIENTS, num_rounds=NUM_ROUNDS, num_workers=2
    )
    assert strategy.failures == []
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({row["route"] for row in rows if row["kind"] == "client"}) == NUM_CLIENTS
    assert differences(mixed.arrays, whole_run) == []


@pytest.mark.slow
def test_widths_over_ray_edges_are_widths_on_devices() -> None:
    """Narrow clients on all kinds of route, in processes of their own."""

    def strategy(edges: tuple[RayEdge, ...], **planning: Any) -> SmartSplit:
        rules = Planning(variants=Widths((0.5,), roll=True), **planning)
        return SmartSplit(
            TASK, edges, seed=7, strategy=fedavg(), planning=rules, journal=None
        )

    split = strategy(EDGES, choose_route=all_kinds)
    mixed = simulate(split, [None] * NUM_CLIENTS, num_rounds=2, num_workers=2)
    here = run_here(strategy(()), num_clients=NUM_CLIENTS, num_rounds=2)
    assert split.failures == []
    assert {a.option.variant.name for a in split.round_plans[-1].assignments} == {
        "width 0.5"
    }
    assert differences(mixed.arrays, here.arrays) == []


@pytest.mark.slow
def test_flowers_engine_changes_no_bit_of_the_whole_model(
    whole_run: ArrayRecord,
) -> None:
    budgets = [None] * NUM_CLIENTS
    engine = simulate(smart_split(), budgets, num_rounds=NUM_ROUNDS, num_workers=2)
    assert differences(engine.arrays, whole_run) == []


def test_the_comparison_sees_a_single_changed_bit(whole_run: ArrayRecord) -> None:
    """A planted error of one last bit in one value is named."""
    bent = from_array_record(whole_run)
    values = bent["10.bias"].copy()
    values[0] = np.nextafter(values[0], np.float32(2))
    bent["10.bias"] = values
    assert differences(whole_run, to_array_record(bent)) == ["10.bias"]


def test_stock_fedavg_drives_the_same_clients_to_the_same_state() -> None:
    """One round under Flower's own FedAvg agrees to 1e-6 of each array's scale.

    Flower multiplies by weight fractions in float32, we divide a float64 sum once;
    both are right to float32's rounding.
    """
    # Flower counts the nodes before it waits for them, hence the minimum.
    plain = FedAvg(fraction_evaluate=0.0, min_train_nodes=NUM_CLIENTS)
    split = SmartSplit(TASK, strategy=fedavg(), journal=None)
    stock, ours = (
        run_here(strategy, num_clients=NUM_CLIENTS, num_rounds=1).arrays
        for strategy in (plain, split)
    )
    assert list(stock) == list(ours)
    for name, array in ours.items():
        mine = array.numpy()
        theirs = stock[name].numpy().astype(mine.dtype)  # as load_state_dict does
        scale = max(float(np.abs(mine).max()), 1e-12)
        assert np.abs(mine - theirs).max() <= 1e-6 * scale, name
