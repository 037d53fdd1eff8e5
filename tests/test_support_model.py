"""The model: what is supported and what is refused, as docs/support.md says."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer

from flwr_smartsplit import Route
from flwr_smartsplit.errors import NotSplittable, SmartSplitError
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.split.huggingface import decoder_units
from tests.adapters import PEFT, with_lora
from tests.architectures import hugging_face_model
from tests.flower.apps import initial_arrays, message_app, run, smart_split
from tests.support import EDGES, ROUTES, check_every_kind, train_mixed, train_whole
from tests.tasks import NUM_CLASSES, TASK, differences, tiny_cnn


def altered(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """Build the small network and change it."""

    def model_fn() -> nn.Module:
        model = tiny_cnn()
        change(model)
        return model

    return model_fn


def check_model(change: Callable[[Any], Any], **changes: Any) -> None:
    """Compare the changed network on all four kinds of route with the stock model."""
    check_every_kind(model_fn=altered(change), **changes)


def refuse_model(change: Callable[[Any], Any], match: str) -> None:
    """See that the strategy cannot be made, with no edge either."""
    for edges in ((), EDGES):
        with pytest.raises(SmartSplitError, match=match):
            smart_split(edges, task=replace(TASK, model_fn=altered(change)))


def test_everyday_model_functions() -> None:
    """Values may be moved, assigned and looked at; layers may be parametrized."""

    def assigned(model: Any) -> None:
        model[0].weight.data = torch.ones(4, 1, 3, 3)
        model.to("cpu")

    check_model(assigned)
    check_model(lambda model: parametrizations.spectral_norm(model[8]))
    check_model(lambda model: parametrizations.weight_norm(model[4]))


class Shifted(nn.ReLU):
    """A layer with a constant that is drawn after all parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Add it."""
        return super().forward(input) + self.shift


def test_constants_of_a_model() -> None:
    """``model_fn`` seeds, makes layers, and draws a constant."""

    def model_fn() -> nn.Module:
        torch.manual_seed(3)
        model = tiny_cnn()
        model[2] = Shifted()
        model[2].shift = torch.rand(())
        return model

    check_every_kind(model_fn=model_fn)


class Asking(nn.Module):
    """Takes shapes apart, counts by them and branches on them."""

    def __init__(self, *, by_example: bool = False) -> None:
        super().__init__()
        self.inner, self.by_example = nn.ReLU(), by_example

    def forward(self, x: Tensor) -> Tensor:
        """Give back what came, without its negative values."""
        x = self.inner(x)
        *first, _, width = x.shape
        if len(x.shape) > 3:
            x = x.reshape(*first, -1, width)
        if self.by_example:
            return torch.stack(list(x))
        return sum((x[..., i : i + 1] for i in range(width)), start=x)


def test_what_forward_asks_of_shapes() -> None:
    """A trace follows it, and each step checks the answers."""

    def change(model: Any) -> None:
        model[2] = Asking()

    check_model(change)


def test_loops_over_examples() -> None:
    """The error says what depends on the batch, and in which line."""

    def change(model: Any) -> None:
        model[2] = Asking(by_example=True)

    refuse_model(change, r"len\(\) of the size of the batch.*It is line \d+ of")


def repeated() -> nn.Module:
    """Build a network with one layer twice."""
    layer = nn.Conv2d(4, 4, 3, padding=1)
    first = nn.Conv2d(1, 4, 3, padding=1)
    norms = [nn.BatchNorm2d(4) for _ in range(3)]
    end = nn.Sequential(nn.Flatten(), nn.Linear(144, NUM_CLASSES))
    return nn.Sequential(
        first, norms[0], layer, norms[1], layer, norms[2], end, nn.ELU()
    )


def test_several_names_of_one_tensor() -> None:
    """On mixed routes, both names of the layer have its value."""
    start = repeated().state_dict()
    task = replace(TASK, model_fn=repeated)
    made = run(
        [message_app(index, task=task, edges=EDGES) for index in range(len(ROUTES))],
        smart_split(EDGES, task=task, choose_route=in_turn_of(len(build_chain(task)))),
        arrays=ArrayRecord(start),
    )
    assert made.kinds() == []
    for name in ("weight", "bias"):
        assert (made.state[f"2.{name}"] == made.state[f"4.{name}"]).all()
        assert (made.state[f"4.{name}"] != start[f"4.{name}"].numpy()).any()


def in_turn_of(size: int) -> Callable[[RouteRequest], Route]:
    """Give the clients kinds of route in a chain of this size."""
    kinds = (
        Route.whole(),
        Route.split(1, edge="near"),
        Route.u_shape(1, size - 1, edge="far"),
        Route.hops((1, size - 1), edges=("near", "far")),
    )
    return lambda request: kinds[request.index % len(kinds)]


def decayed(parameters: Any) -> Optimizer:
    """Let weights decay unless an attribute says that they must not."""
    groups = [
        {"params": [p], "weight_decay": 0.0 if hasattr(p, "no_decay") else 0.5}
        for p in parameters
    ]
    return torch.optim.SGD(groups, lr=0.05)


def test_attributes_of_parameters() -> None:
    """They are kept at every place, and in the dry run."""

    def mark(model: Any) -> None:
        for layer in (model[4], model[8]):
            layer.weight.no_decay = True

    check_model(mark, optimizer_fn=decayed)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1 + 2j]),
        torch.tensor([2**53 + 1]),
        torch.tensor([True, False]),
        torch.tensor([1 / 3], dtype=torch.float64),
        torch.tensor([1 / 3], dtype=torch.float16),
    ],
    ids=lambda value: str(value.dtype),
)
def test_dtypes_of_a_state(value: Tensor) -> None:
    """A counter and what it stands beside come back exactly."""
    task = replace(TASK, model_fn=altered(lambda m: m[1].register_buffer("own", value)))
    arrays = ArrayRecord({**initial_arrays(), **ArrayRecord({"1.own": value})})
    order = task.model_fn().state_dict()
    arrays = ArrayRecord({name: arrays[name] for name in order})
    mixed, whole = (make(task, arrays=arrays) for make in (train_mixed, train_whole))
    assert differences(mixed.state, whole.state) == []
    assert mixed.state["1.own"].tobytes() == value.numpy().tobytes()


def test_a_mask_of_infinities() -> None:
    """It is merged like any constant, also in a unit that has statistics."""

    def mask(model: Any) -> None:
        model[1].register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    check_model(mask)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e5m2, torch.complex128], ids=str
)
def test_dtypes_that_cannot_be_sent(dtype: torch.dtype) -> None:
    """The error names the tensor and what to use."""
    value = torch.zeros(1).to(dtype)
    refuse_model(lambda m: m[1].register_buffer("own", value), "1.own is .*: use|Use")


def test_hooks() -> None:
    """The error names the layer or the weight, and where to do it instead."""
    refuse_model(lambda m: m[2].register_forward_hook(print), r"forward of 2 \(ReLU\)")
    refuse_model(lambda m: m[4].weight.register_hook(print), "4.weight has a gradient")
    refuse_model(lambda m: nn.utils.weight_norm(m[4]), "nn.utils.parametrizations")


class Grows(nn.Module):
    """Makes its layer in forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(x.shape[1], NUM_CLASSES)
        return self.layer(x)


