"""Conditions on shapes: followed and checked, or refused for the right reason."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit import Chain, Route, Task
from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split.trace import conditions
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches


class Conditional(nn.Module):
    """A model whose forward asks something in its middle."""

    def __init__(self, ask: Any) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(10, 8), nn.BatchNorm1d(8)
        self.drop, self.layer = nn.Dropout(0.2), nn.MultiheadAttention(8, 2)
        self.last = nn.Linear(8, 4)
        self.ask = ask

    def forward(self, inputs: Tensor) -> Tensor:
        """Ask, and go on."""
        values = self.drop(self.norm(self.first(inputs)))
        values = self.layer(values, values, values)[0]
        values = self.ask(inputs, values)
        outputs: Tensor = self.last(values.relu())
        return outputs


def asserts(inputs: Tensor, values: Tensor) -> Tensor:
    """Assert the shapes of the inputs."""
    assert inputs.shape[1] == 10, "10 features"
    assert inputs.dim() == 2 and inputs.size(-1) != 8
    return values


def reshapes(inputs: Tensor, values: Tensor) -> Tensor:
    """Branch on a number of dimensions."""
    values = values.unsqueeze(1)
    if values.ndim > 2:
        values = values.flatten(1)
    if values.shape[-1] < 8:
        values = values * 0
    return values


def by_dtype(inputs: Tensor, values: Tensor) -> Tensor:
    """Branch on a dtype."""
    if inputs.dtype == torch.float32 and values.is_floating_point():
        values = values * 2
    return values


def unpacks(inputs: Tensor, values: Tensor) -> Tensor:
    """Take a shape apart, as transformers do."""
    shape = values.shape[:-1]
    heads = values.view(*shape, -1, 4)
    halves = heads.chunk(2, dim=len(heads.shape) - 2)
    return torch.cat([half * (i + 1) for i, half in enumerate(halves)], -1).flatten(1)


def counts_features(inputs: Tensor, values: Tensor) -> Tensor:
    """Use a size as Python's own number."""
    for index in range(values.shape[1] // 4):
        values = values * (1 + index)
    return values / math.sqrt(int(inputs.shape[1])) * float(values.size(-1))


def by_the_least_value(inputs: Tensor, values: Tensor) -> Tensor:
    """Fill a mask with the least number of a dtype."""
    least = torch.finfo(values.dtype).min
    return torch.where(values > least, values, values * 0)


def for_each_example(inputs: Tensor, values: Tensor) -> Tensor:
    """Loop over the batch."""
    return torch.stack([values[i] * 2 for i in range(inputs.shape[0])])


def each_of_the_batch(inputs: Tensor, values: Tensor) -> Tensor:
    """Loop over the batch, by its examples."""
    return torch.stack([value * 2 for value in values])


def by_a_value(inputs: Tensor, values: Tensor) -> Tensor:
    """Repeat something as often as a value says."""
    for _ in range(int(values.sum())):
        values = values * 2
    return values


def by_size_of_batch(inputs: Tensor, values: Tensor) -> Tensor:
    """Branch on how many examples there are."""
    return values * 2 if inputs.shape[0] > 2 else values


def small_batches(inputs: Tensor, values: Tensor) -> Tensor:
    """Branch on something that only a large batch has."""
    return values * 2 if inputs.shape[0] > 4 else values


def by_value(inputs: Tensor, values: Tensor) -> Tensor:
    """Branch on a value."""
    return values * 2 if values.sum() > 0 else values


def task(ask: Any) -> Task:
    """Make a task of a model that asks."""
    return Task(
        model_fn=partial(Conditional, ask),
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.1),
        example_inputs=torch.zeros(2, 10),
        example_targets=torch.arange(4),
    )


