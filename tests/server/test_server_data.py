"""ServerData: weights, undoing, random streams, holding out; what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import HybridFL, ServerData
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.server import own_data
from flwr_smartsplit.server.aggregation import RoundStart, RoundSummary
from flwr_smartsplit.server.own_data import between
from flwr_smartsplit.server.server_data import ServerTraining
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.types import StepReport
from flwr_smartsplit.verify.reference import train_stock
from tests.tasks import SHAPE, TASK, State, differences, initial_state, tiny_chain

COUNTS = {"a": (4, 0, 0), "b": (0, 3, 0), "c": (1, 1, 6)}
LABELS = (2, 6, 2)
"""Of the server's ten examples."""


SLOW = partial(torch.optim.SGD, lr=1e-4)


def server_loader(labels: Any = None, **how: Any) -> DataLoader[Any]:
    """Make the server's loader: by default, ten examples."""
    if labels is None:
        labels = np.repeat(range(3), LABELS)
    targets = torch.as_tensor(labels)
    chance = torch.Generator().manual_seed(5)
    inputs = torch.randn(len(targets), *SHAPE, generator=chance)
    data = TensorDataset(inputs, targets)
    return DataLoader(data, **{"batch_size": 4, "shuffle": True, **how})


def start(number: int = 1, **changes: Any) -> RoundStart:
    """Begin a round of three clients."""
    facts: dict[str, Any] = {
        "round_number": number,
        "task": TASK,
        "seed": 3,
        "state": initial_state(),
        "parameter_names": frozenset(),
        "label_counts": COUNTS,
    }
    return RoundStart(**{**facts, **changes})


def summary(number: int = 1, merged: str = "ab", **changes: Any) -> RoundSummary:
    """End a round in which some of them were merged, with 4 and 3 examples."""
    sizes = {"a": 4, "b": 3, "c": 8}
    reports = {key: StepReport(num_examples=sizes[key], metrics={}) for key in merged}
    facts: dict[str, Any] = {"reports": reports, "label_counts": COUNTS}
    return RoundSummary(round_number=number, **{**facts, **changes})


def prepared(labels: Any = None, **changes: Any) -> ServerData:
    """Make a step that knows its task."""
    made = ServerData(server_loader(labels), epochs=1, **changes)
    made.prepare(start())
    return made


def after(made: ServerData, number: int = 1, **changes: Any) -> State:
    """Take its step from the first state."""
    told = initial_state(), initial_state(), summary(number, **changes)
    return dict(made.step(*told))


# --- the weight -----------------------------------------------------------------------


def test_it_counts_its_examples_and_their_labels() -> None:
    """In one pass."""
    made = ServerData(server_loader())
    assert (made.num_examples, made.label_counts) == (10, LABELS)


def entropy(*shares: float) -> float:
    """Compute the entropy of a distribution, in bits."""
    return -sum(p * np.log2(p) for p in shares if p)


def test_the_weight_against_values_by_hand() -> None:
    """JS by entropies: of all (5, 4, 6), the round (4, 3, 0), the server (2, 6, 2)."""

    def divergence(one: Any, other: Any) -> float:
        p, q = (np.array(counts) / sum(counts) for counts in (one, other))
        return entropy(*(p + q) / 2) - (entropy(*p) + entropy(*q)) / 2

    made = prepared(decay=0.9)
    after(made, 3)
    (noted,) = made.trainings
    clients, server = divergence((4, 3, 0), (5, 4, 6)), divergence(LABELS, (5, 4, 6))
    share = 10 * clients / (10 * clients + 7 * server)
    assert noted.weight == pytest.approx((1 - noted.accuracy) * share * 0.9**2)
    swapped = 10 * server / (10 * server + 7 * clients)
    assert share != pytest.approx(swapped, abs=0.1)  # Planted
    assert noted.round_number == 3 and not noted.is_undone


def test_the_accuracy_is_that_of_the_merged_model() -> None:
    """Found here by the stock module; the loss, too."""
    made = prepared()
    after(made)
    model = stock(initial_state())
    inputs, targets = server_loader().dataset.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        outputs = model.eval()(inputs)
    right = (outputs.argmax(dim=1) == targets).float().mean()
    (noted,) = made.trainings
    assert noted.accuracy == pytest.approx(float(right))
    assert noted.loss == pytest.approx(float(TASK.loss_fn(outputs, targets)), rel=1e-5)


