"""SmartSplit: any mix of routes, APIs and mishaps is FedAvg over who was accepted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from flwr_smartsplit import (
    Route,
    SelectByUtility,
    SmartSplit,
    predicted_peak_bytes,
    profile_chain,
)
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import (
    EdgeUnreachable,
    InvalidTask,
    NotSplittable,
    SmartSplitError,
    bytes_text,
)
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from flwr_smartsplit.flower.serde.replies import reply_from_content
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import Status
from tests.faults import Deliver, MortalEdge, tail_files
from tests.flower.apps import (
    apps,
    broken_app,
    budgets_of,
    failing_app,
    initial_arrays,
    legacy_app,
    make_client,
    message_app,
    messages,
    overweight_app,
    run,
    smart_split,
)
from tests.in_process_grid import InProcessGrid
from tests.tasks import (
    BATCH_SIZE,
    TASK,
    WithUnused,
    differences,
    initial_state,
    tiny_cnn,
    transposed_mlp,
)

MIXED = budgets_of(1, 4, None, 8)
App = Callable[..., ClientApp]


# --- FedAvg ---------------------------------------------------------------------------


def test_any_mix_of_routes_gives_the_bits_of_whole_models() -> None:
    """Three rounds, four routes, one of them whole."""
    mixed = run(apps(MIXED), num_rounds=3)
    whole = run(apps([None] * 4), num_rounds=3)
    routes = {
        a.option.route for plan in mixed.strategy.round_plans for a in plan.assignments
    }
    assert routes == {Route.whole(), *map(Route.split, (1, 4, 8))}
    assert differences(mixed.state, whole.state) == []
    assert len(differences(mixed.state, initial_state())) > 12
    assert mixed.kinds() == []


def test_both_of_flowers_apis_give_the_same_bits() -> None:
    """A ``NumPyClient`` and a Message-API app, each alone and side by side."""
    ours = run(apps(MIXED))
    legacy = run([legacy_app(k, budget) for k, budget in enumerate(MIXED)])
    half = [message_app, legacy_app, legacy_app, message_app]
    mixed = run([make(k, MIXED[k]) for k, make in enumerate(half)])
    assert differences(legacy.state, ours.state) == []
    assert differences(mixed.state, ours.state) == []


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_several_local_epochs_are_weighed_as_one(make: App) -> None:
    """Examples are counted once, wherever the rest of the model trains."""
    split = run([make(k, b, local_epochs=2) for k, b in enumerate(MIXED)])
    whole = run([make(k, None, local_epochs=2) for k in range(4)])
    assert differences(split.state, whole.state) == []


def test_stock_fedavg_drives_our_clients() -> None:
    """One round agrees to 1e-6 of each array's scale, and it can evaluate too.

    Flower multiplies by weight fractions in float32.
    """
    stock = run(apps([None] * 4), FedAvg(), num_rounds=1)
    ours = run(apps(MIXED), smart_split(seed=0), num_rounds=1)
    assert list(stock.state) == list(ours.state)
    for name, mine in ours.state.items():
        gap = np.abs(mine - stock.state[name]).max()
        assert gap <= 1e-6 * max(float(np.abs(mine).max()), 1e-12), name
    assert "accuracy" in stock.result.evaluate_metrics_clientapp[1]


def test_weights_that_lie_column_by_column_are_not_mixed_up() -> None:
    """Flower keeps an array's memory order; the edge must read the same values."""
    task = replace(TASK, model_fn=transposed_mlp)
    torch.manual_seed(1)
    arrays = ArrayRecord(transposed_mlp().state_dict())
    assert not arrays["1.weight"].numpy().flags.c_contiguous
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=BATCH_SIZE, task=task)
    budget = predicted_peak_bytes(profile, Route.split(1))
    split, whole = (
        run(
            [message_app(client, b, task=task) for client in range(2)],
            smart_split(task=task, seed=0),
            arrays=arrays,
        )
        for b in (budget, None)
    )
    routes = {a.option.route for a in split.strategy.round_plans[0].assignments}
    assert len(routes) == 1
    assert Route.whole() not in routes
    assert differences(split.state, whole.state) == []