@pytest.mark.parametrize(
    "ask",
    [asserts, reshapes, by_dtype, unpacks, counts_features, by_the_least_value],
)
def test_a_condition_on_shapes_is_followed(ask: Any) -> None:
    asked = task(ask)
    chain = Chain.from_module(asked.model_fn(), asked.example_inputs)
    with RouteChecker(asked, example_batches(asked, batch_size=4)) as checker:
        for cut in range(1, len(chain)):
            assert checker.check(Route.split(cut)).differences == ()


@pytest.mark.parametrize(
    ("ask", "does"),
    [
        (by_size_of_batch, "branch on"),
        (for_each_example, r"ask for index\(\) of"),
        (each_of_the_batch, r"ask for len\(\) of"),
    ],
)
def test_what_depends_on_the_size_of_the_batch_is_refused(ask: Any, does: str) -> None:
    with pytest.raises(NotSplittable, match=f"not {does} the size of the batch"):
        Chain.from_module(Conditional(ask), torch.zeros(2, 10))


def test_a_number_that_values_tell_is_refused() -> None:
    says = r"not ask for int\(\) of the values.*units_fn"
    with pytest.raises(NotSplittable, match=says):
        Chain.from_module(Conditional(by_a_value), torch.zeros(2, 10))


def by_gradient(inputs: Tensor, values: Tensor) -> Tensor:
    """Branch on whether a gradient is wanted."""
    return values * 2 if values.requires_grad else values


def by_leaf(inputs: Tensor, values: Tensor) -> Tensor:
    """Branch on autograd's record and a shape."""
    return values * 2 if not inputs.is_leaf or values.dim() > 9 else values


@pytest.mark.parametrize(
    ("ask", "names"),
    [
        (by_gradient, r"\w+\.requires_grad"),
        (by_leaf, r"inputs\.is_leaf"),
    ],
)
def test_a_condition_on_autograds_record_is_refused(ask: Any, names: str) -> None:
    """Evaluation has none, so no example inputs could say what training asks."""
    says = rf"not branch on {names}: .*self\.training"
    with pytest.raises(NotSplittable, match=says):
        Chain.from_module(Conditional(ask), torch.zeros(2, 10))


def test_a_refusal_ends_with_our_words() -> None:
    """Torch adds the node of its graph to errors, unless it is told not to."""
    with pytest.raises(NotSplittable) as refused:
        Chain.from_module(Conditional(by_a_value), torch.zeros(2, 10))
    assert "While executing" not in f"{refused.value} {refused.value.__cause__}"


def test_a_step_with_another_size_than_the_trace_asked_for_is_refused() -> None:
    model = nn.Sequential(Repeats())
    segment = Chain.from_module(model, torch.zeros(2, 3)).segment(0, 1)
    segment(torch.zeros(4, 3))
    with pytest.raises(InvalidTask, match=r"index.*that is 3, for this batch 5"):
        segment(torch.zeros(4, 5))


class Repeats(nn.Module):
    """Adds its input to itself, once for each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        return sum((self.inner(x) for _ in range(x.shape[1])), start=x)


def test_a_condition_on_values_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        NotSplittable, match=r"branch on the values.*units_fn"
    ) as caught:
        Chain.from_module(Conditional(by_value), torch.zeros(2, 10))
    assert "shape" not in str(caught.value)


def test_a_step_that_would_decide_otherwise_is_refused() -> None:
    chain = Chain.from_module(Conditional(small_batches), torch.zeros(2, 10))
    segment = chain.segment(0, len(chain))
    segment(torch.zeros(4, 10))
    with pytest.raises(InvalidTask, match=r"gt.*that is False, for this batch True"):
        segment(torch.zeros(5, 10))


def test_a_trace_without_the_check_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: the model trains on, with the other branch's numbers."""
    model = Conditional(small_batches).eval()
    chain = Chain.from_module(model, torch.zeros(2, 10))
    monkeypatch.setitem(conditions.QUESTIONS, "bool", lambda _: False)
    inputs = torch.randn(5, 10)
    found = chain.segment(0, len(chain)).eval()(inputs)
    assert not torch.equal(found, model(inputs))
