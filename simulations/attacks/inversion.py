"""Reconstruct images from boundaries, and measure how well.

The attacker has the device's weights, as every client of the run has, and images of the
same kind. It trains a decoder on pairs of boundary and image.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flwr_smartsplit.train.rng import stream
from simulations.attacks.networks import adam, descend, perceptron

_WINDOW, _C1, _C2 = 7, 0.01**2, 0.03**2  # As SSIM's authors have them, for 0 to 1
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Likeness:
    """How like the originals reconstructions are, as pixels from 0 to 1."""

    mse: float
    psnr: float
    ssim: float

    @classmethod
    def of(cls, made: Tensor, true: Tensor) -> "Likeness":
        """Compare ``(num, channels, height, width)`` pixels."""
        mse = float(F.mse_loss(made, true))
        psnr = 10 * math.log10(1 / max(mse, 1e-12))
        return cls(mse, psnr, structural_similarity(made, true))

    def values(self) -> dict[str, float]:
        """Write it as a row's values."""
        return asdict(self)


def structural_similarity(one: Tensor, other: Tensor) -> float:
    """Compute the mean SSIM (Wang et al., 2004), with square windows.

    Examples
    --------
    >>> image = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    >>> structural_similarity(image, image)
    1.0
    """

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, _WINDOW, stride=1)

    m1, m2 = mean(one), mean(other)
    v1, v2 = mean(one * one) - m1 * m1, mean(other * other) - m2 * m2
    both = mean(one * other) - m1 * m2
    similar = (2 * m1 * m2 + _C1) * (2 * both + _C2)
    return float((similar / ((m1 * m1 + m2 * m2 + _C1) * (v1 + v2 + _C2))).mean())


def inverted(
    boundaries: Tensor, known: tuple[Tensor, Tensor], *, num_steps: int, seed: int
) -> Tensor:
    """Reconstruct the images behind boundaries, from known boundaries and images."""
    codes, images = known
    scale = codes.std() + 1e-6
    with stream(seed):
        decoder = perceptron(codes[0].numel(), images[0].numel())
        optimizer = adam(decoder)
        for _ in range(num_steps):
            drawn = torch.randint(len(images), (_BATCH,))
            made = decoder(codes[drawn] / scale)
            descend(F.mse_loss(made, images[drawn].flatten(1)), optimizer)
    with torch.no_grad():
        found: Tensor = decoder(boundaries / scale)
    return found.view(-1, *images.shape[1:])
