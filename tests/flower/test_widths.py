"""Clients of several widths in one round, through both strategies and on all routes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAdam, FedAvgM
from torch import nn

from flwr_smartsplit import (
    AdaptiveWidths,
    Checkpoints,
    DeadlineWidths,
    Integer,
    MemoryBudget,
    Packed,
    Planning,
    Route,
    StragglerAdvisor,
    Task,
    Unit,
    Variant,
    VariantRequest,
    Whole,
    Widths,
    narrowed,
    predicted_peak_bytes,
)
from flwr_smartsplit.edge import service
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.regions import cut_state
from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split import chain as chain_module
from flwr_smartsplit.types import width_of
from tests.flower.apps import arrays_of, legacy_app, message_app, messages, run
from tests.flower.apps import smart_split as strategy_of
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.in_process_grid import InProcessGrid
from tests.tasks import (
    BATCH_SIZE,
    TASK,
    State,
    differences,
    initial_state,
    tiny_chain,
    tiny_cnn,
)

EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
ROUTES = {
    "c0": Route.whole(),
    "c1": Route.split(2, edge="far"),
    "c2": Route.u_shape(3, 7, edge="near"),
    "c3": Route.hops((1, 5), edges=("near", "far")),
    "c4": Route((2, 4, 8), ("device", "near", "far", "device")),
    "c5": Route.split(5, edge="far"),
}
RATES = {"c0": 1.0, "c1": 0.5, "c2": 0.5, "c3": 0.25, "c4": 1.0, "c5": 0.25}
GROUPS = tiny_chain().channels.groups


class ByKey:
    """Offer each client one width of its own; the later windows begin elsewhere."""

    def __init__(self, rates: dict[str, float] = RATES) -> None:
        self.rates = rates

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        rate = self.rates[request.device.client_key]
        return (width_of(request.groups, rate, shift=request.round_number),)


def route_of(request: RouteRequest) -> Route:
    """Give each client its own kind of route."""
    return ROUTES[request.device.client_key]


def clients(make: Callable[..., Any], **changes: Any) -> list[Any]:
    """Make six clients that can reach both edges."""
    return [make(index, edges=EDGES, **changes) for index in range(len(ROUTES))]


def names_of(strategy: Any) -> dict[str, str]:
    """Name what each client trained in the last round."""
    plan = strategy.round_plans[-1]
    return {a.client_key: a.option.variant.name for a in plan.assignments}


def peak(rate: float, route: Route) -> int:
    """Predict what a width needs on a route."""
    variant = width_of(GROUPS, rate)
    return predicted_peak_bytes(
        profile_of(TASK, batch_size=BATCH_SIZE, variant=variant), route
    )


@pytest.fixture(scope="module")
def whole_routes() -> Any:
    """Train the clients' widths on the devices alone."""
    return run(clients(message_app), strategy_of((), variants=ByKey()))


# --- the same numbers -----------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        Widths((1.0,)),
        Widths((1.0, 0.5)),
        Whole(),
        AdaptiveWidths(rates=(1.0,)),
        DeadlineWidths(1e-9, (1.0,)),
    ],
)
def test_whoever_fits_whole_makes_fedavg_bit_for_bit(rule: Any) -> None:
    """Under either API."""
    truth = run(clients(message_app), strategy_of(())).state
    made = run(clients(message_app), strategy_of((), variants=rule))
    assert set(names_of(made.strategy).values()) == {"whole"}
    assert differences(made.state, truth) == []
    old = run_legacy(clients(legacy_app), legacy_smart_split((), variants=rule))
    assert differences(old.state, truth) == []


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_routes_change_no_bit_of_mixed_widths(
    make: Callable[..., Any], whole_routes: Any
) -> None:
    """Split, u-shaped and over hops, at three widths, for two rounds."""
    made = run(
        clients(make), strategy_of(EDGES, variants=ByKey(), choose_route=route_of)
    )
    assert made.kinds() == []
    plan = made.strategy.round_plans[-1]
    assert {a.client_key: a.option.route for a in plan.assignments} == ROUTES
    assert set(names_of(made.strategy).values()) == {"whole", "width 0.5", "width 0.25"}
    assert differences(made.state, whole_routes.state) == []