def test_names_that_no_unit_uses_keep_their_bits() -> None:
    """With whole clients, who send them along, and with split ones, who do not."""
    task = replace(TASK, model_fn=WithUnused)
    torch.manual_seed(1)
    model = WithUnused()
    arrays = ArrayRecord(model.state_dict())
    for budgets in ([None, *MIXED[:2]], MIXED[:2], [None] * 2):
        made = run(
            [message_app(k, b, task=task) for k, b in enumerate(budgets)],
            smart_split(task=task, seed=0),
            arrays=arrays,
        )
        assert made.kinds() == []
        for name in ("spare", "note"):
            assert made.state[name].tobytes() == arrays[name].numpy().tobytes()
        model.load_state_dict(made.result.arrays.to_torch_state_dict())


def test_the_result_loads_into_the_stock_model() -> None:
    """Strictly, and in its order."""
    made = run(apps(MIXED), num_rounds=1)
    model = tiny_cnn()
    assert list(made.state) == list(model.state_dict())
    model.load_state_dict(made.result.arrays.to_torch_state_dict(), strict=True)


def test_node_ids_decide_nothing() -> None:
    """Other ids and another order of the same clients sample and train the same."""
    in_turns = SelectByUtility(waiting=9.0)
    half = {"fraction_train": 0.5, "min_train_nodes": 1, "select": in_turns}
    ordered = list(enumerate([*MIXED, None, MIXED[0]]))
    one = run([message_app(*c) for c in ordered], smart_split(**half), num_rounds=3)
    two = run(
        [message_app(*c) for c in reversed(ordered)],
        smart_split(**half),
        num_rounds=3,
    )
    assert one.strategy.round_plans == two.strategy.round_plans
    drawn = [[a.client_key for a in p.assignments] for p in one.strategy.round_plans]
    assert all(len(keys) == 3 for keys in drawn)
    assert len({tuple(keys) for keys in drawn}) > 1
    assert differences(one.state, two.state) == []


# --- one client's trouble -------------------------------------------------------------


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_a_client_over_its_cap_is_a_reply_and_touches_nobody(make: App) -> None:
    """Its reply has the numbers; all rounds equal those of a run without it."""
    others = [(k, budget) for k, budget in enumerate(MIXED) if k != 1]
    with_it = run(
        [make(*others[0]), overweight_app(1, make), *(make(*c) for c in others[1:])],
        num_rounds=3,
    )
    without = run([make(*client) for client in others], num_rounds=3)
    assert with_it.kinds() == [("c1", "out_of_memory")] * 3
    assert differences(with_it.state, without.state) == []
    node = with_it.grid.node_ids[1]
    replies = [
        message
        for message in with_it.grid.replied
        if message.metadata.src_node_id == node
        and message.metadata.message_type == "train"
    ]
    assert len(replies) == 3
    for message in replies:
        assert not message.has_error()
        report = reply_from_content(message.content, lambda moves: []).report
        assert report.status is Status.OUT_OF_MEMORY
        plan = with_it.strategy.round_plans[0].assignments[1]
        assert plan.budget_bytes is not None
        assert report.peak_bytes > plan.budget_bytes
        cap = f"over the cap of {bytes_text(plan.budget_bytes)}"
        assert cap in report.message
        records = message.content.array_records.values()
        assert not any(array.data for record in records for array in record.values())


