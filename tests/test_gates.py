"""Gates: the same bits on every route and in both APIs, real zeros, phases by round."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import ndarrays_to_parameters
from torch import Tensor, nn

from flwr_smartsplit import (
    Checkpoints,
    GatePhase,
    Packed,
    PruneSchedule,
    Route,
    Task,
    cut_at_gate,
    gated,
    predicted_peak_bytes,
)
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.protocol import Forward
from flwr_smartsplit.edge.weighted_mean import add_states, merge
from flwr_smartsplit.errors import InvalidRoute, InvalidTask, SmartSplitError
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.gates import ChannelGate, GateEnd
from flwr_smartsplit.loss_terms import loss_divided_by
from flwr_smartsplit.plan.coding import route_profile
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from flwr_smartsplit.verify.reference import train_stock
from tests.flower.apps import Run, apps, message_app, run, smart_split
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.models import resnet18, small_cnn, task_of
from tests.route_peaks import peaks_of
from tests.tasks import (
    BATCH_SIZE,
    SEED,
    TASK,
    State,
    differences,
    loader,
    tiny_cnn,
)

EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
GATED = replace(TASK, model_fn=gated(tiny_cnn, "6", encoder=False, strength=3.0))
ENCODED = replace(TASK, model_fn=gated(tiny_cnn, "2", channels=5, strength=3.0))
SCHEDULE = PruneSchedule.deprune(budget=2, rounds=3, full_rounds=1)
LASTING = PruneSchedule(
    [GatePhase(rounds=2, budget=2), GatePhase(rounds=1, budget=None)]
)
"""It draws nothing anew, so that what is trained of a gate is in the last state."""
PARTS = ("6.channel_gate", "6.channel_gate_end")


def first_state(task: Task) -> State:
    """Draw the state that a run starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return state_of(task.model_fn())


def routes(task: Task) -> dict[str, Route]:
    """Give each client another kind of route; c1 is cut at the gate."""
    chain = build_chain(task)
    gate = 1 + [name.endswith("channel_gate") for name in chain.unit_names].index(True)
    return {
        "c0": Route.whole(),
        "c1": Route.split(gate, edge="far"),
        "c2": Route.u_shape(2, gate + 1, edge="near"),
        "c3": Route.hops((gate - 1, gate), edges=("near", "far")),
    }


def unsplit(task: Task, schedule: PruneSchedule, *, num_rounds: int = 3) -> State:
    """Train stock modules one after the other in a plain loop, and take the mean."""
    chain = build_chain(task)
    state = schedule.first_state(first_state(task))
    for number in range(1, num_rounds + 1):
        trained = []
        for index in range(4):
            model = task.model_fn()
            model.load_state_dict({n: torch.tensor(a) for n, a in state.items()})
            streams = UnitStreams(SEED, number, f"c{index}")
            batches = [(x, y) for x, y in streams.batches(loader(index), 0)]
            how: Any = {"chain": chain, "streams": streams, "ends": batches[:1]}
            train_stock(model, task, batches, **how)
            size = len(loader(index).dataset)  # type: ignore[arg-type]
            trained.append((state_of(model), size))
        mean = merge(state, add_states(trained))
        state = schedule(number, mean, None)  # type: ignore[arg-type]
    return state


def federated(task: Task, schedule: Any = SCHEDULE, **changes: Any) -> Run:
    """Train four clients on four kinds of route."""
    chosen = routes(task)
    rules = {
        "choose_route": lambda request: chosen[request.device.client_key],
        "between_rounds": schedule,
        "verify": False,
        **changes,
    }
    strategy = smart_split(EDGES, task=task, **rules)
    members = [message_app(index, edges=EDGES, task=task) for index in range(4)]
    arrays = to_array_record(first_state(task))
    return run(members, strategy, num_rounds=3, arrays=arrays)


@pytest.mark.every(4)
@pytest.mark.parametrize(
    ("task", "schedule", "accumulate"),
    [
        (ENCODED, LASTING, 2),
        (ENCODED, SCHEDULE, 1),
        (GATED, SCHEDULE, 1),
        (GATED, LASTING, 2),
    ],
)
def test_a_federated_run_is_the_unsplit_loop(
    task: Task, schedule: PruneSchedule, accumulate: int
) -> None:
    """Whole, cut at the gate, u-shaped and over two edges, in both phases."""
    task = replace(task, accumulate=accumulate)
    made = federated(task, schedule)
    assert made.kinds() == []
    assert differences(made.state, unsplit(task, schedule)) == []


