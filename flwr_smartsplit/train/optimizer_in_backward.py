"""Hold nothing in a step that need not be held, and keep every number the same.

Three places where a plain step holds more than physics asks for: a boundary and its
gradient at the end of a segment, a copy of the boundary's gradient at its beginning,
and all gradients at once until the optimizer runs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from flwr_smartsplit.memory.meter import phase

LEAST_EARLY_BYTES = 2**14
"""Smaller gradients wait for the end: a step of the optimizer costs time each."""

_ONE_BY_ONE = frozenset(
    getattr(torch.optim, name)
    for name in (
        *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax"),
        *("Adadelta", "Adagrad", "RMSprop", "ASGD", "Rprop"),
    )
)
_HOOK_MARK = "_treats_parameters_one_by_one"


class GradientEntry(torch.autograd.Function):
    """End a graph with nothing where gradients will come in later.

    Neither the boundary nor its gradients are held by anyone but the graph and the
    engine: the boundary goes once it is sent, a gradient once it is used.
    """

    @staticmethod
    def forward(
        ctx: Any, receive: list[Callable[[], Sequence[Tensor]]], *boundary: Tensor
    ) -> Tensor:
        """Return an empty tensor to go backward from."""
        ctx.receive = receive
        ctx.sizes = [tensor.numel() for tensor in boundary]
        return boundary[0].new_empty(0) if boundary else torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Make the gradients now, for the engine alone."""
        gradients = zip(ctx.receive.pop()(), ctx.sizes, strict=True)
        # The far side may have found that a tensor needs none.
        return None, *(g if g.numel() == size else None for g, size in gradients)


class GradientExit(torch.autograd.Function):
    """Begin a graph with a boundary whose gradients go out as the engine made them.

    A leaf would copy them, and ``.grad`` would lay them out anew.
    """

    @staticmethod
    def forward(
        ctx: Any, trigger: Tensor, caught: list[Tensor], *boundary: Tensor
    ) -> tuple[Tensor, ...]:
        """Let the boundary in; ``trigger`` makes it part of the graph."""
        del trigger
        ctx.set_materialize_grads(False)
        ctx.caught = caught
        return tuple(tensor.detach() for tensor in boundary)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        """Put the gradients aside; an empty tensor stands for none."""
        ctx.caught += [torch.empty(0) if g is None else g for g in gradients]
        return None, None, *(None for _ in gradients)


def one_by_one(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark a hook of an optimizer that works on each parameter by itself."""
    setattr(hook, _HOOK_MARK, True)
    return hook


def steps_one_by_one(optimizer: Optimizer) -> bool:
    """Say whether an optimizer is known to step each parameter by itself.

    Then it may step one as soon as its gradient is there, and the numbers are the same
    to the bit. Of others, such as one that takes the norm of all gradients, nobody
    knows.
    """
    hooks = (
        *optimizer._optimizer_step_pre_hooks.values(),
        *optimizer._optimizer_step_post_hooks.values(),
    )
    at_once = ("foreach", "fused", "capturable", "differentiable")
    return (
        type(optimizer) in _ONE_BY_ONE
        and all(hasattr(hook, _HOOK_MARK) for hook in hooks)
        and not any(group.get(k) for group in optimizer.param_groups for k in at_once)
    )


@contextmanager
def early_updates(optimizer: Optimizer) -> Iterator[None]:
    """Step each large parameter inside backward, and free its gradient at once.

    Parameters
    ----------
    optimizer : Optimizer
        One that steps parameters one by one.
    """
    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(_update, optimizer, group))
        for group in optimizer.param_groups
        for parameter in early_ones(group["params"])
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _update(optimizer: Optimizer, own: dict[str, Any], parameter: Tensor) -> None:
    """Have the optimizer see this parameter only."""
    groups = optimizer.param_groups
    all_of_them = [group["params"] for group in groups]
    try:
        for group in groups:
            group["params"] = [parameter] if group is own else []
        with phase("optimizer"):
            optimizer.step()
    finally:
        for group, parameters in zip(groups, all_of_them, strict=True):
            group["params"] = parameters
    parameter.grad = None


def early_ones(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Choose the parameters that are stepped inside backward."""
    return [p for p in parameters if p.numel() * p.element_size() >= LEAST_EARLY_BYTES]
