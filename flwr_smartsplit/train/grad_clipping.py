"""Clip gradients by their common norm when they are at several places.

``torch.nn.utils.clip_grad_norm_`` takes the norm of the norms of all gradients. Each
place sends one norm per parameter; in the model's order they give the same bits as in
one place.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.memory.meter import unmetered

Norms = Mapping[str, float]
"""The norm of each gradient, by its parameter's name."""


@unmetered()  # A few scalars.
def gradient_norms(segment: nn.Module) -> dict[str, float]:
    """Compute the norm of each gradient of a segment."""
    return {
        name: float(torch.linalg.vector_norm(parameter.grad))
        for name, parameter in segment.named_parameters()
        if parameter.grad is not None
    }


@unmetered()
def total_norm(norms: Norms, model: nn.Module) -> float:
    """Compute the norm of all gradients from the norm of each, by parameter name.

    Raises ``InvalidTask`` if the parameters have several dtypes, whose norms torch does
    not combine.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1:
        raise InvalidTask(
            "max_gradient_norm: the model's parameters are "
            f"{', '.join(sorted(map(str, dtypes)))}; "
            "give them one type, or clip each by its value in a hook of the optimizer."
        )
    ordered = [norms[name] for name, _ in model.named_parameters() if name in norms]
    return float(torch.linalg.vector_norm(torch.tensor(ordered, dtype=dtypes.pop())))


@unmetered()
def clip_gradients(segment: nn.Module, *, max_norm: float, norm: float) -> None:
    """Scale a segment's gradients in place by the norm of the whole model's."""
    parameters = [p for p in segment.parameters() if p.grad is not None]
    if parameters:
        dtype = parameters[0].dtype
        clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm, dtype=dtype))
