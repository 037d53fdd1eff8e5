"""The strategy inside: what of it is kept, and which are refused by name."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common import ndarrays_to_parameters
from flwr.server import strategy as legacy
from flwr.serverapp import strategy as message

from flwr_smartsplit import LegacySmartSplit, SmartSplit, proximal
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from tests.flower.apps import apps, budgets_of, messages, run, smart_split
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import TASK, differences, initial_state

MIXED = budgets_of(1, 4, None, 8)


class Quiet(message.FedAvg):
    """Evaluates in every second round, and halves the learning rate."""

    def configure_train(
        self, server_round: int, arrays: Any, config: ConfigRecord, grid: Any
    ) -> Any:
        config["lr"] = 0.1 / server_round
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(self, server_round: int, *args: Any) -> Any:
        return (
            [] if server_round % 2 else super().configure_evaluate(server_round, *args)
        )

    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        found = super().aggregate_evaluate(server_round, replies)
        return MetricRecord({**found, "clients": len(replies)})


class LegacyQuiet(legacy.FedAvg):
    """The same in the legacy API."""

    def configure_fit(self, server_round: int, *args: Any) -> Any:
        pairs = super().configure_fit(server_round, *args)
        for _, told in pairs:
            told.config["lr"] = 0.1 / server_round
        return pairs

    def configure_evaluate(self, server_round: int, *args: Any) -> Any:
        return (
            [] if server_round % 2 else super().configure_evaluate(server_round, *args)
        )

    def num_fit_clients(self, num_available_clients: int) -> tuple[int, int]:
        return 3, self.min_available_clients

    def aggregate_evaluate(self, *args: Any) -> Any:
        loss, metrics = super().aggregate_evaluate(*args)
        return loss, {**metrics, "clients": len(args[1])}


def initial() -> Any:
    """Make the legacy API's initial parameters."""
    return ndarrays_to_parameters(list(initial_state().values()))


# --- kept -----------------------------------------------------------------------------


def test_what_a_subclass_tells_and_measures_is_kept() -> None:
    """Its config reaches the clients, its rounds and its averages are its own."""
    made = run(apps(MIXED), smart_split(strategy=Quiet()))
    configs = [m.content["config"] for m in messages(made.grid, "train")]
    assert {(c["server-round"], c["lr"]) for c in configs} == {(1, 0.1), (2, 0.05)}
    evaluated = made.result.evaluate_metrics_clientapp
    assert {n: found["clients"] for n, found in evaluated.items()} == {2: 4}


def test_what_a_legacy_subclass_tells_and_measures_is_kept() -> None:
    """Its numbers of clients, too."""
    made = run_legacy(
        apps(MIXED),
        legacy_smart_split(strategy=LegacyQuiet(initial_parameters=initial())),
    )
    down = messages(made.grid, "train")
    configs = [m.content["fitins.config"] for m in down]
    assert [(c["server-round"], c["lr"]) for c in configs] == [(1, 0.1)] * 3 + [
        (2, 0.05)
    ] * 3
    assert made.history.metrics_distributed == {"clients": [(2, 4)]}


def reads_it(optimizer: Any, config: Any) -> None:
    """Stand for a schedule that reads FedProx's weight."""
    assert config.get("proximal_mu", 0.5) == 0.5


def test_fedprox_asks_for_the_term_that_the_task_adds() -> None:
    """Its weight reaches the clients, where a schedule_fn can read it."""
    fedprox = message.FedProx(fraction_evaluate=0.0, proximal_mu=0.5)
    with pytest.raises(ValueError, match=r"adds with mu=0\.0: give Task"):
        smart_split(strategy=fedprox)
    sgd = partial(torch.optim.SGD, lr=0.5)
    adding = partial(proximal, optimizer_fn=sgd, mu=0.5)
    task = replace(TASK, optimizer_fn=adding)
    ours = smart_split(strategy=fedprox, task=task)
    made = run(apps(MIXED, task=task), ours, num_rounds=1)
    configs = [m.content["config"] for m in messages(made.grid, "train")]
    assert {config["proximal-mu"] for config in configs} == {0.5}
    old = legacy.FedProx(
        fraction_evaluate=0.0, initial_parameters=initial(), proximal_mu=0.5
    )
    with pytest.raises(ValueError, match=r"adds with mu=0\.0: give Task"):
        legacy_smart_split(strategy=old)
    reading = replace(TASK, schedule_fn=reads_it)
    ours = LegacySmartSplit(reading, strategy=old, journal=None)
    found = run_legacy(apps([None] * 4, task=reading), ours, num_rounds=1)
    configs = [m.content["fitins.config"] for m in messages(found.grid, "train")]
    assert {config["proximal_mu"] for config in configs} == {0.5}


