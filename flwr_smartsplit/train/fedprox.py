"""FedProx's term, for any optimizer and at every place."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flwr_smartsplit.train.optimizer_in_backward import one_by_one

_CENTRE = "proximal_centre"


def proximal(
    parameters: Iterable[nn.Parameter],
    *,
    optimizer_fn: Callable[[Iterable[nn.Parameter]], Optimizer],
    mu: float,
) -> Optimizer:
    """Build an optimizer that pulls parameters back to where the round began.

    It adds ``mu * (w - w0)`` to each gradient, the derivative of FedProx's term
    ``mu / 2 * ||w - w0||^2`` [1]_. The term is a sum over parameters, so each place
    adds its own part. A place keeps a copy of the parameters that it trains;
    predictions include it.

    Parameters
    ----------
    parameters : Iterable[nn.Parameter]
        What to train.
    optimizer_fn : Callable[[Iterable[nn.Parameter]], Optimizer]
        Builds the optimizer that does the step.
    mu : float
        Weight of the term, at least 0.

    References
    ----------
    .. [1] Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
       arXiv:1812.06127, equation 2.

    Examples
    --------
    >>> from functools import partial
    >>> sgd = partial(torch.optim.SGD, lr=0.1)
    >>> optimizer_fn = partial(proximal, optimizer_fn=sgd, mu=0.01)
    >>> type(optimizer_fn([nn.Parameter(torch.ones(2))])).__name__
    'SGD'
    """
    if not mu >= 0:
        raise ValueError(f"mu is {mu}: give a number of at least 0.")
    optimizer = optimizer_fn(parameters)
    copies: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def pull(optimizer: Optimizer, *_: Any) -> None:
        for parameter in _trained(optimizer):
            centre = optimizer.state[parameter].get(_CENTRE)
            if centre is None:
                copies[parameter] = parameter.clone()  # Before its first step.
            else:
                parameter.grad.add_(parameter - centre, alpha=mu)

    def keep(optimizer: Optimizer, *_: Any) -> None:
        # After the first step: an optimizer takes any earlier state for its own.
        while copies:
            parameter, copy = copies.popitem()
            optimizer.state[parameter][_CENTRE] = copy

    optimizer.register_step_pre_hook(one_by_one(pull))
    optimizer.register_step_post_hook(one_by_one(keep))
    return optimizer


def _trained(optimizer: Optimizer) -> list[Any]:
    return [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
