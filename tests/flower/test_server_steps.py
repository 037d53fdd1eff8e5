"""ServerData, Momentum and HybridFL in whole runs: any routes, both APIs, resumed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAdam, FedAvgM

from flwr_smartsplit import (
    Checkpoints,
    DeviceTraits,
    HybridFL,
    Momentum,
    ServerData,
    select_at_random,
)
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.plan.divergence import divergence_bits, pooled
from tests.flower.apps import legacy_app, message_app, run, smart_split
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.flower.test_mixed_routes import EDGES, NUM_CLIENTS, by_key
from tests.killed_runs import Ended, Killed, Kind, run_kind
from tests.tasks import NUM_CLASSES, State, differences, examples, loader

FOUR = {"select": select_at_random, "fraction_train": 0.8, "min_train_nodes": 2}
"""Four of five clients, since the labels of all are those of all: weight 0."""
FOUR_OLD = {"select": select_at_random, "fraction_fit": 0.8, "min_fit_clients": 2}
MIXED = {"choose_route": by_key}
SERVER_EXAMPLES = 77
"""As a client, which nobody is."""


def counts_of(index: int) -> tuple[int, ...]:
    """Count a client's labels."""
    labels = examples(index).tensors[1].numpy()
    return tuple(np.bincount(labels, minlength=NUM_CLASSES).tolist())


def sharing(index: int, budget_bytes: int | None = None, **changes: Any) -> Any:
    """Make a client that shares its label counts, at both edges."""
    traits = DeviceTraits(label_counts=counts_of(index))
    usual = {"traits": traits, "edges": EDGES, "kind": message_app}
    made = usual | changes
    return made.pop("kind")(index, budget_bytes, **made)


def clients(**changes: Any) -> list[Any]:
    """Make a client for each route."""
    return [sharing(index, **changes) for index in range(NUM_CLIENTS)]


def server(**changes: Any) -> ServerData:
    """Make the server's step."""
    return ServerData(loader(SERVER_EXAMPLES), **{"epochs": 2, **changes})


def run_message(*server_steps: Any, **changes: Any) -> State:
    """Run the Message API's strategy along all kinds of route."""
    options = {**MIXED, **(changes or FOUR)}
    strategy = smart_split(EDGES, server_steps=server_steps, **options)
    made = run(clients(), strategy)
    assert made.kinds() == []
    return made.state


def run_old(*server_steps: Any, **changes: Any) -> State:
    """Run the legacy API's."""
    options = {**MIXED, **(changes or FOUR_OLD)}
    strategy = legacy_smart_split(EDGES, server_steps=server_steps, **options)
    made = run_legacy(clients(kind=legacy_app), strategy)
    assert made.kinds() == []
    return made.state


RUNS = pytest.mark.parametrize("run_with", [run_message, run_old])


@pytest.fixture(scope="module")
def fedavg() -> State:
    """Train the same clients whole, without any step."""
    return run(clients(), smart_split((), **FOUR)).state


@pytest.fixture(scope="module")
def feddu() -> State:
    """Train the same clients whole, and the server after each round."""
    return run(clients(), smart_split((), server_steps=(server(),), **FOUR)).state


@RUNS
def test_neutral_steps_are_fedavg_bit_for_bit(
    run_with: Callable[..., State], fedavg: State
) -> None:
    """Strength 0, beta 0; planted: a little of either is not."""
    still = Momentum(beta=0.0)
    made = run_with(still, server(strength=0.0), still)
    assert differences(made, fedavg) == []
    assert differences(run_with(Momentum(beta=1e-3)), fedavg) != []
    assert differences(run_with(server(strength=0.1)), fedavg) != []


@RUNS
def test_the_servers_step_does_not_see_routes(
    run_with: Callable[..., State], feddu: State, fedavg: State
) -> None:
    """Split, u-shaped, hops and whole: as if everybody trained the whole model."""
    made = server()
    assert differences(run_with(made), feddu) == []
    assert differences(feddu, fedavg) != []
    assert [each.round_number for each in made.trainings] == [1, 2]
    assert min(each.weight for each in made.trainings) > 0.01