def test_the_state_goes_so_far_towards_the_servers() -> None:
    """Twice the strength goes twice as far; numbers of batches stay as merged."""
    first = initial_state()
    one, two = (after(prepared(strength=s)) for s in (0.4, 0.8))
    far = two["8.weight"] - first["8.weight"]
    assert np.abs(far).max() > 1e-3
    near = one["8.weight"] - first["8.weight"]
    np.testing.assert_allclose(far, 2 * near, rtol=1e-3, atol=1e-7)
    assert one["1.num_batches_tracked"] == first["1.num_batches_tracked"]
    assert differences(two, first)[:1] == ["0.weight"]


def test_a_weight_above_one_counts_as_one() -> None:
    """The state is then the server's own, and its variances are above 0."""
    made = prepared(strength=50.0, undo_at=None)
    found = after(made)
    assert made.trainings[0].weight == 1
    assert min(found["1.running_var"]) > 0


def test_without_strength_no_bit_changes_and_nothing_is_trained() -> None:
    """Planted: the server's training leaves its BatchNorm statistics behind."""
    made = prepared(strength=0.0)
    first = initial_state()
    assert differences(after(made), first) == []
    assert made.trainings == ()
    trained = prepared()._run.data.trained(initial_state(), 1, {})
    planted = {**first, "1.running_mean": trained["1.running_mean"]}
    assert differences(planted, first) == ["1.running_mean"]


def test_at_most_a_thousandth_changes_no_bit() -> None:
    """A round as all clients are; one of a weight just above is trained."""
    assert differences(after(made := prepared(), merged="abc"), initial_state()) == []
    assert made.trainings == ()
    near = prepared(strength=0.001)
    assert differences(after(near), initial_state()) == []
    assert 0 < near.trainings[0].weight <= 0.001
    assert differences(after(prepared(strength=0.01)), initial_state()) != []


def stock(state: State) -> Any:
    """Build the stock module with a state."""
    model = TASK.model_fn()
    model.load_state_dict({n: torch.tensor(a) for n, a in state.items()})
    return model


def test_the_server_trains_as_the_stock_module_in_a_plain_loop_does() -> None:
    """Bit for bit, in two passes; planted: random streams of another name."""
    made = ServerData(server_loader(), epochs=2)
    made.prepare(start())
    found = dict(made._run.data.trained(initial_state(), 2, {}))
    for name, is_same in (("<server>", True), ("c0", False)):
        streams, model = UnitStreams(3, 2, name), stock(initial_state())
        batches = [b for e in range(2) for b in streams.batches(server_loader(), e)]
        how = {"chain": tiny_chain(), "streams": streams, "ends": batches[:1]}
        train_stock(model, TASK, batches, **how)
        trained = {n: v.numpy() for n, v in model.state_dict().items()}
        assert (differences(found, trained) == []) is is_same


# --- undoing --------------------------------------------------------------------------


def test_a_loss_that_grows_threefold_is_undone() -> None:
    """The bits are those that were merged; without the rule they are not."""
    wild = {"optimizer_fn": partial(torch.optim.SGD, lr=30.0), "strength": 50.0}
    made = prepared(**wild)
    assert differences(after(made), initial_state()) == []
    (noted,) = made.trainings
    assert noted.is_undone and noted.loss_after >= 3 * noted.loss
    kept = prepared(**wild, undo_at=None)
    assert differences(after(kept), initial_state()) != []
    assert not kept.trainings[0].is_undone


@pytest.mark.parametrize(
    ("before", "later", "undo_at", "is_worse"),
    [
        (1.0, 2.99, 3.0, False),
        (1.0, 3.0, 3.0, True),
        (1.0, float("nan"), None, True),
        (1.0, float("inf"), 3.0, True),
        (-1.0, 5.0, 3.0, False),
        (1.0, 9.0, None, False),
    ],
)
def test_what_is_undone(
    before: float, later: float, undo_at: float | None, is_worse: bool
) -> None:
    """At equality, too; always where the loss is not finite."""
    made = ServerData(server_loader(), undo_at=undo_at)
    assert made._is_worse(before, later) is is_worse