def test_routes_change_no_bit_under_the_legacy_api(whole_routes: Any) -> None:
    """The same bits as under the Message API."""
    strategy = legacy_smart_split(EDGES, variants=ByKey(), choose_route=route_of)
    made = run_legacy(clients(message_app), strategy)
    assert made.kinds() == []
    assert differences(made.state, whole_routes.state) == []


def test_an_edge_that_cuts_other_channels_is_seen(
    whole_routes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted error: each region begins one channel later, at edges only."""

    def shifted(state: State, regions: Any) -> Any:
        return cut_state(
            state,
            {
                name: tuple(
                    None if at is None else np.sort((at + 1) % state[name].shape[axis])
                    for axis, at in enumerate(region)
                )
                for name, region in regions.items()
                if name in state
            },
        )

    monkeypatch.setattr(service, "cut_state", shifted)
    made = run(
        clients(message_app),
        strategy_of(EDGES, variants=ByKey(), choose_route=route_of),
    )
    assert differences(made.state, whole_routes.state)


def alone(rate: float) -> State:
    """Train the narrow model by itself, as if it were the whole one."""
    task = replace(TASK, model_fn=partial(narrow_cnn, rate))
    regions = tiny_chain().regions(width_of(GROUPS, rate))
    arrays = to_array_record(dict(cut_state(initial_state(), regions)))
    return run(
        clients(message_app, task=task), strategy_of((), task=task), arrays=arrays
    ).state


def narrow_cnn(rate: float) -> nn.Module:
    """Build the narrow model; its layers have fewer channels."""
    return narrowed(tiny_cnn(), rate, TASK.example_inputs)


def test_one_width_for_all_is_fedavg_of_the_small_model() -> None:
    """In the slice, bit for bit; outside of it nothing changes."""
    regions = tiny_chain().regions(width_of(GROUPS, 0.5))
    made = run(
        clients(message_app), strategy_of((), variants=Widths((0.5,), scale=False))
    )
    assert differences(dict(cut_state(made.state, regions)), alone(0.5)) == []
    before = initial_state()
    for name, region in regions.items():
        outside = np.ones(before[name].shape, dtype=bool)
        at = [np.arange(size) for size in outside.shape]
        for axis, indices in enumerate(region):
            at[axis] = at[axis] if indices is None else indices
        outside[np.ix_(*at)] = False
        assert outside.any()
        assert np.array_equal(made.state[name][outside], before[name][outside])


def test_indices_that_are_rolled_by_one_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A planted error in what the strategy cuts and places."""
    regions = tiny_chain().regions(width_of(GROUPS, 0.5))
    rolled = tiny_chain().regions(width_of(GROUPS, 0.5, shift=1))
    truth = alone(0.5)
    monkeypatch.setattr(chain_module.Chain, "regions", lambda *_, **__: rolled)
    made = run(
        clients(message_app), strategy_of((), variants=Widths((0.5,), scale=False))
    )
    assert differences(dict(cut_state(made.state, regions)), truth)


def test_codecs_and_accumulation_go_with_widths() -> None:
    """A lossless codec changes no bit, a rounding one does."""
    task = replace(TASK, accumulate=2)
    apps = partial(clients, message_app, task=task)
    truth = run(apps(), strategy_of((), task=task, variants=ByKey()))
    rules: dict[str, Any] = {"variants": ByKey(), "choose_route": route_of}
    for codec, is_exact in ((Packed(), True), (Integer(), False)):
        made = run(apps(), strategy_of(EDGES, task=task, codec=codec, **rules))
        assert made.kinds() == []
        assert (differences(made.state, truth.state) == []) is is_exact


@pytest.mark.parametrize("inner", [FedAdam, partial(FedAvgM, server_momentum=0.9)])
def test_a_server_step_leaves_what_nobody_trained(inner: Any) -> None:
    """There is no difference to step by; what was trained is stepped."""
    inside = inner(min_available_nodes=6, fraction_evaluate=0.0)
    strategy = strategy_of((), strategy=inside, variants=Widths((0.5,)))
    made = run(clients(message_app), strategy, num_rounds=3)
    before, after = initial_state()["4.weight"], made.state["4.weight"]
    assert np.array_equal(after[3:], before[3:])
    assert np.array_equal(after[:, 2:], before[:, 2:])
    assert (after[:3, :2] != before[:3, :2]).any(axis=(2, 3)).all()
    plain = run(
        clients(message_app), strategy_of((), variants=Widths((0.5,))), num_rounds=3
    )
    assert differences(made.state, plain.state)


def test_a_resumed_run_goes_on_with_the_windows_of_its_rounds(tmp_path: Path) -> None:
    """Rolling windows depend on the round alone."""

    def rolled(num_rounds: int, **checkpoints: Any) -> State:
        rule = Widths((0.5,), roll=True)
        strategy = strategy_of((), variants=rule, **checkpoints)
        return run(clients(message_app), strategy, num_rounds=num_rounds).state

    truth = rolled(4)
    rolled(2, checkpoints=Checkpoints(tmp_path))
    again = rolled(4, checkpoints=Checkpoints(tmp_path, resume=True))
    assert differences(again, truth) == []


def test_a_moving_budget_and_an_advisor_go_with_widths() -> None:
    """Narrow devices adapt as whole ones do, and the bits stay."""
    least = peak(0.5, Route.split(2))

    class Shrinking(MemoryBudget):
        def read(self, *, step: int, live_bytes: int) -> int:
            return 10**6 if step < 1 else least

    apps = [
        message_app(i, Shrinking(), edges=EDGES)
        if i == 1
        else message_app(i, edges=EDGES)
        for i in range(6)
    ]
    rules: dict[str, Any] = {
        "variants": Widths((0.5,)),
        "choose_route": lambda r: Route.split(6, edge="near"),
    }
    made = run(apps, strategy_of(EDGES, advisor=StragglerAdvisor(), **rules))
    truth = run(clients(message_app), strategy_of((), variants=Widths((0.5,))))
    assert made.kinds() == []
    assert differences(made.state, truth.state) == []


# --- who is offered what --------------------------------------------------------------


def test_a_narrower_model_only_where_no_route_of_a_wider_one_fits(
    tmp_path: Path,
) -> None:
    """Split before narrow; and the journal names the width and its exact peak."""
    least = min(peak(1.0, Route.split(cut)) for cut in range(1, 9))
    budgets = [None, peak(1.0, Route.split(3)), least - 1, 10]
    apps = [message_app(i, b) for i, b in enumerate(budgets)]
    journal = tmp_path / "journal.jsonl"
    strategy = strategy_of(
        variants=Widths((1.0, 0.5, 0.25)), recompute=False, journal=journal
    )
    made = run(apps, strategy, num_rounds=1)
    assert made.kinds() == []
    assert names_of(strategy) == {"c0": "whole", "c1": "whole", "c2": "width 0.5"}
    assert "c3" in strategy.round_plans[0].skipped
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    trained = {r["client_key"]: r for r in rows if r.get("status") == "accepted"}
    assert {k: r.get("variant") for k, r in trained.items()} == {
        "c0": None,
        "c1": None,
        "c2": "width 0.5",
    }
    for row in trained.values():
        assert row["peak_bytes"] == row["predicted_peak_bytes"]


def test_without_edges_the_widest_that_fits_is_trained() -> None:
    """The ladder of HeteroFL."""
    rates = (1.0, 0.5, 0.25)
    budgets = [peak(rate, Route.whole()) for rate in rates]
    strategy = strategy_of((), variants=Widths(rates), recompute=False)
    run([message_app(i, b) for i, b in enumerate(budgets)], strategy, num_rounds=1)
    assert names_of(strategy) == {"c0": "whole", "c1": "width 0.5", "c2": "width 0.25"}


def test_rolling_widths_train_every_value_in_the_end() -> None:
    """FedRolex; without rolling, the last channels never change."""
    changed = {}
    for roll in (True, False):
        rule = Widths((0.5,), roll=roll)
        state = run(
            clients(message_app), strategy_of((), variants=rule), num_rounds=12
        ).state
        weight = "4.weight"
        changed[roll] = (state[weight] != initial_state()[weight]).any(axis=(2, 3))
    assert changed[True].all()
    assert not changed[False][3:].any()
    assert not changed[False][:, 2:].any()


def test_the_whole_model_is_evaluated_or_nothing() -> None:
    """Who could only evaluate a narrow model sits out."""
    budgets = [None, peak(0.25, Route.whole())]
    apps = [message_app(i, b) for i, b in enumerate(budgets)]
    strategy = strategy_of((), variants=Widths((1.0, 0.25)), fraction_evaluate=1.0)
    made = run(apps, strategy, num_rounds=1)
    assert len(messages(made.grid, "train")) == 2
    (message,) = messages(made.grid, "evaluate")
    assert arrays_of(message)["0.weight"].shape == initial_state()["0.weight"].shape


def test_a_narrow_client_that_sends_the_whole_is_refused() -> None:
    """Its shapes are the variant's."""
    grid = InProcessGrid(clients(message_app))

    def widen(content: Any) -> None:
        record = next(iter(content.array_records.values()))
        for name in list(record):
            record[name] = to_array_record(initial_state())[name]

    grid.alter(1, widen, nth=1)
    made = run(grid, strategy_of((), variants=ByKey()), num_rounds=1)
    assert made.kinds() == [("c1", "refused")]


# --- what is refused ------------------------------------------------------------------


def linear() -> nn.Sequential:
    """Build a model of one layer: nothing in it can be left out."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


def listed(model: nn.Module) -> list[Unit]:
    """List the units by hand."""
    return [
        Unit(name, lambda root, x, name=name: getattr(root, name)(x), (name,))
        for name, _ in model.named_children()
    ]


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (
            replace(TASK, model_fn=linear),
            NotSplittable,
            "cannot be narrowed.*what the model returns is not understood",
        ),
        (replace(TASK, units_fn=listed), NotSplittable, "were listed by hand"),
        (
            replace(TASK, is_local=lambda name: name.startswith("1.")),
            InvalidTask,
            "is_local keeps 1.weight, 1.bias, 1.running_mean .4 in all. on",
        ),
    ],
)
def test_a_task_that_cannot_be_narrowed_is_refused(
    task: Task, error: type[Exception], message: str
) -> None:
    """Before the first round, with the reason."""
    with pytest.raises(error, match=message):
        strategy_of((), task=task, variants=Widths())
    strategy_of((), task=task)


def test_local_layers_that_stay_whole_go_with_widths() -> None:
    """The last layer's bias has no channel that may be left out."""
    task = replace(TASK, is_local=lambda name: name == "8.bias")
    rule = Widths((0.5,))
    made = run(
        clients(message_app, task=task), strategy_of((), task=task, variants=rule)
    )
    assert made.kinds() == []
    assert np.array_equal(made.state["8.bias"], initial_state()["8.bias"])


def test_a_rule_that_offers_nothing_is_refused() -> None:
    """It would leave devices out without a word."""

    class Nothing:
        def offered(self, request: VariantRequest) -> Sequence[Variant]:
            return ()

    with pytest.raises(InvalidTask, match="offers client 'c0'"):
        run(clients(message_app), strategy_of((), variants=Nothing()))
    with pytest.raises(TypeError, match="variants is 0\\.5; give something"):
        Planning(variants=0.5)  # type: ignore[arg-type]


def frozen_cnn() -> nn.Sequential:
    """Build the model with a first layer that is not trained."""
    model = tiny_cnn()
    model[0].requires_grad_(False)
    return model


def test_a_frozen_front_is_cut_like_the_rest() -> None:
    """It is sent with every plan, since widths change from round to round."""
    task = replace(TASK, model_fn=frozen_cnn)
    rule = Widths((0.5,), roll=True)
    made = run(
        clients(message_app, task=task),
        strategy_of(EDGES, task=task, variants=rule, choose_route=route_of),
        num_rounds=3,
    )
    assert made.kinds() == []
    assert np.array_equal(made.state["0.weight"], initial_state()["0.weight"])
    alone = strategy_of((), task=task, variants=rule)
    truth = run(clients(message_app, task=task), alone, num_rounds=3)
    assert differences(made.state, truth.state) == []