MISHAPS: dict[str, tuple[Callable[[InProcessGrid], None], list[tuple[str, str]]]] = {
    "lost": (lambda grid: grid.lose(1, nth=1), [("c1", "lost")]),
    "late": (
        lambda grid: grid.delay(1, nth=1),
        [("c1", "lost"), ("c1", "late")],
    ),
    "the node is gone": (
        lambda grid: grid.fail_at_superlink(1, nth=1),
        [("c1", "failed")],
    ),
    "not a number": (
        lambda grid: grid.alter(1, spoil_first_array, nth=1),
        [("c1", "refused")],
    ),
    "nonsense": (
        lambda grid: grid.alter(1, RecordDict.clear, nth=1),
        [("c1", "refused")],
    ),
}


def spoil_first_array(content: RecordDict) -> None:
    """Put a value that is not a number into a reply."""
    record = next(iter(content.array_records.values()))
    name = next(iter(record))
    values = record[name].numpy().copy()
    values.flat[0] = np.nan
    record[name] = type(record[name])(values)


@pytest.mark.every(3)
@pytest.mark.parametrize("mishap", MISHAPS)
@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_a_reply_that_does_not_count_leaves_no_trace(make: App, mishap: str) -> None:
    """Every mishap of one round ends in the same bits, that of a lost reply."""
    happen, kinds = MISHAPS[mishap]
    grid = InProcessGrid([make(k, b) for k, b in enumerate(MIXED)])
    happen(grid)
    made = run(grid)
    assert made.kinds() == kinds
    lossy = InProcessGrid(apps(MIXED))
    lossy.lose(1, nth=1)
    assert differences(made.state, run(lossy).state) == []
    assert differences(made.state, run(apps(MIXED)).state) != []


def test_a_reply_that_comes_twice_counts_once() -> None:
    """The second one is a failure of its own."""
    grid = InProcessGrid(apps(MIXED))
    grid.duplicate(1, nth=1)
    made = run(grid)
    assert made.kinds() == [("c1", "duplicate")]
    assert differences(made.state, run(apps(MIXED)).state) == []


def test_an_error_in_a_client_is_that_clients_failure() -> None:
    """The cause is its own; the others equal a run without it."""
    made = run([*apps(MIXED), failing_app(4)])
    assert made.kinds() == [("c4", "failed")] * 2
    assert "disk on fire" in made.strategy.failures[0].cause
    assert differences(made.state, run(apps(MIXED)).state) == []


def test_who_cannot_fit_any_route_sits_out() -> None:
    """It is sent nothing, and nobody else notices."""
    made = run([*apps(MIXED), message_app(4, 10)])
    assert made.kinds() == []
    assert set(made.strategy.round_plans[0].skipped) == {"c4"}
    asked = {message.metadata.dst_node_id for message in messages(made.grid, "train")}
    assert asked == set(made.grid.node_ids[:4])
    assert differences(made.state, run(apps(MIXED)).state) == []


def test_two_nodes_of_one_name_do_not_end_the_run() -> None:
    """One of them takes part."""
    made = run([*apps(MIXED), message_app(3, MIXED[3])])
    assert set(made.kinds()) == {("c3", "duplicate")}
    assert differences(made.state, run(apps(MIXED)).state) == []


@pytest.mark.parametrize("field", ["loss", "num_examples"])
def test_a_report_of_other_types_is_one_clients_failure(field: str) -> None:
    """Numbers that are none must not end the run."""

    def confuse(content: RecordDict) -> None:
        text = str(content["smartsplit"]["smartsplit.reply"])
        head, tail = text.split(f'"{field}": ', 1)
        tail = tail[min(tail.index(","), tail.index("}")) :]
        content["smartsplit"]["smartsplit.reply"] = f'{head}"{field}": null{tail}'

    grid = InProcessGrid(apps(MIXED))
    grid.alter(1, confuse, nth=1)
    assert run(grid).kinds() == [("c1", "refused")]