# --- chance, threads and runs ---------------------------------------------------------


def test_a_round_has_the_same_bits_wherever_it_is_done() -> None:
    """With any threads and generators around it, which it leaves as they are."""
    wanted = after(prepared())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    try:
        assert differences(after(prepared()), wanted) == []
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)


def test_rounds_and_seeds_differ() -> None:
    """Planted: one stream for all of them would not."""
    made = prepared()
    first, second = (made._run.data.trained(initial_state(), n, {}) for n in (1, 2))
    assert differences(first, second) != []
    made.prepare(start(seed=4))
    assert differences(made._run.data.trained(initial_state(), 1, {}), first) != []


def test_a_new_run_begins_anew_and_a_checkpoint_has_what_was_done() -> None:
    """As plain data."""
    made, other = prepared(), prepared()
    after(made)
    held = made.state_dict()
    assert [type(each) for each in held["trainings"]] == [dict]
    other.load_state_dict(held)
    other.prepare(start(2))
    assert other.trainings == made.trainings != ()
    assert isinstance(other.trainings[0], ServerTraining)
    made.prepare(start())
    assert made.trainings == ()


# --- what is held out -----------------------------------------------------------------


def test_what_is_held_out_is_measured_and_never_trained() -> None:
    """Three of ten examples, the same ones in each process."""
    made = ServerData(server_loader(), holdout=0.3)
    assert made.num_examples == 7 == sum(made.label_counts or ())
    rest, held = own_data.divided(server_loader(), 0.3)
    again = own_data.divided(server_loader(), 0.3)
    seen = [[x for x, _ in part] for part in (rest, held, again[1])]
    rows = [{tuple(row.flatten().tolist()) for x in part for row in x} for part in seen]
    assert len(rows[0]) == 7 and rows[1] == rows[2] and len(rows[1]) == 3
    assert not rows[0] & rows[1]


def test_the_accuracy_is_then_that_of_what_was_held_out() -> None:
    """A model that knows its examples by heart is not right there."""
    heart = {"epochs": 60, "strength": 50.0, "undo_at": None}
    labels = np.random.default_rng(0).integers(0, 3, 40)
    found = {}
    for holdout in (0.0, 0.3):
        made = ServerData(server_loader(labels), holdout=holdout, **heart)
        made.prepare(start())
        state = after(made)
        made.step(state, state, summary(2))
        found[holdout] = made.trainings[-1].accuracy
    assert found[0.0] > 0.9 > found[0.3] + 0.2


# --- what is refused ------------------------------------------------------------------


class Endless:
    """A loader that is no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(2, *SHAPE), torch.tensor([0, 1])


def test_clients_that_share_no_labels_are_named_with_both_ways_out() -> None:
    """At the start; with ``noniid``, nobody need share any."""
    counts = {"a": (4, 0, 0), "b": None}
    with pytest.raises(InvalidTask, match=r"1 of 2 .*\(b\).*label_counts.*noniid=\("):
        ServerData(server_loader()).prepare(start(label_counts=counts))
    made = ServerData(server_loader(), noniid=(0.4, 0.1), epochs=1)
    made.prepare(start(label_counts={"a": None}))
    after(made, label_counts={})
    (noted,) = made.trainings
    share = 10 * 0.4 / (10 * 0.4 + 7 * 0.1)
    assert noted.weight == pytest.approx((1 - noted.accuracy) * share)


def test_a_client_that_comes_later_without_labels_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And the labels of the others count; without any, nothing is done."""
    made = prepared()
    late = {**COUNTS, "b": None}
    for _ in range(2):
        after(made, label_counts=late)
    assert caplog.text.count("do not share their label counts (b)") == 1
    assert len(made.trainings) == 2
    assert (
        differences(after(made, merged="b", label_counts=late), initial_state()) == []
    )
    assert len(made.trainings) == 2


