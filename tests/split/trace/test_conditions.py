"""Conditions on shapes: followed and checked, or refused for the right reason."""

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


@pytest.mark.parametrize("ask", [asserts, reshapes, by_dtype])
def test_a_condition_on_shapes_is_followed(ask: Any) -> None:
    asked = task(ask)
    chain = Chain.from_module(asked.model_fn(), asked.example_inputs)
    with RouteChecker(asked, example_batches(asked, batch_size=4)) as checker:
        for cut in range(1, len(chain)):
            assert checker.check(Route.split(cut)).differences == ()


def test_a_condition_on_the_size_of_the_batch_is_refused() -> None:
    with pytest.raises(NotSplittable, match="branches on the size of the batch"):
        Chain.from_module(Conditional(by_size_of_batch), torch.zeros(2, 10))


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
    monkeypatch.setattr(conditions, "bool", lambda _: False, raising=False)
    inputs = torch.randn(5, 10)
    found = chain.segment(0, len(chain)).eval()(inputs)
    assert not torch.equal(found, model(inputs))
