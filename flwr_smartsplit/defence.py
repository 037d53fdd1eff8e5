"""Defence: what a device does to a boundary so that it tells less of the inputs.

It is a unit of the chain, at one place for all clients, and never leaves the device.
So the same is computed on every route, and memory is predicted as for any other unit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.loss_terms import with_loss
from flwr_smartsplit.types.sizes import plain, whole

_LEAST_SQUARE = 1e-12  # Below it, two examples count as equal.
_STEPS = 200  # Of a bisection, more than a float64 has bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Defence:
    """Make the boundary after a unit tell less of the inputs, on every route.

    Every cut lies behind it, so that only what it lets through reaches an edge. Labels
    are not its business: ``Planning(choose_route=deepest_u_shape)`` keeps them here.

    Parameters
    ----------
    after : str
        The unit of the chain that it follows, by name; ``smartsplit profile`` and
        ``Chain.unit_names`` list them.
    nopeek : float
        Weight in the loss of the distance correlation between a batch's inputs and
        what comes out of that unit (NoPeek, Vepakomma et al., 2020). It makes
        boundaries tell less; nothing is guaranteed. The reported loss has no part of
        it.
    clip : float, optional
        The largest Euclidean norm of one example's values; larger ones are scaled.
    noise : float
        Deviation of the Gaussian noise added to each value, as a multiple of ``clip``;
        in training and in evaluation.

    Raises
    ------
    ValueError
        If it would do nothing, or a number is out of range.

    Examples
    --------
    >>> defence = Defence(after="relu", clip=1.0, noise=4.0)
    >>> round(defence.epsilon(1e-5, num_crossings=10), 2)
    7.51
    """

    after: str
    nopeek: float = 0.0
    clip: float | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("nopeek", "clip", "noise"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        numbers = self.nopeek, self.noise, 1.0 if self.clip is None else self.clip
        if any(not 0 <= number < math.inf for number in numbers) or self.clip == 0:
            raise ValueError(
                f"nopeek={self.nopeek}, noise={self.noise}, clip={self.clip}: give "
                "finite numbers of at least 0, and a clip above 0."
            )
        if (self.clip is None) != (self.noise == 0):
            raise ValueError(
                f"noise={self.noise} and clip={self.clip}: give both or neither. Noise "
                "hides an example only if its values are bounded."
            )
        if not self.nopeek and not self.noise:
            raise ValueError(
                "a defence with neither nopeek nor noise does nothing: leave it out."
            )

    def __call__(self, root: Any, value: Any, batch: Any) -> Any:
        """Pass a unit's value on; add the loss's gradient, and clip and noise it."""
        tensors = value if type(value) is tuple else (value,)
        if self.nopeek and root.training and any(t.requires_grad for t in tensors):
            term = distance_correlation(batch, tensors)
            place = next(i for i, t in enumerate(tensors) if t.requires_grad)
            added = with_loss(tensors[place], term, self.nopeek)
            tensors = (*tensors[:place], added, *tensors[place + 1 :])
        if self.clip is not None:
            tensors = _noised(tensors, self.clip, self.clip * self.noise)
        return tensors if type(value) is tuple else tensors[0]

    def epsilon(self, delta: float, *, num_crossings: int) -> float:
        """Say how private one example's inputs are, as (epsilon, delta).

        Exact for the composition of Gaussian mechanisms (Dong, Roth and Su, 2022, the
        formula of Balle and Wang, 2018): two boundaries of an example with other inputs
        are at most ``2 * clip`` apart. It counts what one example's own boundaries tell
        an edge of its inputs, given the weights. It counts neither the example's label
        nor what the trained weights and the other examples' boundaries tell of it,
        which is nothing if the units up to the defence are frozen.

        Parameters
        ----------
        delta : float
            Above 0 and below 1; well below one over the number of examples.
        num_crossings : int
            How often an example is sent: passes over the data in all rounds, and
            evaluations.

        Raises
        ------
        ValueError
            If there is no noise, or a number is out of range.
        """
        num_crossings = whole(num_crossings, "num_crossings")
        if not self.noise or not 0 < delta < 1 or num_crossings < 1:
            raise ValueError(
                f"noise={self.noise}, delta={delta}, num_crossings={num_crossings}: "
                "an epsilon needs noise, a delta between 0 and 1, and a crossing."
            )
        distance = 2 * math.sqrt(num_crossings) / self.noise
        low, high = 0.0, 1.0
        while _delta(high, distance) > delta:
            high *= 2
        for _ in range(_STEPS):
            middle = (low + high) / 2
            is_private = _delta(middle, distance) <= delta
            low, high = (low, middle) if is_private else (middle, high)
        return high


def _delta(epsilon: float, distance: float) -> float:
    """Return delta where two Gaussians of deviation 1 lie so far apart."""
    first = _below(distance / 2 - epsilon / distance)
    second = _below(-distance / 2 - epsilon / distance)
    return first - (math.exp(epsilon + math.log(second)) if second else 0.0)


def _below(value: float) -> float:
    """Return how much of a Gaussian lies below a value."""
    return math.erfc(-value / math.sqrt(2)) / 2


def float_tensors(batch: Any) -> list[Tensor]:
    """List the floating-point tensors of a batch."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def distance_correlation(batch: Any, other: Any) -> Tensor:
    """Return how far distances in one follow distances in the other, from 0 to 1.

    Between the examples of two sets of tensors (Székely, Rizzo and Bakirov, 2007); 0
    where all examples of one are equal.
    """
    one, two = (_centred(float_tensors(each)) for each in (batch, other))
    size = (one * one).mean() * (two * two).mean()
    square = (one * two).mean() / size.clamp(min=_LEAST_SQUARE).sqrt()
    return square.clamp(min=_LEAST_SQUARE).sqrt()


def _centred(tensors: list[Tensor]) -> Tensor:
    squares: Any = 0.0
    for tensor in tensors:
        rows = _at_least_float32(tensor).flatten(1)
        lengths = (rows * rows).sum(dim=1)
        squares = squares + (lengths[:, None] + lengths[None] - 2 * rows @ rows.T)
    distances = squares.clamp(min=_LEAST_SQUARE).sqrt()
    means = distances.mean(dim=0)
    centred: Tensor = distances - means[None] - means[:, None] + means.mean()
    return centred


def _noised(
    tensors: tuple[Tensor, ...], clip: float, deviation: float
) -> tuple[Tensor, ...]:
    """Clip each example by its norm over all tensors, and add noise."""
    squares: Any = 0.0
    for tensor in tensors:
        rows = _at_least_float32(tensor).flatten(1)
        squares = squares + (rows * rows).sum(dim=1)
    scale = (clip / squares.clamp(min=_LEAST_SQUARE).sqrt()).clamp(max=1.0)
    noised = []
    for tensor in tensors:
        values = _at_least_float32(tensor)
        values = values * scale.view(-1, *[1] * (tensor.dim() - 1)).to(values.dtype)
        values = values + deviation * torch.randn_like(values)
        noised.append(values.to(tensor.dtype))
    return tuple(noised)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < torch.float32.itemsize else tensor