def test_it_is_told_the_labels_of_all_and_who_was_merged() -> None:
    """The weight of a run is that of the rule, from what the clients shared."""
    made = server(decay=0.5)
    strategy = smart_split(EDGES, server_steps=(made,), **MIXED, **FOUR)
    run(clients(), strategy)
    everybody = pooled(map(counts_of, range(NUM_CLIENTS)))
    for noted, plan in zip(made.trainings, strategy.round_plans, strict=True):
        chosen = [int(each.client_key[1:]) for each in plan.assignments]
        assert len(chosen) < NUM_CLIENTS
        merged = pooled(map(counts_of, chosen))
        ours = made.num_examples * divergence_bits(merged, everybody)
        noniid = divergence_bits(made.label_counts or (), everybody)
        share = ours / (ours + sum(merged) * noniid)
        decayed = share * 0.5 ** (noted.round_number - 1)
        assert noted.weight == pytest.approx((1 - noted.accuracy) * decayed)


def test_momentum_is_flowers_own(fedavg: State) -> None:
    """FedAvgM with a learning rate of 1, up to its rounding to float32."""
    sample = {"fraction_train": 0.8, "min_train_nodes": 2, "fraction_evaluate": 0.0}
    inner = FedAvgM(server_learning_rate=1.0, server_momentum=0.5, **sample)
    alone = {"strategy": inner, "select": select_at_random}
    wanted = run(clients(), smart_split((), **alone)).state
    made = run_message(Momentum(beta=0.5))
    for name, array in wanted.items():
        np.testing.assert_allclose(made[name], array, rtol=1e-5, atol=1e-6)
    assert differences(made, fedavg) != []


@RUNS
def test_feddum_is_one_momentum_in_two_places(run_with: Callable[..., State]) -> None:
    """The same in both APIs; with two memories it is another run."""

    def feddum(*, is_one: bool) -> tuple[Any, ...]:
        first = Momentum(beta=0.9, dampening=0.9)
        second = first if is_one else Momentum(beta=0.9, dampening=0.9)
        return first, server(), second

    made = run_with(*feddum(is_one=True))
    assert differences(made, run_message(*feddum(is_one=True))) == []
    assert differences(made, run_with(*feddum(is_one=False))) != []


def test_an_optimizer_of_flowers_goes_first() -> None:
    """The server trains what FedAdam made of the mean; routes do not matter."""
    sample = {"fraction_train": 0.8, "min_train_nodes": 2, "fraction_evaluate": 0.0}

    def adam() -> dict[str, Any]:
        inner = FedAdam(eta=0.05, **sample)
        return {"strategy": inner, "select": select_at_random}

    whole = smart_split((), server_steps=(server(),), **adam())
    wanted = run(clients(), whole).state
    made = run_message(server(), **adam())
    assert differences(made, wanted) == []
    assert differences(made, run_message(**adam())) != []
    assert differences(made, run_message(server())) != []


def test_the_server_may_be_a_client_more() -> None:
    """Up to a rounding, HybridFL is FedAvg with such a client; not with another."""
    steps = (HybridFL(loader(SERVER_EXAMPLES)),)
    made = run(clients(), smart_split(EDGES, server_steps=steps), num_rounds=1).state
    more = message_app(SERVER_EXAMPLES, client_key="<server>")
    wanted = run([*clients(), more], smart_split(()), num_rounds=1).state
    other = run(clients(), smart_split(()), num_rounds=1).state
    for name in ("0.weight", "8.bias", "5.running_var"):
        np.testing.assert_allclose(made[name], wanted[name], rtol=1e-5, atol=1e-6)
        assert np.abs(made[name] - other[name]).max() > 1e-3


def test_clients_that_share_no_labels_end_a_run_before_it_begins() -> None:
    """Nothing is trained; both ways out are named, and the other one works."""
    apps = [message_app(index, edges=EDGES) for index in range(2)]
    strategy = smart_split(EDGES, server_steps=(server(),))
    with pytest.raises(InvalidTask, match=r"label_counts=.*noniid="):
        run(apps, strategy)
    assert strategy.round_plans == []
    by_hand = server(noniid=(0.3, 0.2))
    run(apps, smart_split(EDGES, server_steps=(by_hand,)))
    assert len(by_hand.trainings) == 2