def test_the_same_under_the_legacy_api() -> None:
    """The same bits, and a first state that only a client has is refused."""
    chosen = routes(GATED)
    state = first_state(GATED)
    rules: Any = {
        "task": GATED,
        "choose_route": lambda request: chosen[request.device.client_key],
        "between_rounds": LASTING,
        "initial_parameters": ndarrays_to_parameters(list(state.values())),
    }
    members = [message_app(index, edges=EDGES, task=GATED) for index in range(4)]
    strategy = legacy_smart_split(EDGES, **rules)
    made = run_legacy(members, strategy, num_rounds=3, names=tuple(state))
    assert made.kinds() == []
    truth = unsplit(GATED, LASTING)
    assert differences(made.state, truth) == []
    # Planted: another weight of the barrier.
    weak = gated(tiny_cnn, "6", encoder=False, strength=2.9)
    other = unsplit(replace(GATED, model_fn=weak), LASTING)
    assert "6.channel_gate.logits" in differences(other, truth)
    rules["initial_parameters"] = None
    with pytest.raises(SmartSplitError, match="give the inner strategy initial_"):
        run_legacy(members, legacy_smart_split(EDGES, **rules))


@pytest.mark.slow
def test_a_run_that_is_resumed_has_the_same_phases(tmp_path: Any) -> None:
    """The state has all; a schedule remembers nothing."""
    saved = Checkpoints(tmp_path)
    whole = federated(GATED)
    strategy = smart_split((), task=GATED, between_rounds=SCHEDULE, checkpoints=saved)
    members = [message_app(index, edges=(), task=GATED) for index in range(4)]
    arrays = to_array_record(first_state(GATED))
    run(members, strategy, num_rounds=2, arrays=arrays)
    strategy = smart_split((), task=GATED, between_rounds=SCHEDULE, checkpoints=saved)
    made = run(members, strategy, num_rounds=3, arrays=arrays)
    assert differences(made.state, whole.state) == []


@pytest.mark.parametrize("after", ["6", "2"])
def test_packed_never_takes_more_than_is_predicted_behind_a_gate(after: str) -> None:
    """At every cut, also where whole channels stay on the device."""
    task = replace(TASK, model_fn=partial(closed, after=after, budget=2))
    batches = example_batches(task, batch_size=4)
    with RouteChecker(task, batches, ends=batches[:1]) as checker:
        costs = profile_chain(checker.chain, batch_size=4, task=task)
        for route in map(Route.split, range(1, len(checker.chain))):
            check = checker.check(route, codecs=(Packed(),))
            assert check.differences == (), route
            coded = route_profile(costs, route, (Packed(),))
            measured = check.measured_peak_bytes
            assert predicted_peak_bytes(coded, route) >= measured, route


