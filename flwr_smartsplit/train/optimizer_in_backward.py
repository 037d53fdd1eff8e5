"""Free memory early in a step, without changing a number.

A plain step holds three things longer than needed: a boundary and its gradient at the
end of a segment, a copy of the boundary's gradient at its beginning, and all gradients
until the optimizer runs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from flwr_smartsplit.memory.meter import phase

LEAST_EARLY_BYTES = 2**14
"""Smaller gradients wait for the end, because each optimizer step costs time."""

_ONE_BY_ONE = frozenset(
    getattr(torch.optim, name)
    for name in (
        *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax"),
        *("Adadelta", "Adagrad", "RMSprop", "ASGD", "Rprop"),
    )
)
_WITH_RECORD = Optimizer.profile_hook_step(lambda _: None).__code__
_HOOK_MARK = "_treats_parameters_one_by_one"


class GradientEntry:
    """The end of a graph, where the gradients of a boundary will arrive later.

    Only the graph and the engine hold the boundary and its gradients: the boundary is
    freed once sent, a gradient once used. The graph behind a tensor that gets no
    gradient does not run, as in the whole model.
    """

    def __init__(self, boundary: Sequence[Tensor]) -> None:
        self._arrived: list[Tensor | None] = []
        self._sizes = [tensor.numel() for tensor in boundary]
        # The engine begins with what was made last: gradients enter in their order.
        ends = [
            _End.apply(self._arrived, place, boundary[place])
            for place in reversed(range(len(boundary)))
        ]
        self._ends: list[Tensor] = ends[::-1]

    def backward(self, receive: Callable[[], Sequence[Tensor]]) -> None:
        """Receive the gradients, and run backward; an empty tensor stands for none."""
        ends, self._ends = self._ends, []
        if not ends:
            return
        pairs = zip(receive(), self._sizes, strict=True)
        self._arrived[:] = [g if g.numel() == size else None for g, size in pairs]
        del pairs
        live = [
            end for end, g in zip(ends, self._arrived, strict=True) if g is not None
        ]
        del ends  # With the graphs that do not run.
        if live:
            torch.autograd.backward(live, [torch.empty_like(end) for end in live])


class _End(torch.autograd.Function):
    """End a graph with an empty tensor, to call ``backward`` on."""

    @staticmethod
    def forward(
        ctx: Any, arrived: list[Tensor | None], place: int, tensor: Tensor
    ) -> Tensor:
        """Return an empty tensor."""
        ctx.arrived, ctx.place = arrived, place
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None, Tensor | None]:
        """Leave the gradient to the engine alone."""
        gradient, ctx.arrived[ctx.place] = ctx.arrived[ctx.place], None
        return None, None, gradient


class GradientExit(torch.autograd.Function):
    """Begin a graph with a boundary whose gradients are taken as the engine made them.

    A leaf would copy them, and ``.grad`` would change their layout.
    """

    @staticmethod
    def forward(
        ctx: Any, trigger: Tensor, caught: list[Tensor], *boundary: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the boundary; ``trigger`` makes it part of the graph."""
        del trigger
        ctx.set_materialize_grads(False)
        ctx.caught = caught
        return tuple(tensor.detach() for tensor in boundary)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        """Collect the gradients; an empty tensor stands for none."""
        ctx.caught += [torch.empty(0) if g is None else g for g in gradients]
        return None, None, *(None for _ in gradients)


def one_by_one(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark an optimizer hook that treats each parameter independently."""
    setattr(hook, _HOOK_MARK, True)
    return hook


def steps_one_by_one(optimizer: Optimizer) -> bool:
    """Say whether an optimizer is known to update each parameter independently.

    Then each can be updated as soon as its gradient is there, with the same bits.
    Unknown optimizers, for instance one that uses the norm of all gradients, may not.
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
def stepping_in_backward(
    optimizer: Optimizer,
    late: Iterable[Tensor] = (),
    *,
    see: Callable[[Tensor], None] | None = None,
) -> Iterator[None]:
    """Update each large parameter inside backward, and free its gradient at once.

    The optimizer must be one that ``steps_one_by_one``. Those of ``late`` wait for the
    end of the step. ``see`` is shown each before its update, with its gradient.
    """
    waiting = {id(parameter) for parameter in late}
    step = bare_step(optimizer)
    hooks = [
        parameter.register_post_accumulate_grad_hook(
            partial(_update, optimizer, step, group, see=see)
        )
        for group in optimizer.param_groups
        for parameter in stepped_in_backward(group["params"])
        if id(parameter) not in waiting
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def bare_step(optimizer: Optimizer) -> Callable[[], object]:
    """Return an optimizer's step without torch's record of it for its profiler.

    That record takes longer than the update of a small parameter. Hooks are run by the
    same wrapper, so it stays where there are some, and where somebody else, such as a
    scheduler, has wrapped the step.
    """
    step: Any = type(optimizer).step
    if getattr(step, "__code__", None) is not _WITH_RECORD or any(
        (
            "step" in vars(optimizer),
            *(optimizer._optimizer_step_pre_hooks, _global_optimizer_pre_hooks),
            *(optimizer._optimizer_step_post_hooks, _global_optimizer_post_hooks),
        )
    ):
        return optimizer.step
    return partial(step.__wrapped__, optimizer)


def free_gradients(optimizer: Optimizer) -> None:
    """Free the gradients as ``zero_grad`` does, without torch's record of it."""
    is_own = type(optimizer).zero_grad is not Optimizer.zero_grad
    if is_own or "zero_grad" in vars(optimizer):
        optimizer.zero_grad(set_to_none=True)  # It may free more.
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _update(
    optimizer: Optimizer,
    step: Callable[[], object],
    own: dict[str, Any],
    parameter: Tensor,
    *,
    see: Callable[[Tensor], None] | None,
) -> None:
    """Step the optimizer with this parameter only."""
    if see is not None:
        see(parameter)
    groups = optimizer.param_groups
    whole = [group["params"] for group in groups]
    try:
        for group in groups:
            group["params"] = [parameter] if group is own else []
        with phase("optimizer"):
            step()
    finally:
        for group, parameters in zip(groups, whole, strict=True):
            group["params"] = parameters
    parameter.grad = None


def stepped_in_backward(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Choose the parameters that are updated inside backward."""
    return [p for p in parameters if p.numel() * p.element_size() >= LEAST_EARLY_BYTES]
