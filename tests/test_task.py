"""Task: functions that make things, not the things."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.tasks import TASK


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_fn", nn.Linear(2, 2)),
        ("optimizer_fn", torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)),
        ("loss_fn", None),
        ("model_fn", "resnet18"),
    ],
)
def test_what_is_not_a_function_is_named(name: str, value: object) -> None:
    """A finished model or optimizer cannot be built again at another place."""
    with pytest.raises(TypeError, match=f"{name} is a .*; give a function"):
        replace(TASK, **{name: value})


def test_a_class_is_a_function_that_makes_its_objects() -> None:
    """``model_fn=Net`` is the usual form."""
    assert replace(TASK, model_fn=nn.Identity, optimizer_fn=torch.optim.SGD)


def test_a_loss_that_is_a_class_is_refused():
    """It would be built with outputs and targets instead of being called."""
    with pytest.raises(TypeError, match="class CrossEntropyLoss; give an inst"):
        replace(TASK, loss_fn=nn.CrossEntropyLoss)