def test_without_a_single_reply_the_arrays_stay() -> None:
    """Round 1 is lost for all; round 2 goes on from where the run started."""
    seen: dict[int, ArrayRecord] = {}

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        seen[server_round] = arrays
        return MetricRecord({"x": 0.0})

    grid = InProcessGrid(apps(MIXED))
    for client in range(4):
        grid.lose(client, nth=1)
    made = run(grid, evaluate_fn=evaluate)
    state = {name: array.numpy() for name, array in seen[1].items()}
    assert differences(state, initial_state()) == []
    assert list(made.result.train_metrics_clientapp) == [2]
    assert len(differences(made.state, initial_state())) > 0


# --- edges that die -------------------------------------------------------------------


def with_edge(edge: MortalEdge) -> list[ClientApp]:
    """Make the mixed clients, who reach this edge."""
    return apps(MIXED, edges=(edge,))


def test_an_edge_that_dies_in_a_round_costs_that_rounds_split_clients(
    tmp_path: Path,
) -> None:
    """It is started again for the next one, and gives the bits of lost replies."""
    edge = MortalEdge(tmp_path)
    commits: list[Any] = []

    def die_once(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.Commit) and not commits:
            commits.append(request)
            edge.kill()
        return deliver(request)

    edge.hook = die_once
    made = run(with_edge(edge), smart_split([edge]))
    assert made.kinds() == [(key, "edge_failed") for key in ("c0", "c1", "c3")]
    assert edge.num_starts == 2
    lossy = InProcessGrid(apps(MIXED))
    for client in (0, 1, 3):
        lossy.lose(client, nth=1)
    assert differences(made.state, run(lossy).state) == []


