"""LegacySmartSplit: the same core under Flower's legacy server, bit for bit."""

from typing import Any

import numpy as np
import pytest
from flwr.common import ndarrays_to_parameters
from flwr.server.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)

from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.types import Route
from tests.flower.apps import (
    apps,
    arrays_of,
    broken_app,
    budgets_of,
    failing_app,
    legacy_app,
    message_app,
    messages,
    overweight_app,
    run,
    smart_split,
)
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import differences, initial_state, tiny_chain

MIXED = budgets_of(1, 4, None, 8)


def legacy_apps(**changes: Any) -> list[Any]:
    """Make a ``NumPyClient`` app per budget."""
    return [legacy_app(index, b, **changes) for index, b in enumerate(MIXED)]


@pytest.mark.parametrize("make", [apps, lambda budgets: legacy_apps()])
def test_both_strategies_make_the_same_state_bit_for_bit(make: Any) -> None:
    """Whichever API the clients were written for."""
    legacy = run_legacy(make(MIXED), num_rounds=3)
    message = run(make(MIXED), num_rounds=3)
    assert differences(legacy.state, message.state) == []
    assert legacy.kinds() == message.kinds() == []


def test_the_comparison_sees_one_client_more() -> None:
    """A planted difference: another client changes every parameter."""
    legacy = run_legacy(legacy_apps(), num_rounds=1)
    message = run(apps([*MIXED, None]), num_rounds=1)
    assert differences(legacy.state, message.state) != []


def test_devices_get_their_own_units_only() -> None:
    """In the model's order, without names, in both phases."""
    made = run_legacy(apps(MIXED), legacy_smart_split(fraction_evaluate=1.0))
    chain = tiny_chain()
    stops = dict(zip(made.grid.node_ids, (1, 4, len(chain), 8), strict=True))
    down = messages(made.grid, "train", "evaluate")
    assert len(down) == 16
    for message in down:
        own = chain.state_names(0, stops[message.metadata.dst_node_id])
        assert len(arrays_of(message)) == len(own)


def test_fedavgs_hooks_are_kept() -> None:
    """Configs, metric averages, evaluation on the server and on the devices."""
    seen: list[Any] = []

    def evaluate(number: int, arrays: Any, config: Any) -> tuple[float, Any]:
        seen.append((number, len(arrays), config))
        return float(number), {"accuracy": number / 10}

    def mean(metrics: list[tuple[int, Any]]) -> dict[str, Any]:
        return {"clients": len(metrics), "loss": metrics[0][1]["loss"]}

    made = run_legacy(
        legacy_apps(),
        legacy_smart_split(
            fraction_evaluate=1.0,
            evaluate_fn=evaluate,
            on_fit_config_fn=lambda number: {"lr": 0.5 / number},
            on_evaluate_config_fn=lambda number: {"quick": True},
            fit_metrics_aggregation_fn=mean,
            evaluate_metrics_aggregation_fn=mean,
        ),
    )
    assert [number for number, *_ in seen] == [0, 1, 2]
    assert {count for _, count, _ in seen} == {len(initial_state())}
    history = made.history
    assert history.losses_centralized == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert [n for _, n in history.metrics_distributed_fit["clients"]] == [4, 4]
    assert len(history.losses_distributed) == 2
    configs = [m.content["fitins.config"] for m in messages(made.grid, "train")]
    assert {(c["server-round"], c["lr"]) for c in configs} == {(1, 0.5), (2, 0.25)}
    configs = [m.content["evaluateins.config"] for m in messages(made.grid, "evaluate")]
    assert all(config["quick"] for config in configs)


def test_evaluation_is_the_message_apis() -> None:
    """The same loss, along the same routes."""
    legacy = run_legacy(apps(MIXED), legacy_smart_split(fraction_evaluate=1.0))
    message = run(apps(MIXED), smart_split(fraction_evaluate=1.0))
    found = [loss for _, loss in legacy.history.losses_distributed]
    rounds = message.result.evaluate_metrics_clientapp
    expected = [rounds[number]["loss"] for number in (1, 2)]
    assert found == pytest.approx(
        expected, rel=1e-12
    )  # Flower adds up in its own order


