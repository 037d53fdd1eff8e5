"""A model that is pruned in a run: from then on a smaller one, on all routes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi

from flwr_smartsplit import (
    Checkpoints,
    HessianRate,
    Integer,
    Momentum,
    Packed,
    PruneAt,
    Route,
    ServerData,
    StragglerAdvisor,
    Widths,
    grown,
    narrowed,
    predicted_peak_bytes,
)
from flwr_smartsplit.edge.regions import cut_state
from flwr_smartsplit.edge.state_store import StateStore
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.flower import server_optimizer
from flwr_smartsplit.flower.rounds import manager
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.types import WHOLE
from tests.flower.apps import legacy_app, message_app, run
from tests.flower.apps import smart_split as strategy_of
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.flower.test_mixed_routes import EDGES, ROUTES, by_key
from tests.killed_runs import Kind, run_kind
from tests.tasks import (
    BATCH_SIZE,
    TASK,
    State,
    differences,
    loader,
    tiny_chain,
    tiny_cnn,
)

ROUNDS = 3
SERVER_EXAMPLES = 77
APIS = pytest.mark.parametrize("api", ["message", "legacy"])


def server(**changes: Any) -> ServerData:
    """Make the server's examples."""
    how = {"noniid": (0.3, 0.2), "epochs": 1, **changes}
    return ServerData(loader(SERVER_EXAMPLES), **how)


def rule(**changes: Any) -> PruneAt:
    """Prune half at the end of round 1."""
    return PruneAt(**{"round": 1, "rate": 0.5, "data": server(), **changes})


def trained(api: str = "message", *, whole: bool = False, **changes: Any) -> Any:
    """Train five clients on all kinds of route, or whole."""
    is_new, edges = api == "message", () if whole else EDGES
    make, build = (
        (message_app, strategy_of) if is_new else (legacy_app, legacy_smart_split)
    )
    options = {} if whole else {"choose_route": by_key}
    options |= {"variants": rule(), **changes}
    rounds = options.pop("num_rounds", ROUNDS)
    task = options.get("task", TASK)
    clients = [make(i, edges=EDGES, task=task) for i in range(len(ROUTES))]
    start = run if is_new else run_legacy
    made = start(clients, build(edges, **options), num_rounds=rounds)
    assert made.kinds() == []
    return made


@pytest.fixture(scope="module")
def pruned_whole() -> Any:
    """Train the same on the devices alone."""
    return trained(whole=True)


def by_hand(variant: Any) -> State:
    """Train a round whole, cut the state, and train the rest in the small model."""
    first = trained(whole=True, variants=Widths((1.0,)), num_rounds=1).state
    return dict(cut_state(first, tiny_chain().regions(variant)))


# --- the same numbers -----------------------------------------------------------------


@APIS
def test_rate_0_changes_no_bit(api: str) -> None:
    """Nothing goes, and the run is one without a rule."""
    truth = trained(api, variants=Widths((1.0,)))
    made = trained(api, variants=rule(rate=0.0))
    assert made.strategy.variant == WHOLE
    assert differences(made.state, truth.state) == []
    assert trained(api).strategy.variant != WHOLE


@APIS
def test_routes_change_no_bit_of_a_pruned_model(api: str, pruned_whole: Any) -> None:
    """Split, u-shaped, over hops: before and after the model is pruned."""
    made = trained(api)
    assert made.strategy.variant == pruned_whole.strategy.variant != WHOLE
    plan = made.strategy.round_plans[-1]
    assert {a.client_key: a.option.route for a in plan.assignments} == ROUTES
    assert differences(made.state, pruned_whole.state) == []


def test_the_state_is_cut_once_and_trained_on(pruned_whole: Any) -> None:
    """One round pruned is the round cut; shapes are the variant's afterwards."""
    once = trained(whole=True, num_rounds=1)
    variant = once.strategy.variant
    assert variant == pruned_whole.strategy.variant
    assert differences(once.state, by_hand(variant)) == []
    kinds = tiny_chain().under(variant).kinds
    for state in (once.state, pruned_whole.state):
        assert {n: a.shape for n, a in state.items()} == {
            n: shape for n, (shape, _) in kinds.items()
        }
    assert differences(once.state, pruned_whole.state)


def test_an_edge_that_takes_the_state_for_the_whole_one_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted error: what the strategy says of a held state is forgotten."""
    monkeypatch.setattr(StateStore, "variant_of", lambda *_: WHOLE)
    with pytest.raises((AssertionError, SmartSplitError)):
        trained()


def test_a_state_that_is_cut_elsewhere_is_seen(
    pruned_whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: the strategy keeps the channels in another order."""

    def turned(state: State, regions: Any) -> State:
        cut = dict(cut_state(state, regions))
        if regions:
            cut["0.weight"] = np.ascontiguousarray(cut["0.weight"][::-1])
        return cut

    monkeypatch.setattr(manager, "cut_state", turned)
    assert differences(trained().state, pruned_whole.state)