def test_a_whole_run_keeps_metric_functions_and_sampling_numbers() -> None:
    """And the server step never shows its one reply to a user's function."""
    seen: list[list[int]] = []

    def longest(records: Any, key: str) -> MetricRecord:
        weights = [int(record["metrics"][key]) for record in records]
        seen.append(weights)
        return MetricRecord({"longest": max(weights)})

    adam = message.FedAdam(
        eta=0.01,
        fraction_train=0.5,
        fraction_evaluate=0.75,
        min_available_nodes=4,
        weighted_by_key="weight",
        arrayrecord_key="model",
        train_metrics_aggr_fn=longest,
        evaluate_metrics_aggr_fn=longest,
    )
    made = run(
        apps(MIXED, weighted_by_key="weight"),
        smart_split(strategy=adam),
        num_rounds=3,
        evaluate_fn=lambda number, arrays: MetricRecord({"names": len(arrays)}),
    )
    assert [len(weights) for weights in seen] == [2, 3] * 3
    assert all("longest" in made.result.train_metrics_clientapp[n] for n in (1, 2, 3))
    assert made.result.evaluate_metrics_serverapp[3]["names"] == len(initial_state())
    assert {m.metadata.message_type for m in made.grid.sent} >= {"train", "evaluate"}
    assert all("model" in m.content for m in messages(made.grid, "train"))


def test_without_a_server_step_the_strategy_inside_changes_no_bit() -> None:
    """FedAvg, FedProx and an idle FedAvgM end in the same state."""
    states = [
        run(apps(MIXED), smart_split(strategy=inner(fraction_evaluate=0.0))).state
        for inner in (message.FedAvg, message.FedProx, message.FedAvgM)
    ]
    assert differences(states[0], states[1]) == []
    assert differences(states[0], states[2]) == []


def test_users_may_extend_smartsplit_itself() -> None:
    """What a subclass adds to a phase or makes of its state is what counts."""

    class Shrinking(SmartSplit):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            state = from_array_record(arrays)
            state["0.weight"] = state["0.weight"] / 2
            return to_array_record(state), metrics

    plain = run(apps(MIXED), num_rounds=1)
    strategy = smart_split()
    strategy.__class__ = Shrinking
    made = run(apps(MIXED), strategy, num_rounds=1)
    assert made.kinds() == []
    halved = made.state["0.weight"] * 2
    assert (halved == plain.state["0.weight"]).all()
    assert run(apps(MIXED), strategy, num_rounds=2).kinds() == []


# --- refused --------------------------------------------------------------------------