def test_one_client_that_fails_harms_nobody() -> None:
    """The rest is bit-equal to a round without it; the failure has a reason."""
    with_it = run_legacy([*legacy_apps(), failing_app(4)])
    without = run_legacy(legacy_apps())
    assert differences(with_it.state, without.state) == []
    assert with_it.kinds() == [("c4", "failed")] * 2
    cause = with_it.strategy.failures[0].cause  # type: ignore[attr-defined]
    assert "disk on fire" in cause


def test_going_over_the_cap_is_a_reply_not_a_crash() -> None:
    """With the numbers, as under the Message API."""
    made = run_legacy([*legacy_apps(), overweight_app(4, legacy_app)], num_rounds=1)
    assert made.kinds() == [("c4", "out_of_memory")]


def test_without_accept_failures_a_round_with_a_failure_counts_for_nothing() -> None:
    """As FedAvg has it."""
    strategy = legacy_smart_split(accept_failures=False)
    with pytest.raises(SmartSplitError, match="8 x another client failed"):
        run_legacy([*legacy_apps(), failing_app(4)], strategy)
    kinds = [(failure.client_key, failure.kind) for failure in strategy.failures]
    assert ("c0", "refused") in kinds


def test_clients_that_do_not_say_who_they_are_are_left_out() -> None:
    """A key of one's own is needed, and a client that answers."""
    made = run_legacy([message_app(0), message_app(1), message_app(1), broken_app()])
    kinds = made.kinds()
    assert ("c1", "duplicate") in kinds
    assert any(kind == "failed" for _, kind in kinds)
    with pytest.raises(SmartSplitError, match="none of 2 clients says who it is"):
        run_legacy([broken_app(), broken_app()])


def test_parameters_of_another_model_are_refused() -> None:
    """By their number, or their shapes."""
    few = ndarrays_to_parameters([np.zeros(3, np.float32)])
    with pytest.raises(InvalidTask, match="1 arrays came as parameters"):
        run_legacy(legacy_apps(), legacy_smart_split(initial_parameters=few))


def test_without_initial_parameters_a_client_is_asked() -> None:
    """As Flower does; it must have been told how to make them."""
    with pytest.raises(Exception, match=r"get_parameters|arrays came|Parameters"):
        run_legacy(legacy_apps(), legacy_smart_split(initial_parameters=None))


def test_a_wrapper_for_differential_privacy_is_refused() -> None:
    """It would clip the first units against the whole model."""
    inner = legacy_smart_split()
    wrapped = DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, 4)
    with pytest.raises(SmartSplitError, match="nowhere whole when they are split"):
        run_legacy(legacy_apps(), wrapped)


def test_a_subclass_is_not_a_wrapper() -> None:
    """Users extend strategies."""

    class Extended(type(legacy_smart_split())):  # type: ignore[misc]
        def configure_fit(self, *args: Any, **kwargs: Any) -> Any:
            return super().configure_fit(*args, **kwargs)

    inner = legacy_smart_split()
    inner.__class__ = Extended
    assert run_legacy(legacy_apps(), inner, num_rounds=1).kinds() == []


def test_stock_fedavg_drives_our_app_through_the_legacy_api() -> None:
    """Our app answers a server that knows nothing of plans."""
    initial = ndarrays_to_parameters(list(initial_state().values()))
    stock = run_legacy(
        apps([None] * 3),
        FedAvg(fraction_evaluate=0.0, initial_parameters=initial),
        num_rounds=1,
    )
    assert differences(stock.state, initial_state()) != []


def test_plans_are_kept() -> None:
    """With everybody's route."""
    made = run_legacy(legacy_apps(), num_rounds=1)
    (plan,) = made.strategy.round_plans  # type: ignore[attr-defined]
    routes = {a.client_key: a.option.route for a in plan.assignments}
    assert routes["c2"] == Route.whole()
    assert routes["c1"] == Route.split(4)
