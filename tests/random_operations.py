"""Operations for the forward of a random module.

They stand in a container's forward, because a module without children is one node of
a traced graph: nothing inside it is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Op:
    """An operation of a forward; it may be told whether the model trains."""

    run: Callable[..., Any]
    knows_mode: bool = False

    def __repr__(self) -> str:
        return f"Op({getattr(self.run, '__name__', self.run)})"


def prepared(x: Tensor) -> Tensor:
    """Work on the batch before the first parameter."""
    return x / 2 - 0.5


def start_doubled(x: Tensor) -> Tensor:
    """Write into a slice, and go on with all of it."""
    x[:, :1].mul_(2)
    return x


def flat_rectified(x: Tensor) -> Tensor:
    """Write through a view; or into a copy, if the memory has another order."""
    x.flatten().relu_()
    return x


def slices_rejoined(x: Tensor) -> Tensor:
    """Write into one of two slices."""
    return torch.cat([x[:, :1].add_(0.5), x[:, 1:]], 1)


def written_by_another_name(x: Tensor) -> Tensor:
    """Write into a view through another view."""
    x = x.clone().view(x.shape)
    x[:].add_(0.5)
    return x


def shifted(x: Tensor) -> Tensor:
    """Write by an operator of Python's, and use the tensor by its other name too."""
    y = x
    y += 0.5
    return x + y


def raised(x: Tensor) -> Tensor:
    """Write by a method."""
    return x.add_(0.5)


def scaled(x: Tensor) -> Tensor:
    """Write by a method, and ignore what it returns."""
    x.mul_(1.5)
    return x


def copy_written(x: Tensor) -> Tensor:
    """Write into a copy, which is no reason to refuse."""
    return x + x.clone().mul_(0.5)


def expanded(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Repeat one value along the last dimension, without memory for it."""
    return x.mean(-1, keepdim=True).expand(*sizes)


def transposed(x: Tensor) -> Tensor:
    """Swap the last two dimensions without moving anything."""
    return x.transpose(-1, -2)


def moved_round(x: Tensor) -> Tensor:
    """Give the memory another order."""
    return x.transpose(1, -1).contiguous().transpose(1, -1)


def reversed_order(x: Tensor) -> Tensor:
    """Reverse the channels by an index."""
    return x.flip(1)


def every_second(x: Tensor) -> Tensor:
    """Take a slice with gaps."""
    return x[..., ::2]


def channels_last(x: Tensor) -> Tensor:
    """Put the channels innermost in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def as_sequence(x: Tensor) -> Tensor:
    """Read an image as a sequence of pixels."""
    return x.flatten(2).transpose(1, 2)


def last_of_sequence(x: Tensor) -> Tensor:
    """Take the last element."""
    return x[:, -1]


def image_mean(x: Tensor) -> Tensor:
    """Average each channel."""
    return x.mean(dim=(2, 3))


def in_double(x: Tensor) -> Tensor:
    """Compute in another precision; the boundary may lie in it."""
    return x.double().sin().float()


def in_bfloat16(x: Tensor) -> Tensor:
    """Compute in half of the bits."""
    return (x.bfloat16() * 1.5).float()


def in_frequencies(x: Tensor) -> Tensor:
    """Compute with complex numbers."""
    return torch.fft.ifft(torch.fft.fft(x) * 2).real


def noisy(x: Tensor, training: bool) -> Tensor:
    """Add noise, in training only."""
    return x + 0.1 * torch.randn_like(x) if training else x


def masked(x: Tensor, training: bool) -> Tensor:
    """Multiply with a mask that bernoulli draws."""
    return x * torch.bernoulli(torch.full_like(x, 0.7)) if training else x * 0.7


def dropped_in_place(x: Tensor, training: bool) -> Tensor:
    """Drop in place, by the function."""
    return functional.dropout(x, 0.3, training, inplace=True)


def other_by_mode(x: Tensor, training: bool) -> Tensor:
    """Run other operations in evaluation."""
    return torch.tanh(x) * 2 if training else functional.hardtanh(x)


def without_gradient(x: Tensor) -> Tensor:
    """Switch gradients off for a while."""
    with torch.no_grad():
        y = x * 2
    return x + y


def in_autocast(x: Tensor) -> Tensor:
    """Compute with fewer bits for a while."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ torch.ones_like(x).transpose(-1, -2)
    return x * y.float().mean()


def conjugated(x: Tensor) -> Tensor:
    """Have a boundary that is conjugated only when it is read."""
    return torch.fft.fft(x).conj().real


def branched_on_values(x: Tensor) -> Tensor:
    """Do what torch.fx cannot trace."""
    return x if x.sum() > 0 else -x