def test_an_edge_keeps_nothing_of_a_round_that_is_settled(tmp_path: Path) -> None:
    """Between rounds its disk holds no tail, and one state at most."""
    edge = MortalEdge(tmp_path)
    left: list[tuple[int, int]] = []

    def look(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round:
            files = list(edge.folder.iterdir())
            left.append((len(files), len(tail_files(edge.folder))))
        return MetricRecord()

    strategy = smart_split([edge], fraction_evaluate=1.0)
    run(with_edge(edge), strategy, num_rounds=3, evaluate_fn=look)
    assert left == [(1, 0)] * 3


def test_edges_end_with_the_run_and_with_its_failure(tmp_path: Path) -> None:
    """Their files too."""
    edge = MortalEdge(tmp_path / "a")
    run(with_edge(edge), smart_split([edge]))
    assert not edge.folder.exists()

    def fail(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round:
            raise RuntimeError("on purpose")
        return MetricRecord()

    edge = MortalEdge(tmp_path / "b")
    with pytest.raises(RuntimeError, match="on purpose"):
        run(with_edge(edge), smart_split([edge]), evaluate_fn=fail)
    assert edge.num_starts == 1
    assert not edge.folder.exists()


def test_an_edge_that_clients_do_not_know_is_their_failure(tmp_path: Path) -> None:
    """The reply says which edges they know."""
    edge = MortalEdge(tmp_path, name="far")
    made = run(apps(MIXED), smart_split([edge]), num_rounds=1)
    assert made.kinds() == [(key, "edge_failed") for key in ("c0", "c1", "c3")]
    assert "knows no edge 'far', only ['edge']" in made.strategy.failures[0].cause


def test_a_model_that_cannot_be_cut_is_refused_at_once() -> None:
    """Before any client is asked, and only if there are edges."""
    task = replace(TASK, model_fn=lambda: nn.Sequential(nn.Flatten()))
    SmartSplit(task)
    with pytest.raises(NotSplittable, match="cannot be cut anywhere"):
        SmartSplit(task, (LocalEdge(),))


def test_no_edge_from_the_start_ends_the_run(tmp_path: Path) -> None:
    """With the edge's own words."""

    class Stillborn(MortalEdge):
        def start(self, task: Any) -> str:
            raise EdgeUnreachable("no such machine")

    edge = Stillborn(tmp_path)
    with pytest.raises(EdgeUnreachable, match="no such machine"):
        run(with_edge(edge), smart_split([edge]))


HOSTILE: dict[str, tuple[str, Any]] = {
    "metrics that are a list": ("metrics", [["x", 1]]),
    "a count too large for a float": ("num_steps", 10**400),
    "a metric too large for a float": ("metrics", {"x": 10**400}),
}


def altered_report(field: str, value: Any) -> Callable[[RecordDict], None]:
    """Make a change of one field of the report in a reply."""

    def alter(content: RecordDict) -> None:
        reply = json.loads(str(content["smartsplit"]["smartsplit.reply"]))
        reply["report"][field] = value
        content["smartsplit"]["smartsplit.reply"] = json.dumps(reply)

    return alter


@pytest.mark.parametrize("case", HOSTILE)
def test_numbers_that_nobody_can_average_are_one_clients_failure(case: str) -> None:
    """The reply is refused; the run goes on."""
    grid = InProcessGrid(apps(MIXED))
    grid.alter(1, altered_report(*HOSTILE[case]), nth=1)
    assert run(grid).kinds() == [("c1", "refused")]


def test_a_metric_cannot_take_the_place_of_the_weight() -> None:
    """What a client calls ``num-examples`` falsifies nobody's average."""
    grid = InProcessGrid(apps(MIXED))
    grid.alter(1, altered_report("metrics", {"num-examples": -1e9}), nth=1)
    made, honest = run(grid, num_rounds=1), run(apps(MIXED), num_rounds=1)
    metrics = made.result.train_metrics_clientapp[1]
    assert metrics["loss"] == honest.result.train_metrics_clientapp[1]["loss"]


@pytest.mark.parametrize(
    "arrays", [{"missing": np.zeros(1)}, {"4.weight": np.zeros((1, 2), np.float32)}]
)
def test_arrays_of_another_model_are_refused_at_the_start(
    arrays: dict[str, np.ndarray],
) -> None:
    """Every difference is named, before anybody is asked anything."""
    grid = InProcessGrid(apps(MIXED))
    wrong = to_array_record({**from_array_record(initial_arrays()), **arrays})
    with pytest.raises(InvalidTask, match=f"{next(iter(arrays))}.*instead of"):
        run(grid, arrays=wrong)
    assert grid.sent == []


def test_a_run_in_which_nobody_says_who_it_is_ends_at_once() -> None:
    """Else it would seem to succeed, with arrays that were never trained."""
    with pytest.raises(SmartSplitError, match="none of 2 nodes can take part"):
        run([broken_app(), broken_app()])


def test_one_edge_must_be_given_in_a_tuple() -> None:
    """The error shows how."""
    with pytest.raises(TypeError, match="give a tuple"):
        SmartSplit(TASK, LocalEdge())  # type: ignore[arg-type]


def test_a_config_that_nobody_reads_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A learning rate in ``train_config`` would otherwise be ignored in silence."""
    run(apps(MIXED), train_config=ConfigRecord({"lr": 0.1}))
    warned = [r for r in caplog.records if "nothing reads them" in r.getMessage()]
    assert len(warned) == 1
    assert "lr" in warned[0].getMessage()


def test_a_run_in_which_nobody_trains_ends_in_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The initial model would look like a success."""
    with pytest.raises(SmartSplitError, match="still the initial one: 2 x no route"):
        run(apps([1, 1]), num_rounds=1)
    logged = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert ["Round 1 merged nothing" in each for each in logged] == [True]


def test_a_choice_of_routes_that_is_no_function_is_refused_at_once() -> None:
    """Not in the first round."""
    with pytest.raises(TypeError, match="choose_route is 'u_shaped'"):
        smart_split(choose_route="u_shaped")


def test_a_clients_edges_that_are_no_tuple_are_named() -> None:
    """As the strategy's."""
    with pytest.raises(TypeError, match=r"give a tuple, such as \(RayEdge"):
        make_client(0, edges=LocalEdge())
