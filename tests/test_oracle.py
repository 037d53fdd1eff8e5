"""The oracle can fail: every planted error is seen, and named."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.models import (
    OPTIMIZERS,
    SMALL_CNN_RANDOM,
    batches_of,
    recording,
    small_cnn,
)
from tests.oracle import (
    Chance,
    Values,
    compare,
    evaluate_whole,
    fingerprint,
    fingerprints,
    train_whole,
)

CHANCE = Chance(seed=0, round_number=1, client_key="a", units=SMALL_CNN_RANDOM)


def train(chance: Chance = CHANCE) -> Values:
    """Train the small network for two steps; return what holds after the second."""
    *_, last = train_whole(
        small_cnn(),
        batches_of(2, 4),
        loss_fn=functional.cross_entropy,
        optimizer_fn=OPTIMIZERS["momentum"],
        chance=chance,
    )
    return last


def planted(name: str) -> tuple[Values, Values, str]:
    """Return the truth, the truth with one error, and the name it is about."""
    truth = train()
    wrong = {key: torch.as_tensor(value).clone() for key, value in truth.items()}
    if name == "a gradient bent by 1e-4 in one element":
        where = "gradient conv2.weight"
        wrong[where].view(-1)[5] *= 1 + 1e-4
    elif name == "a buffer off by one":
        where = "state norm1.num_batches_tracked"
        wrong[where] += 1
    elif name == "a missing name":
        where = "gradient scale"
        del wrong[where]
    elif name == "an unexpected name":
        where = "state extra"
        wrong[where] = torch.zeros(1)
    elif name == "another dtype":
        where = "state norm2.running_var"
        wrong[where] = wrong[where].double()
    elif name == "another shape":
        where = "state scale"
        wrong[where] = wrong[where].flatten()
    else:
        where = "loss"
        wrong[where] += 1e-6
    return truth | {"loss": torch.tensor(truth["loss"])}, wrong, where


@pytest.mark.parametrize(
    "name",
    [
        "a gradient bent by 1e-4 in one element",
        "a buffer off by one",
        "a missing name",
        "an unexpected name",
        "another dtype",
        "another shape",
        "a loss off by 1e-6",
    ],
)
@pytest.mark.parametrize("see", [dict, fingerprints], ids=["values", "fingerprints"])
def test_a_planted_error_is_seen_once_and_named(name, see):
    """One error is one difference, in values as in their fingerprints."""
    truth, wrong, where = planted(name)
    (difference,) = compare(see(truth), see(wrong))
    assert difference.startswith(f"{where}: ")


@pytest.mark.parametrize("see", [dict, fingerprints], ids=["values", "fingerprints"])
def test_a_swapped_pair_is_seen_twice(see):
    """Two values under each other's name are two differences."""
    truth = train()
    a, b = "state norm1.weight", "state norm1.bias"
    found = compare(see(truth), see(truth | {a: truth[b], b: truth[a]}))
    assert [difference.split(":")[0] for difference in found] == [b, a]


@pytest.mark.parametrize(
    "other",
    [
        replace(CHANCE, seed=1),
        replace(CHANCE, round_number=2),
        replace(CHANCE, client_key="b"),
        replace(CHANCE, units=SMALL_CNN_RANDOM | {"drop2": 7}),
        replace(CHANCE, units={"drop1": 3, "block.drop": 2, "drop2": 8}),
    ],
    ids=["seed", "round", "client", "unit", "swapped units"],
)
def test_a_wrong_random_stream_is_seen(other):
    """Whatever the stream is derived from changes the loss and every gradient."""
    found = [difference.split(":")[0] for difference in compare(train(), train(other))]
    gradients = {f"gradient {name}" for name, _ in small_cnn().named_parameters()}
    assert {"loss", *gradients - {"gradient block.conv.bias"}} <= set(found)


def test_the_truth_is_the_same_every_time():
    """Without a planted error there is no difference, whatever the generator did."""
    first = train()
    torch.manual_seed(99)
    assert compare(first, train()) == []


def test_each_step_has_its_own_stream():
    """Seeding the second step like the first one changes the second step."""
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    same = [(torch.ones(1, 4), torch.zeros(1, dtype=torch.int64))] * 2
    first, second = train_whole(
        model,
        same,
        loss_fn=functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.0),
        chance=replace(CHANCE, units={"1": 1}),
    )
    assert first["loss"] != second["loss"]


def test_a_nan_is_never_equal():
    """A broken number is a difference, even to itself."""
    broken = {"loss": torch.tensor(float("nan"))}
    assert len(compare(broken, broken)) == 1


def test_strides_are_not_compared_but_signs_of_zero_are_in_fingerprints():
    """A fingerprint stands for shape, dtype and the bits of the values."""
    rows = torch.arange(6.0).reshape(2, 3)
    columns = rows.t().contiguous().t()
    assert columns.stride() != rows.stride()
    assert fingerprint(rows) == fingerprint(columns)
    assert compare({"x": rows}, {"x": columns}) == []
    assert fingerprint(torch.zeros(2)) != fingerprint(-torch.zeros(2))


def test_evaluation_draws_nothing_and_trains_nothing():
    """The stock model's evaluation mode gives the same losses twice."""
    model, batches = small_cnn(), batches_of(2, 4)
    evaluate = partial(evaluate_whole, model, loss_fn=functional.cross_entropy)
    assert evaluate(batches) == evaluate(batches)
    assert evaluate(batches) != evaluate(batches[::-1])
    assert len(set(evaluate(batches))) == 2


def test_a_bent_gradient_is_recorded_as_another_one(tmp_path):
    """The recording optimizer writes what it was given, not what it should have got."""
    weights = nn.Parameter(torch.ones(3))
    optimizer = recording([weights], optimizer_fn=OPTIMIZERS["sgd"], folder=tmp_path)
    lines = []
    for bend in (0.0, 0.0, 1e-4):
        weights.grad = torch.ones(3)
        weights.grad[1] += bend
        optimizer.step()
    lines = (tmp_path / "0.jsonl").read_text().splitlines()
    assert lines[0] == lines[1] == f'["{fingerprint(torch.ones(3))}"]'
    assert lines[2] != lines[0]