def test_where_all_clients_are_merged_the_server_has_nothing_to_add(
    fedavg: State,
) -> None:
    """Their labels are those of all: FedDU's weight is 0, and bits are FedAvg's."""
    made = server()
    everybody = smart_split(EDGES, server_steps=(made,), choose_route=by_key)
    state = run(clients(), everybody).state
    assert differences(state, run(clients(), smart_split(())).state) == []
    assert made.trainings == ()
    assert differences(state, fedavg) != []


# --- resumed --------------------------------------------------------------------------


def feddum() -> dict[str, Any]:
    """Make steps that remember: one momentum in two places, and the server's."""
    momentum = Momentum(beta=0.9, dampening=0.5)
    return {"server_steps": (momentum, server(), momentum)}


def run_steps(kind: Kind, saved: Checkpoints | None = None, **changes: Any) -> Ended:
    """Run three rounds of a kind with the steps above."""
    app = message_app if kind.api == "message" else legacy_app
    make = {"kind": app, "edges": (LocalEdge(),)}

    def one(index: int, budget: int | None = None, **how: Any) -> Any:
        return sharing(index, budget, **{**make, **how})

    options = {"num_rounds": 3, "apps": one, **feddum(), **changes}
    return run_kind(kind, saved, **options)


@pytest.mark.parametrize("api", ["message", "legacy"])
@pytest.mark.parametrize("inner", ["FedAvg", "FedAdam"])
def test_a_killed_run_ends_as_one_that_was_not(
    api: str, inner: str, tmp_path: Path
) -> None:
    """With the momentum of the rounds before, and with FedAdam's; both are needed."""
    kind = Kind(api, inner)
    wanted = run_steps(kind)
    with pytest.raises(Killed):
        run_steps(kind, Checkpoints(tmp_path), moment=38 if api == "message" else 23)
    steps = feddum()["server_steps"]
    made = run_steps(kind, Checkpoints(tmp_path), server_steps=steps)
    assert min(made.plans) > 1
    assert differences(made.state, wanted.state) == []
    assert made.results == wanted.results
    assert [each.round_number for each in steps[1].trainings] == [1, 2, 3]


def test_a_momentum_that_is_forgotten_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above sees it."""
    kind = Kind("message")
    run_steps(kind, Checkpoints(tmp_path), num_rounds=2)
    monkeypatch.setattr(Momentum, "load_state_dict", lambda self, state: None)
    made = run_steps(kind, Checkpoints(tmp_path))
    assert min(made.plans) == 3
    assert differences(made.state, run_steps(kind).state) != []


def test_other_steps_are_another_run(tmp_path: Path) -> None:
    """Named by what differs: a number, the server's examples, one memory or two."""
    kind = Kind("message")
    run_steps(kind, Checkpoints(tmp_path), num_rounds=1)
    momentum = Momentum(beta=0.9, dampening=0.5)
    other = ServerData(loader(SERVER_EXAMPLES + 1), epochs=2)
    for steps, why in (
        ((momentum, server(strength=0.5), momentum), r"\.strength is 1.0 there"),
        ((momentum, other, momentum), r"label_counts\[0\] is 24 there and 23"),
        ((momentum, server(), Momentum(beta=0.9, dampening=0.5)), "one object"),
    ):
        with pytest.raises(SmartSplitError, match=why):
            run_steps(kind, Checkpoints(tmp_path), server_steps=steps)


def test_a_copied_strategy_begins_its_own_run() -> None:
    """Its momentum and what the server did are not the other's."""
    strategy = smart_split(EDGES, **MIXED, **FOUR, **feddum())
    made = run(clients(), strategy)
    copied = copy.deepcopy(strategy)
    assert differences(run(clients(), copied).state, made.state) == []
    assert differences(run(clients(), strategy).state, made.state) == []
