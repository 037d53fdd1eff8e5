"""Lanczos' method, on a quadratic whose spectrum is known."""

import torch
from torch import Tensor

from flwr_smartsplit.server.pruning import spectrum
from flwr_smartsplit.server.pruning.spectrum import hessian_spectrum

VALUES = torch.tensor([-2.0, 0.0, 0.0, 1.0, 5.0, 9.0])


def found(*, iterations: int = 6, probes: int = 1) -> tuple[Tensor, Tensor]:
    """Read the spectrum of ``x A x / 2``, with A's eigenvalues as above."""
    chance = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=chance, dtype=torch.float64))
    matrix = turn @ torch.diag(VALUES.double()) @ turn.T
    parts = [torch.zeros(2, 2).double(), torch.zeros(2).double()]
    for each in parts:
        each.requires_grad_()

    def loss() -> Tensor:
        x = torch.cat([each.reshape(-1) for each in parts])
        return x @ matrix @ x / 2

    return hessian_spectrum(
        loss, parts, probes=probes, iterations=iterations, generator=chance
    )


def test_it_finds_a_known_spectrum() -> None:
    """Each eigenvalue once, with a share of its own; they add up to 1."""
    values, shares = found()
    torch.testing.assert_close(values, VALUES.unique().double(), atol=1e-8, rtol=0)
    assert torch.isclose(shares.sum(), torch.tensor(1.0).double())
    assert float(shares.min()) > 0


def test_shares_are_those_of_the_eigenvalues_over_many_directions() -> None:
    """A third of the six is 0, and a sixth is each other one."""
    values, shares = found(probes=1500)
    for value in VALUES.unique():
        at = (values - value).abs() < 1e-6
        wanted = float((VALUES == value).double().mean())
        assert abs(float(shares[at].sum()) - wanted) < 0.03


def test_few_steps_find_the_ends_first() -> None:
    """Three steps are within the spectrum, and no more than three values."""
    values, shares = found(iterations=3)
    assert len(values) == 3
    assert VALUES.min() <= values.min() <= values.max() <= VALUES.max()
    assert torch.isclose(shares.sum(), torch.tensor(1.0).double())


def test_a_wrong_product_is_seen(monkeypatch) -> None:
    """The planted error: the matrix lacks what is beside its diagonal."""
    tridiagonal = spectrum._tridiagonal

    def bare(*given) -> Tensor:
        return torch.diag(torch.diagonal(tridiagonal(*given)))

    monkeypatch.setattr(spectrum, "_tridiagonal", bare)
    values, _ = found()
    assert not torch.allclose(values[[0, -1]], VALUES[[0, -1]].double(), atol=1e-2)
