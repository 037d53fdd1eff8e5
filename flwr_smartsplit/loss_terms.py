"""Terms of the loss that begin inside a model, where no loss function could see them.

A defence and a gate add one each. Their gradients join those that come from the loss,
wherever the rest of the model runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_divisor: ContextVar[float] = ContextVar("loss_divisor", default=1.0)


@contextmanager
def loss_divided_by(divisor: float) -> Iterator[None]:
    """Divide the terms, as the loss of a micro-batch is divided.

    Put it around a forward in a loop of your own that accumulates gradients; else each
    micro-batch adds a whole term.
    """
    token = _divisor.set(divisor)
    try:
        yield
    finally:
        _divisor.reset(token)


def loss_divisor_now() -> float:
    """Return by what the terms are divided here."""
    return _divisor.get()


def with_loss(tensor: Tensor, term: Tensor, weight: float = 1.0) -> Tensor:
    """Pass a tensor on; in backward, ``weight`` times a term of the loss begins here.

    The reported loss has no part of it.
    """
    added: Tensor = _WithLoss.apply(tensor, weight / _divisor.get() * term)
    return added


class _WithLoss(torch.autograd.Function):
    """Pass a tensor on; in backward, a term of the loss begins here, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, term: Tensor) -> Tensor:
        """Return the tensor."""
        ctx.save_for_backward(torch.ones_like(term))
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient, and 1 for the term."""
        (one,) = ctx.saved_tensors
        return gradient, one