@pytest.mark.parametrize(
    ("task", "labels", "why"),
    [
        (replace(TASK, is_local=lambda name: name[0] == "1"), [0, 1], "is_local keeps"),
        (TASK, [0, 1, 7], "do not fit the task: IndexError: Target 7"),
        (
            replace(TASK, metrics_fn=lambda o, t: {"accuracy": 70.0}),
            [0, 1],
            "accuracy=70",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    task: Any, labels: list[int], why: str
) -> None:
    """With the reason."""
    with pytest.raises(InvalidTask, match=why):
        ServerData(server_loader(labels)).prepare(start(task=task))


def test_another_input_shape_is_refused() -> None:
    """Of the server's examples."""
    data = TensorDataset(torch.zeros(3, 2, 6, 6), torch.tensor([0, 1, 2]))
    with pytest.raises(InvalidTask, match="do not fit the task: RuntimeError"):
        ServerData(DataLoader(data, batch_size=3)).prepare(start())


@pytest.mark.parametrize(
    ("loader", "how", "why"),
    [
        ([], {}, "yields nothing"),
        (server_loader([0.5, 1.5]), {}, "not class numbers"),
        (server_loader([-100, 1]), {}, "not class numbers"),
        (Endless(), {"holdout": 0.1}, "a Endless of another kind"),
        (server_loader([1]), {"holdout": 0.5}, "leaves none to train"),
        (Endless(), {"holdout": 1.0}, "holdout is 1.0"),
        (Endless(), {"strength": -1}, "strength=-1"),
        (Endless(), {"strength": float("nan")}, "strength=nan"),
        (Endless(), {"decay": 0.0}, "decay=0.0"),
        (Endless(), {"undo_at": 1.0}, "undo_at=1.0"),
        (Endless(), {"epochs": 0}, "epochs is 0"),
        (Endless(), {"noniid": (0.1, 1.5)}, "noniid is"),
        (Endless(), {"noniid": 0.3}, "noniid is"),
        (server_loader(generator=torch.Generator()), {}, "a generator of its own"),
    ],
)
def test_senseless_arguments_are_refused(loader: Any, how: Any, why: str) -> None:
    """Where they are given."""
    with pytest.raises(ValueError, match=why):
        ServerData(loader, **how)


@pytest.mark.parametrize("kind", [ServerData, HybridFL])
def test_a_run_that_goes_on_has_its_own_task_and_seed(kind: Any) -> None:
    """Whatever run the object was in before, in this process."""
    used, fresh = kind(server_loader(), epochs=1), kind(server_loader(), epochs=1)
    used.prepare(start(seed=99, task=replace(TASK, optimizer_fn=SLOW)))
    for each in (used, fresh):
        each.prepare(start(4))
    assert differences(after(used, 4), after(fresh, 4)) == []


def test_a_step_that_nobody_prepared_is_refused() -> None:
    """It has no task."""
    with pytest.raises(SmartSplitError, match=r"server_steps=\.\.\."):
        after(ServerData(server_loader()))


# --- the server as a client -----------------------------------------------------------


def test_hybrid_means_with_what_the_server_trains_from_the_start() -> None:
    """By examples: the server has 10, the clients have 7."""
    made = HybridFL(server_loader())
    made.prepare(start())
    before = initial_state()
    mean = {n: np.asarray(a + a) for n, a in before.items()}
    found = made.step(before, mean, summary())
    own = made._data.trained(before, 1, {})
    name = "8.weight"
    by_hand = (7 * mean[name].astype(float) + 10 * own[name].astype(float)) / 17
    np.testing.assert_allclose(found[name], by_hand, rtol=1e-6)
    assert made.state_dict() == {}


def test_between_is_rounded_once_and_leaves_whole_numbers() -> None:
    """A share of 0 changes no bit, a share of 1 is the other."""
    one = {"a": np.array([1.0, -0.0], np.float32), "n": np.array(3)}
    other = {"a": np.array([2.0, 1e-30], np.float32), "n": np.array(9)}
    for same in ({}, one):
        assert differences(between(one, same, 0.5), one) == []
    assert between(one, other, 0.5)["a"].tolist() == pytest.approx([1.5, 5e-31])
    assert between(one, other, 0.5)["n"] == 3