class Own(message.FedAvg):
    """Merges by itself."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return super().aggregate_train(server_round, replies)


class Starts(message.FedAvg):
    """Runs by itself."""

    def start(self, *args: Any, **kwargs: Any) -> Any:
        return super().start(*args, **kwargs)


class Sorted(legacy.FedAvg):
    """Merges by itself."""

    def aggregate_fit(self, *args: Any) -> Any:
        return super().aggregate_fit(*args)


REFUSED: list[tuple[Any, Any, str]] = [
    (
        SmartSplit,
        lambda: message.Krum(num_malicious_nodes=1),
        "Krum: it compares whole",
    ),
    (SmartSplit, message.FedMedian, "FedMedian: it compares whole"),
    (SmartSplit, message.FedXgbBagging, "FedXgbBagging: it merges trees"),
    (SmartSplit, message.FedXgbCyclic, "FedXgbCyclic: it merges trees"),
    (SmartSplit, Own, "Own: Own overrides aggregate_train"),
    (SmartSplit, Starts, "Starts: Starts overrides start"),
    (SmartSplit, lambda: message.FedAvg, "FedAvg: it is a class"),
    (SmartSplit, lambda: "FedAvg", "str: it is no FedAvg"),
    (
        SmartSplit,
        legacy.FedAvg,
        "FedAvg: it is of Flower's other API, whose wrapper is L",
    ),
    (SmartSplit, smart_split, "SmartSplit: it is one already"),
    (
        SmartSplit,
        lambda: message.DifferentialPrivacyClientSideFixedClipping(
            message.FedAvg(), 1.0, 1.0, 2
        ),
        "DifferentialPrivacyClientSideFixedClipping: it clips and noises",
    ),
    (LegacySmartSplit, legacy.Krum, "Krum: it compares whole"),
    (LegacySmartSplit, legacy.QFedAvg, "QFedAvg: it compares whole"),
    (LegacySmartSplit, legacy.FaultTolerantFedAvg, "FaultTolerantFedAvg overrides"),
    (LegacySmartSplit, Sorted, "Sorted: Sorted overrides aggregate_fit"),
    (LegacySmartSplit, message.FedAdam, "FedAdam: it is of Flower's other API"),
    (
        LegacySmartSplit,
        lambda: legacy.DifferentialPrivacyServerSideFixedClipping(
            legacy.FedAvg(), 1.0, 1.0, 2
        ),
        "DifferentialPrivacyServerSideFixedClipping: it clips and noises",
    ),
]


@pytest.mark.parametrize(
    ("ours", "make", "reason"), REFUSED, ids=[reason for *_, reason in REFUSED]
)
def test_a_strategy_that_cannot_be_kept_is_refused_by_name(
    ours: Any, make: Any, reason: str
) -> None:
    """At construction, with the reason and what can be given instead."""
    with pytest.raises(TypeError, match=reason) as raised:
        ours(TASK, strategy=make(), journal=None)
    assert "FedAdam, FedAvgM, FedYogi and FedProx can be" in str(raised.value)


def changed(change: Any) -> message.FedAvg:
    """Make a strategy that does something to what it would send."""

    class Changing(message.FedAvg):
        def configure_train(self, *args: Any) -> Any:
            return change(list(super().configure_train(*args)))

    return Changing(fraction_evaluate=0.0)


def _differ(asked: list[Any]) -> list[Any]:
    asked[0].content = asked[0].content.copy()
    asked[0].content["config"] = ConfigRecord({"lr": 9.0})
    return asked


def _other_arrays(asked: list[Any]) -> list[Any]:
    for each in asked:
        each.content["arrays"] = ArrayRecord()
    return asked


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda asked: asked[:1], "chooses clients by itself"),
        (_other_arrays, "sends more than the global model and a config"),
        (_differ, "tells clients different things"),
    ],
)
def test_what_a_strategy_does_to_single_messages_is_refused_aloud(
    change: Any, reason: str
) -> None:
    """It would be lost in silence."""
    with pytest.raises(SmartSplitError, match=f"Changing {reason}"):
        run(apps(MIXED), smart_split(strategy=changed(change)))


def test_a_legacy_strategy_that_chooses_clients_is_refused_aloud() -> None:
    """By asking who is there, or by asking fewer."""

    class Choosing(legacy.FedAvg):
        def configure_fit(self, number: int, parameters: Any, clients: Any) -> Any:
            return super().configure_fit(number, parameters, clients)[
                : len(clients.all())
            ]

    class Fewer(legacy.FedAvg):
        def configure_fit(self, *args: Any) -> Any:
            return super().configure_fit(*args)[:1]

    for kind in (Choosing, Fewer):
        inner = kind(initial_parameters=initial())
        with pytest.raises(SmartSplitError, match=f"{kind.__name__} chooses clients"):
            run_legacy(apps(MIXED), legacy_smart_split(strategy=inner))