def test_peaks_are_those_of_the_smaller_model(pruned_whole: Any) -> None:
    """What a plan predicts is the dry run of the pruned model, and less than before."""
    strategy = trained().strategy
    first, last = strategy.round_plans[0], strategy.round_plans[-1]
    profile = profile_of(TASK, batch_size=BATCH_SIZE, variant=strategy.variant)
    for before, after in zip(first.assignments, last.assignments, strict=True):
        route = after.option.route
        assert after.option.peak_bytes == predicted_peak_bytes(profile, route)
        assert after.option.peak_bytes < before.option.peak_bytes


def test_whom_nothing_fitted_may_fit_now() -> None:
    """A budget below the whole model's, and above that of the pruned one."""
    variant = trained(whole=True, num_rounds=1).strategy.variant
    profile = profile_of(TASK, batch_size=BATCH_SIZE, variant=variant)
    budget = predicted_peak_bytes(profile, Route.whole())
    clients = [message_app(0), message_app(1), message_app(2, budget)]
    made = run(clients, strategy_of((), variants=rule()), num_rounds=2)
    taken = [
        {a.client_key for a in plan.assignments} for plan in made.strategy.round_plans
    ]
    assert taken == [{"c0", "c1"}, {"c0", "c1", "c2"}]


# --- what goes with it ----------------------------------------------------------------


def test_widths_are_shares_of_what_is_left(pruned_whole: Any) -> None:
    """A narrow client trains a part of the pruned model, on any route."""
    half = rule(variants=Widths((0.5,), scale=False))
    made = trained(variants=half)
    base = made.strategy.variant
    options = {a.option.variant for a in made.strategy.round_plans[-1].assignments}
    assert {each.name for each in options} == {f"width 0.5 of {base.name}"}
    (narrow,) = options
    for name, kept in narrow.kept.items():
        has = base.kept.get(name) or range(dict(_sizes())[name])
        assert set(kept) <= set(has)
        assert len(kept) == -(-len(has) // 2)
    truth = trained(whole=True, variants=half)
    assert differences(made.state, truth.state) == []
    assert differences(made.state, pruned_whole.state)


def _sizes() -> list[tuple[str, int]]:
    return [(each.name, each.size) for each in tiny_chain().channels.groups]


@pytest.mark.slow
@APIS
def test_clients_evaluate_the_pruned_model(api: str) -> None:
    """Along their routes, as if it were whole on each."""
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"fraction_evaluate": 1.0, "on_row": [rows.append]}
    made, truth = (trained(api, whole=w, **options) for w in (False, True))
    assert differences(made.state, truth.state) == []
    losses = [r["loss"] for r in rows if r.get("phase") == "evaluate" and "loss" in r]
    half = len(ROUTES) * ROUNDS
    assert len(losses) == 2 * half
    assert losses[:half] == losses[half:]
    assert losses[:half] != sorted(losses[:half])


@pytest.mark.slow
def test_codecs_accumulation_and_advice_go_on() -> None:
    """A lossless codec changes no bit, a rounding one does; cuts may move."""
    task = {"task": replace(TASK, accumulate=2)}
    truth = trained(whole=True, **task)
    assert differences(trained(codec=Packed(), **task).state, truth.state) == []
    assert differences(trained(codec=Integer(), **task).state, truth.state)
    advised = trained(advisor=StragglerAdvisor(), **task)
    assert differences(advised.state, truth.state) == []


@pytest.mark.slow
@APIS
def test_server_steps_go_on_with_the_smaller_model(api: str) -> None:
    """The server trains what is left, and momentum keeps its values of that."""

    def steps(data: ServerData) -> Any:
        return Momentum(beta=0.5), data

    data, other = server(), server()
    made = trained(api, variants=rule(data=data), server_steps=steps(data))
    truth = trained(whole=True, variants=rule(data=other), server_steps=steps(other))
    assert differences(made.state, truth.state) == []
    assert [each.round_number for each in data.trainings] == [1, 2, 3]
    plain = trained(api, variants=rule(), server_steps=(server(),))
    assert differences(made.state, plain.state)


@pytest.mark.slow
def test_a_momentum_that_is_dropped_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: what is left of the memory is forgotten."""
    options = {"server_steps": (Momentum(beta=0.5),), "whole": True}
    truth = trained(**options)

    def forget(self: Momentum, regions: Any) -> None:
        self._memory.changes = {}

    monkeypatch.setattr(Momentum, "cut", forget)
    assert differences(trained(**options).state, truth.state)


MOMENTS: dict[str, Callable[[], Any]] = {
    "adam": lambda: FedAdam(eta=0.05, fraction_evaluate=0.0),
    "yogi": lambda: FedYogi(eta=0.05, fraction_evaluate=0.0),
    "avgm": lambda: FedAvgM(server_momentum=0.5, fraction_evaluate=0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("inner", MOMENTS)
def test_moments_of_flowers_strategies_are_cut(
    inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go on with the values that are left; planted: they begin anew."""
    make = MOMENTS[inner]
    made = trained(strategy=make())
    whole = trained(whole=True, strategy=make())
    assert differences(made.state, whole.state) == []

    def forget(self: Any, regions: Any) -> None:
        held = vars(self._take_step.args[0])
        held |= dict.fromkeys(set(held) & set(server_optimizer._MOMENTS))

    monkeypatch.setattr(server_optimizer.ServerOptimizer, "cut", forget)
    assert differences(trained(whole=True, strategy=make()).state, whole.state)


