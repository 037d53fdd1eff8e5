"""The spectrum of a loss's Hessian, by Lanczos' method: no Hessian is ever written.

References
----------
Ghorbani, Krishnan, Xiao: An Investigation into Neural Net Optimization via Hessian
Eigenvalue Density. ICML 2019. arXiv:1901.10159.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_TINY = 1e-10


def hessian_spectrum(
    loss_fn: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    *,
    probes: int,
    iterations: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Estimate the eigenvalues of a loss's Hessian, and their shares of the whole.

    Each probe is a random direction, from which Lanczos' method makes a small matrix
    that has the Hessian's spectrum as that direction sees it.

    Parameters
    ----------
    loss_fn : Callable[[], Tensor]
        Computes the loss, a scalar that is twice differentiable.
    parameters : Sequence[Tensor]
        By which it is differentiated; they need a gradient.
    probes, iterations : int
        Directions, and the size of each one's matrix.
    generator : Generator
        Draws the directions.

    Returns
    -------
    tuple[Tensor, Tensor]
        Eigenvalues, and their shares, which add up to 1, ``(probes * iterations,)``
        each, in float64; fewer where a direction meets fewer eigenvalues.
    """
    gradients = torch.autograd.grad(
        loss_fn(), parameters, create_graph=True, allow_unused=True
    )
    used = [(g, p) for g, p in zip(gradients, parameters, strict=True) if g is not None]
    slope = torch.cat([g.reshape(-1) for g, _ in used])
    own = [p for _, p in used]

    def product(vector: Tensor) -> Tensor:
        found = torch.autograd.grad(
            slope,
            own,
            vector.to(slope.dtype),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([each.reshape(-1) for each in found]).double()

    values, shares = [], []
    for _ in range(probes):
        start = torch.randn(len(slope), generator=generator, dtype=torch.float64)
        matrix = _tridiagonal(product, start, iterations)
        found, vectors = torch.linalg.eigh(matrix)
        values.append(found)
        shares.append(vectors[0].square() / probes)
    return torch.cat(values), torch.cat(shares)


def _tridiagonal(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int
) -> Tensor:
    """Make Lanczos' matrix; each direction is made orthogonal to all before it."""
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        ahead = product(basis[-1])
        diagonal.append(ahead @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):  # Once leaves rounding errors that grow.
            ahead = ahead - known.T @ (known @ ahead)
        length = ahead.norm()
        if len(basis) == min(iterations, len(start)) or length < _TINY:
            break
        beside.append(length)
        basis.append(ahead / length)
    matrix = torch.diag(torch.stack(diagonal))
    if beside:
        off = torch.diag(torch.stack(beside), 1)
        matrix = matrix + off + off.T
    return matrix
