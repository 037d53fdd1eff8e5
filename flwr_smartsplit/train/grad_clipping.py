"""Clip gradients by their common norm when they are at several places.

``torch.nn.utils.clip_grad_norm_`` takes the norm of the norms of all gradients. Each
place sends one norm per parameter; in the model's order they give the same bits as in
one place.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
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


class NormsInBackward:
    """Note the norm of each gradient of a step, also of those that are freed early."""

    def __init__(self, segment: nn.Module) -> None:
        self._segment = segment
        self._names = {id(p): name for name, p in segment.named_parameters()}
        self._noted: dict[str, float] = {}

    @unmetered()
    def __call__(self, parameter: Tensor) -> None:
        """Note one before its gradient is freed."""
        gradient = parameter.grad
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient)
            self._noted[self._names[id(parameter)]] = float(norm)

    def rest(self) -> None:
        """Note those that are still there when backward has ended."""
        self._noted |= gradient_norms(self._segment)

    def taken(self) -> dict[str, float]:
        """Return the last step's, once."""
        noted, self._noted = self._noted, {}
        return noted


def fisher_proxy(norms: Norms, model: nn.Module, *, num_examples: int) -> float:
    """Compute the largest mean square of a parameter's gradient, over the batch size.

    WHALE-FL [1]_ takes it for how much a client still has to learn. ``norms`` are those
    of the step's mean gradient before clipping: the mean of squares is the square of
    the norm over the number of elements. What is no number counts as infinite.

    References
    ----------
    .. [1] Su et al., "WHALE-FL: Wireless and Heterogeneity Aware Latency Efficient
       Federated Learning over Mobile Devices via Adaptive Subnetwork Scheduling", AAAI
       2025, arXiv:2405.00885; the proxy as its authors' code has it.

    Examples
    --------
    >>> fisher_proxy({"weight": 4.0}, nn.Linear(4, 2), num_examples=2)
    1.0
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    squares = [norm**2 / sizes[name] for name, norm in norms.items() if sizes[name]]
    if any(map(math.isnan, squares)):
        return math.inf
    return max(squares, default=0.0) / num_examples


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
