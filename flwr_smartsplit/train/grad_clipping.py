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
from flwr_smartsplit.train.torch_device import CPU

Norms = Mapping[str, float]
"""The norm of each gradient, by its parameter's name."""


@unmetered()  # A few scalars.
def gradient_norms(segment: nn.Module) -> dict[str, float]:
    """Compute the norm of each gradient of a segment."""
    gradients = {
        name: parameter.grad
        for name, parameter in segment.named_parameters()
        if parameter.grad is not None
    }
    if all(gradient.is_cpu for gradient in gradients.values()):
        norms = [torch.linalg.vector_norm(each) for each in gradients.values()]
    else:  # As torch's own clipping does on accelerators, in other kernels.
        norms = list(torch._foreach_norm(list(gradients.values())))
    return {name: float(norm) for name, norm in zip(gradients, norms, strict=True)}


@unmetered()
def total_norm(norms: Norms, model: nn.Module, device: torch.device = CPU) -> float:
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
    values = torch.tensor(ordered, dtype=dtypes.pop(), device=device)
    return float(torch.linalg.vector_norm(values))


@unmetered()
def clip_gradients(segment: nn.Module, *, max_norm: float, norm: float) -> None:
    """Scale a segment's gradients in place by the norm of the whole model's."""
    parameters = [p for p in segment.parameters() if p.grad is not None]
    if parameters:
        total = torch.tensor(
            norm, dtype=parameters[0].dtype, device=parameters[0].device
        )
        clip_grads_with_norm_(parameters, max_norm, total)