@pytest.mark.slow
@APIS
def test_a_run_killed_after_it_was_pruned_ends_as_one_that_was_not(
    api: str, tmp_path: Path
) -> None:
    """What is left is in the checkpoint, with the moments of it."""
    kind = Kind(api, "FedAdam")

    def go(saved: Checkpoints | None = None, **how: Any) -> Any:
        options = {"num_rounds": 4, "variants": rule(round=2), **how}
        return run_kind(kind, saved, **options)

    wanted = go()
    go(Checkpoints(tmp_path), num_rounds=3)
    made = go(Checkpoints(tmp_path))
    assert min(made.plans) == 4
    assert differences(made.state, wanted.state) == []
    kinds = tiny_chain().kinds
    assert any(a.shape != kinds[n][0] for n, a in made.state.items())


# --- how much, and what was measured --------------------------------------------------


@pytest.mark.slow
def test_the_hessian_says_how_much() -> None:
    """The same in every run, and on any route."""
    how = {"rate": HessianRate(probes=2, iterations=10)}
    made = trained(variants=rule(**how))
    assert made.strategy.variant.name.startswith("pruned 0.")
    again = trained("legacy", whole=True, variants=rule(**how))
    assert again.strategy.variant == made.strategy.variant
    assert differences(made.state, again.state) == []


@pytest.mark.slow
def test_norms_need_no_data() -> None:
    """And choose others than ranks do."""
    made = trained(whole=True, variants=rule(score="norm", data=None))
    assert made.strategy.variant != WHOLE
    assert made.strategy.variant.name == "pruned 0.5"


@pytest.mark.slow
def test_the_last_round_may_prune() -> None:
    """What the run ends with is the smaller model."""
    variants = rule(round=2, score="norm", data=None)
    made = trained(whole=True, variants=variants, num_rounds=2)
    assert made.strategy.variant != WHOLE
    kinds = tiny_chain().under(made.strategy.variant).kinds
    assert all(a.shape == kinds[n][0] for n, a in made.state.items())


# --- exported -------------------------------------------------------------------------


def test_a_pruned_model_is_exported_and_grown(pruned_whole: Any) -> None:
    """Both compute the same; planted: what reads a silent channel is not silent."""
    variant = pruned_whole.strategy.variant
    example = TASK.example_inputs
    arrays = {n: torch.from_numpy(a) for n, a in pruned_whole.state.items()}
    small, stock = narrowed(tiny_cnn(), variant, example).eval(), tiny_cnn().eval()
    small.load_state_dict(arrays)
    state = grown(arrays, variant, tiny_cnn(), example)
    stock.load_state_dict(state)
    inputs = torch.randn(8, *example.shape[1:])
    torch.testing.assert_close(stock(inputs), small(inputs), rtol=0, atol=1e-5)
    gone = sorted({*range(6)} - set(variant.kept["4.weight"]))
    state["5.bias"][gone] = 1.0
    state["8.weight"].view(3, 6, 4)[:, gone] = 1.0
    stock.load_state_dict(state)
    assert (stock(inputs) - small(inputs)).abs().max() > 1e-2


# --- refused --------------------------------------------------------------------------


def test_what_cannot_work_is_refused_at_the_start() -> None:
    """With what, against what, and what next."""
    for how, why in (
        ({"round": 0}, "counted from 1"),
        ({"rate": 1.0}, "below 1"),
        ({"rate": True}, "below 1"),
        ({"score": "size"}, "norm"),
        ({"data": None}, r"data=ServerData\(loader\)"),
        ({"rate": HessianRate(), "score": "norm", "data": None}, "HessianRate are"),
        ({"variants": rule()}, "learns from rounds"),
    ):
        with pytest.raises(ValueError, match=why):
            rule(**how)
    with pytest.raises(ValueError, match="at least 1"):
        HessianRate(probes=0)


@APIS
def test_a_round_after_the_last_is_refused(api: str) -> None:
    """Nothing would be pruned, and nobody would be told."""
    with pytest.raises(ValueError, match=r"round 9.* 3 rounds"):
        trained(api, variants=rule(round=9))


def test_examples_that_do_not_fit_are_refused_before_a_round() -> None:
    """Of another shape than the model's."""
    wrong = [(torch.zeros(2, 3, 6, 6), torch.zeros(2, dtype=torch.int64))]
    data = ServerData(wrong, noniid=(0.1, 0.1))
    strategy = strategy_of((), variants=rule(data=data))
    with pytest.raises(InvalidTask, match="server's examples do not fit"):
        run([message_app(0), message_app(1)], strategy)
    assert strategy.round_plans == []