def test_layers_made_in_forward() -> None:
    """They would be in no state that is sent."""
    refuse_model(lambda model: model.__setitem__(8, Grows()), "in __init__")


def test_adapters() -> None:
    """Those of peft, in a model that torch.fx traces; tests/adapters.py has more."""
    model_fn = partial(with_lora, tiny_cnn, target_modules=["4", "8"])
    check_every_kind(model_fn=model_fn)
    task = replace(TASK, model_fn=model_fn)
    arrays = to_array_record(state_of(model_fn()))
    mixed = train_mixed(task, arrays=arrays)
    assert differences(mixed.state, train_whole(task, arrays=arrays).state) == []
    moved = differences(mixed.state, from_array_record(arrays))
    assert moved
    assert all(
        "lora_" in name or "running" in name or "num_b" in name for name in moved
    )


def test_adapters_that_add_tokens() -> None:
    """They would be lost where a model is cut."""
    peft = import_module("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    base = hugging_face_model("GPT2LMHeadModel").model_fn()
    with pytest.raises(NotSplittable, match="PromptTuningConfig adds to its forward"):
        decoder_units(peft.get_peft_model(base, config))


def test_tied_embeddings() -> None:
    """A decoder is cut where they are frozen, and one unit where they are trained."""
    sgd = partial(torch.optim.SGD, lr=0.05)
    assert len(build_chain(PEFT["tied gpt"].task(sgd))) == 4
    trained = hugging_face_model("GPT2LMHeadModel", tie_word_embeddings=True)
    chain = build_chain(trained.task(sgd))
    with pytest.raises(NotSplittable, match=r"both sides of it use .*wte\.weight"):
        chain.require_cuts()