@pytest.mark.parametrize("budget", [2, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("after", ["6", pytest.param("2", marks=pytest.mark.slow)])
def test_every_cut_is_exact_and_its_peak_predicted(after: str, budget: int) -> None:
    """To the bit and to the byte, with open and with closed channels."""
    model_fn = partial(closed, after=after, budget=budget)
    predicted, measured = peaks_of(replace(TASK, model_fn=model_fn), batch_size=4)
    assert predicted == measured


def closed(after: str, budget: int) -> nn.Module:
    """Build a gated model as it is in a round with a budget."""
    model = gated(tiny_cnn, after, encoder=after == "2")()
    for part in model.modules():
        if isinstance(part, ChannelGate | GateEnd):
            part.budget.fill_(budget)
            part.is_open[budget or len(part.is_open) :] = False
    return model


@pytest.mark.parametrize(
    ("model_fn", "after", "shape"),
    [
        (small_cnn, "block", (3, 12, 12)),
        (small_cnn, "conv2", (3, 12, 12)),
        pytest.param(resnet18, "layer2", (3, 32, 32), marks=pytest.mark.slow),
    ],
)
def test_an_open_gate_changes_no_bit(
    model_fn: Callable[[], nn.Module], after: str, shape: Any
) -> None:
    """With sigmoids of 1 and all channels: outputs and gradients, by the old names."""
    plain, other = model_fn(), gated(model_fn, after, encoder=False)()
    assert differences(state_of(plain), state_of(other))[0].startswith(f"{after}.chan")
    nn.init.constant_(other.get_submodule(f"{after}.channel_gate").logits, 40.0)
    x = torch.randn(4, *shape)
    found = []
    for model in (plain, other):
        torch.manual_seed(2)
        value = model.train()(x)
        value.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if "gate" not in n}
        found.append((value, grads))
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        assert torch.equal(grad, found[1][1][name]), name
    gate = other.get_submodule(f"{after}.channel_gate")
    assert not gate.logits.grad.any()  # All channels pass: gates rest.


# --- the barrier ----------------------------------------------------------------------


def gate_of(logits: Tensor, budget: int, *, strength: float = 0.7) -> ChannelGate:
    """Make a gate in a round with a budget."""
    gate = ChannelGate(len(logits), "x", strength=strength, dtype=logits.dtype)
    gate.logits.data.copy_(logits)
    gate.budget.fill_(budget)
    gate.is_open[budget:] = False
    return gate


def written_out(logits: Tensor, values: Tensor, gate: ChannelGate) -> Tensor:
    """Return the gradient of a loss with the barrier in it, as its authors write it."""
    p = logits.clone().requires_grad_()
    s = torch.sigmoid(p)
    z = 5.12 / len(p) * ((s**2).sum() - gate.budget)
    loss = (values * s * gate.is_open).square().mean()
    (loss + gate.strength * (torch.exp(z) + torch.exp(-z))).backward()
    assert p.grad is not None
    return p.grad


@pytest.mark.parametrize("num_parts", [1, 3])
def test_the_barrier_is_the_written_out_loss(num_parts: int) -> None:
    """In float64; and once in a step of several micro-batches, not once in each."""
    logits, values = torch.randn(6).double() * 2, torch.randn(6, 6).double()
    gate = gate_of(logits, 2).train()
    for part in values.chunk(num_parts):
        with loss_divided_by(num_parts):
            passed = gate(part)
        (passed.square().mean() / num_parts).backward()
    truth = written_out(logits, values, gate)
    torch.testing.assert_close(gate.logits.grad, truth, rtol=1e-12, atol=1e-12)
    # Planted: at both ends, or in each micro-batch.
    twice = copy.deepcopy(gate)
    twice.logits.grad = None
    for _ in range(2):
        twice(values).square().mean().div(2).backward()
    assert not torch.allclose(twice.logits.grad, truth)


def test_a_barrier_far_away_is_bounded_and_pulls() -> None:
    """Evaluation has none, and a gate whose parameters are frozen."""
    gate = gate_of(torch.full((4000,), 9.0), 1, strength=1000.0).train()
    gate(torch.ones(1, 4000)).sum().backward()
    grad = gate.logits.grad
    assert grad is not None and grad.isfinite().all() and (grad > 0).all()
    for still in (
        copy.deepcopy(gate).eval(),
        copy.deepcopy(gate).requires_grad_(False),
    ):
        still.logits.grad = None
        x = torch.ones(1, 4000, requires_grad=True)
        still(x).sum().backward()
        assert x.grad is not None and int((x.grad != 0).sum()) == 1
        assert still.logits.grad is None or (still.logits.grad >= 0).all()


# --- what crosses ---------------------------------------------------------------------


def num_bytes(rows: int, budget: int, pixels: int, channels: int) -> int:
    """Count what the open channels take as float16, with a bit for each channel."""
    return rows * budget * pixels * 2 + -(-channels // 8)


def test_closed_channels_are_real_zeros_on_both_ways() -> None:
    """Not -0, and the rest is float16: the bytes are those of the formula."""
    model = closed("6", 2)
    front, back = nn.Sequential(*model[:6], model[6]), model[7:]
    gate, end = model[6].channel_gate, model[6].channel_gate_end
    crossed: list[Tensor] = []
    x = torch.randn(4, 1, 6, 6)
    del front
    hidden = model[:6](x).relu()
    sent = gate(hidden)
    leaf = sent.detach().requires_grad_()
    back(end(leaf)).square().mean().mul(1e-6).backward()
    assert leaf.grad is not None
    crossed = [sent.detach(), leaf.grad]
    for each in crossed:
        bits = each.view(torch.int32)
        is_sent = (bits != 0).any(dim=0).flatten(1).any(dim=1)
        assert is_sent.tolist() == [True] * 2 + [False] * 4
        pixels = each[0, 0].numel()
        found = int(is_sent.sum()) * len(each) * pixels * 2 + 1
        assert found == num_bytes(len(each), 2, pixels, 6)
        scaled = torch.ldexp(each, 14 - torch.frexp(rows_most(each)).exponent)
        assert torch.equal(scaled.half().float(), scaled)
    assert torch.equal(crossed[0].half().float(), crossed[0])
    assert crossed[1].any() and crossed[1].abs().max() < 6e-8  # float16 has no such.
    # Planted: a product leaves -0, and a gradient that is not closed comes back.
    product = (hidden - 1) * gate.is_open.view(-1, 1, 1)
    assert (product.view(torch.int32)[:, 2:] != 0).any()
    leaf.grad = None
    back(leaf).square().mean().backward()
    assert leaf.grad[:, 2:].any()


def rows_most(values: Tensor) -> Tensor:
    """Return the largest value of each row."""
    return values.abs().amax(dim=(1, 2, 3), keepdim=True)


def test_what_a_session_sends_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a client that is cut at the gate, in the rounds with a budget only."""
    sent: list[int] = []
    seen = Forward.__init__

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        seen(self, *args, **kwargs)
        for wire in self.boundary:
            values = wire.unpack()
            sent.append(int(values.flatten(2).any(dim=2).any(dim=0).sum()))

    strategy = smart_split(
        task=GATED, choose_route=cut_at_gate, between_rounds=SCHEDULE, verify=False
    )
    monkeypatch.setattr(Forward, "__init__", note)
    arrays = to_array_record(first_state(GATED))
    made = run(apps([None] * 2, task=GATED), strategy, num_rounds=3, arrays=arrays)
    assert made.kinds() == []
    steps = len(sent) // 3
    assert max(sent[: 2 * steps]) <= 2 < min(sent[2 * steps :])


# --- phases ---------------------------------------------------------------------------


def state_with(logits: Any) -> State:
    """Make a state with one gate."""
    state = first_state(GATED)
    state["6.channel_gate.logits"] = np.array(logits, np.float32)
    return state


def opened(state: Any) -> list[int]:
    """List the open channels; both ends must agree."""
    one, other = (state[f"{part}.is_open"] for part in PARTS)
    budgets = [state[f"{part}.budget"] for part in PARTS]
    assert np.array_equal(one, other) and budgets[0] == budgets[1]
    assert (one.dtype, budgets[0].dtype, budgets[0].shape) == (bool, np.int64, ())
    return [int(index) for index in np.flatnonzero(one)]


def test_the_largest_gates_of_the_merged_state_are_open() -> None:
    """Of equal ones the first; and they are ranked anew after each round."""
    schedule = PruneSchedule([GatePhase(rounds=9, budget=3)])
    state = schedule.first_state(state_with([1, 5, 2, 5, 5, 5]))
    assert opened(state) == [1, 3, 4]
    assert int(state["6.channel_gate.budget"]) == 3
    merged = {**state, "6.channel_gate.logits": np.arange(6, dtype=np.float32)}
    assert opened(schedule(1, merged, None)) == [3, 4, 5]  # type: ignore[arg-type]


def test_clients_whose_gates_differ_are_one_after_the_merge() -> None:
    """The mask is that of the mean, not of a client, nor of the round before."""
    seen: list[State] = []

    def note(number: int, state: Any, summary: Any) -> Any:
        seen.append(state)
        return SCHEDULE(number, state, summary)

    note.first_state = SCHEDULE.first_state  # type: ignore[attr-defined]
    assert federated(GATED, note).kinds() == []
    assert opened(SCHEDULE(1, seen[0], None)) == opened(seen[1])  # type: ignore[arg-type]
    logits = seen[0]["6.channel_gate.logits"]
    assert not np.array_equal(logits, first_state(GATED)["6.channel_gate.logits"])
    assert opened(seen[1]) == sorted(np.argsort(-logits, kind="stable")[:2])


def test_deprune_opens_and_prune_closes() -> None:
    """Phases, what each draws anew, and the same again with the same seed."""
    logits = [-4.0, 0.5, 0.95, 14.0, 8.0, 0.1]
    deprune = PruneSchedule.deprune(budget=2, rounds=5, full_rounds=2)
    state = state_with(logits)
    assert opened(deprune.first_state(state)) == [3, 4]
    assert opened(deprune(2, state, None)) == [3, 4]  # type: ignore[arg-type]
    full = deprune(3, state, None)  # type: ignore[arg-type]
    assert opened(full) == [*range(6)] and not full["6.channel_gate.budget"]
    found = full["6.channel_gate.logits"]
    assert found[[2, 3, 4]].tolist() == [15.0] * 3
    assert all(0 <= each <= 3 for each in found[[0, 1, 5]])
    again = deprune(3, state, None)  # type: ignore[arg-type]
    assert differences(full, again) == []
    other = replace(deprune, seed=1)(3, state, None)  # type: ignore[arg-type]
    assert differences(full, other) == ["6.channel_gate.logits"]
    later = deprune(9, full, None)  # type: ignore[arg-type]
    assert differences(later, full) == []

    prune = PruneSchedule.prune(budgets=(4, 2), rounds=(1, 1))
    first = prune.first_state(state)
    found = first["6.channel_gate.logits"]
    assert found[[0, 1, 5]].tolist() == [-15.0] * 3
    assert all(0 <= each <= 3 for each in found[[2, 3, 4]])
    assert len(opened(first)) == 4  # Never fewer, though three are closed for good.
    second = prune(1, first, None)  # type: ignore[arg-type]
    assert len(opened(second)) == 2
    assert opened(prune(7, second, None)) == opened(second)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PruneSchedule([]), "at least one phase"),
        (lambda: GatePhase(rounds=0, budget=2), "at least 1 round"),
        (lambda: GatePhase(rounds=1, budget=0), "opens at least 1 channel"),
        (lambda: GatePhase(rounds=1, budget=1, reset="x"), "reopen"),  # type: ignore
        (lambda: PruneSchedule.prune(budgets=(1,), rounds=(1, 2)), "one per phase"),
        (
            lambda: PruneSchedule.deprune(budget=7, rounds=3).first_state(
                state_with([0] * 6)
            ),
            "has 6 channels",
        ),
        (lambda: SCHEDULE.first_state({}), "has no gate"),
        (lambda: gated(tiny_cnn, "6", channels=0), "at least 1"),
        (lambda: gated(tiny_cnn, "6", strength=-1.0), "finite number"),
        (gated(tiny_cnn, "nothing"), "does not have"),
        (gated(gated(tiny_cnn, "6"), "6"), "already"),
        (gated(nn.Identity, ""), "does not have"),
        (gated(lambda: nn.Sequential(nn.ReLU()), "0"), "no layer up to"),
        (
            lambda: gated(tiny_cnn, "7", encoder=False)()(torch.zeros(2, 1, 6, 6)),
            "dimension 1 for images",
        ),
        (
            lambda: gated(tiny_cnn, "8")()(torch.zeros(2, 1, 6, 6)),
            "encoder is for images",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], match: str) -> None:
    """With what it is, against what, and what to do."""
    with pytest.raises((ValueError, InvalidTask), match=match):
        make()


def test_a_run_without_a_gate_is_refused_before_it_starts() -> None:
    """By the schedule, and by the choice of the cut."""
    with pytest.raises(InvalidTask, match="has no gate for the PruneSchedule"):
        run(apps([None] * 2), smart_split(between_rounds=SCHEDULE))
    with pytest.raises(InvalidRoute, match="finds no gate that a cut follows"):
        run(apps([None] * 2), smart_split(choose_route=cut_at_gate))


def test_who_cannot_take_the_cut_at_the_gate_takes_another() -> None:
    """The same model, and all of a boundary; whole if there is no edge."""
    profile = profile_of(GATED, batch_size=BATCH_SIZE)
    cuts = [unit.name.endswith("channel_gate") for unit in profile.units]
    gate = Route.split(cuts.index(True) + 1)
    small = predicted_peak_bytes(profile, Route.split(1))
    assert small < predicted_peak_bytes(profile, gate)
    strategy = smart_split(task=GATED, choose_route=cut_at_gate, recompute=False)
    arrays = to_array_record(first_state(GATED))
    run(apps([None, small], task=GATED), strategy, arrays=arrays)
    chosen = [a.option.route for a in strategy.round_plans[0].assignments]
    assert chosen[0] == gate and chosen[1].cuts < gate.cuts
    alone = smart_split((), task=GATED, choose_route=cut_at_gate)
    run(apps([None] * 2, task=GATED), alone, arrays=arrays)
    assert alone.round_plans[0].assignments[0].option.route == Route.whole()


def test_features_of_tokens_are_gated_too() -> None:
    """Channels are the last dimension of what is no image."""
    model_fn = gated(mlp, "1", encoder=False)
    task = task_of(model_fn, shape=(5,))
    assert "1.channel_gate" in build_chain(task).unit_names
    model = model_fn()
    model[1].channel_gate.is_open[1:] = False
    hidden = model[1].channel_gate(torch.randn(2, 3, 4))
    assert hidden[..., 0].all() and not hidden[..., 1:].any()


def mlp() -> nn.Module:
    """Build a model for tokens as well as for single examples."""
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 10))
