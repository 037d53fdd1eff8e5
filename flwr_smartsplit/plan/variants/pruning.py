"""Which channels a model loses when it is pruned once, as pure functions (FedAP).

References
----------
Zhang, Liu, Jia, Zhou, Dai, Dou: FedDUAP: Federated Learning with Dynamic Update and
Adaptive Pruning Using Shared Insensitive Data. IJCAI 2022. arXiv:2204.11536.
Lin, Ji, Wang, Zhang, Zhang, Tian, Shao: HRank: Filter Pruning Using High-Rank Feature
Map. CVPR 2020. arXiv:2002.10179.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import erf, floor, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.types import WHOLE, Axis, ChannelGroup, Variant

State = Mapping[str, npt.NDArray[Any]]
Scores = npt.NDArray[np.float64]
"""For each channel of a group, shape ``(channels,)``: the lowest go first."""

_LEAST_DIMS = 3
"""Of a convolution's weight; a linear layer's has 2."""
_SAME = 0.005
_NUM_SAME = 3
_VARIANCE = 1e-5
"""Of the curve that stands for an eigenvalue, for a range of at most 1."""


def filters_of(group: ChannelGroup, state: State) -> tuple[Axis, ...]:
    """List the convolutions' weights that make a group's channels."""
    return tuple(m for m in group.makers if state[m.name].ndim >= _LEAST_DIMS)


def weight_at(rate: float, state: State, parameters: Collection[str]) -> float:
    """Find V: of the sizes of all parameters, that at place ``floor(rate * number)``.

    Examples
    --------
    >>> weight_at(0.5, {"w": np.array([4.0, -1.0, 3.0, -2.0])}, {"w"})
    3.0
    """
    flat = np.concatenate([np.abs(state[n]).reshape(-1) for n in sorted(parameters)])
    place = min(floor(rate * len(flat)), len(flat) - 1)
    return float(np.partition(flat, place)[place])


def share_below(value: float, group: ChannelGroup, state: State) -> float:
    """Find p_l: the share of the weights of a group's filters that are below V."""
    sizes = [np.abs(state[each.name]).reshape(-1) for each in filters_of(group, state)]
    return float(np.mean(np.concatenate(sizes) < value)) if sizes else 0.0


def norms_of(group: ChannelGroup, state: State) -> Scores:
    """Add up the sizes of each filter's weights over a group's convolutions."""
    total = np.zeros(group.size)
    for each in filters_of(group, state):
        sizes = np.abs(np.moveaxis(state[each.name], each.axis, 0).astype(np.float64))
        total += sizes.reshape(group.size, -1).sum(axis=1)
    return total


def kept_channels(
    group: ChannelGroup, share: float, scores: Sequence[Scores]
) -> tuple[int, ...]:
    """Drop ``floor(share * number)`` of a group's channels: those of lowest score.

    Whole runs of channels that a GroupNorm normalises together go or stay, and at least
    one stays. The second score decides where the first is equal, then the order.

    Examples
    --------
    >>> group = ChannelGroup(name="a.weight", size=4, axes=())
    >>> kept_channels(group, 0.6, [np.array([3.0, 1.0, 1.0, 2.0])])
    (0, 3)
    """
    num_runs = group.size // group.multiple
    num_gone = min(floor(share * num_runs), num_runs - 1)
    by_run = [each.reshape(num_runs, -1).sum(axis=1) for each in scores]
    order = np.lexsort([np.arange(num_runs), *reversed(by_run)])
    runs = sorted(order[num_gone:].tolist())
    channels = range(group.multiple)
    return tuple(run * group.multiple + channel for run in runs for channel in channels)


def pruned(
    groups: Iterable[ChannelGroup],
    rate: float,
    state: State,
    *,
    parameters: Collection[str],
    ranks: Mapping[str, Scores] | None,
) -> Variant:
    """Choose what is left of a model: ``WHOLE``, if nothing goes.

    Parameters
    ----------
    groups : Iterable[ChannelGroup]
        The model's channels; those that no convolution makes all stay.
    rate : float
        p: the share of parameters whose size is below V.
    state : Mapping[str, ndarray]
        The model's values.
    parameters : Collection[str]
        Which arrays are parameters.
    ranks : Mapping[str, ndarray], optional
        The mean rank of each channel's maps, by group; without, sizes of weights count.

    Examples
    --------
    >>> made = Axis("a.weight", 0)
    >>> group = ChannelGroup(name="a.weight", size=2, axes=(made,), makers=(made,))
    >>> state = {"a.weight": np.array([1.0, 2.0]).reshape(2, 1, 1, 1)}
    >>> pruned([group], 0.5, state, parameters=["a.weight"], ranks=None).kept
    {'a.weight': (1,)}
    """
    value, kept = weight_at(rate, state, parameters), {}
    for group in groups:
        norms = norms_of(group, state)
        scores = [norms] if ranks is None else [ranks[group.name], norms]
        channels = kept_channels(group, share_below(value, group, state), scores)
        if len(channels) < group.size:
            kept[group.name] = channels
    return Variant(f"pruned {rate:.3g}", kept) if kept else WHOLE


# --- how much -------------------------------------------------------------------------


def flat_share(values: Scores, weights: Scores) -> float:
    """Read a pruning rate off the spectrum of a loss's Hessian, as FedAP's code does.

    The rate is the share of the spectrum above t. From 0, t rises by 0.1 until three
    differences of successive shares are below 0.005; if the share falls below half of
    the first before that, it begins again in steps of half the size.

    Parameters
    ----------
    values, weights : ndarray
        Eigenvalues and their shares of the whole, which add up to 1, ``(number,)``.

    Examples
    --------
    >>> flat_share(np.array([-5.0, 5.0]), np.array([0.25, 0.75]))
    0.75
    """
    spread = max(1.0, float(values.max() - values.min()))
    deviation = sqrt(_VARIANCE * spread)

    def above(t: float) -> float:
        """Take the share above t, each eigenvalue a normal curve."""
        over = [0.5 * (1 - erf((t - v) / (deviation * sqrt(2)))) for v in values]
        return float(np.dot(weights, over))

    step = 0.1
    while True:
        shares = [above(0.0)]
        while shares[-1] >= shares[0] / 2:
            last = np.abs(np.diff(shares[-_NUM_SAME - 1 :]))
            if len(last) == _NUM_SAME and (last < _SAME).all():
                return shares[-1]
            shares.append(above(step * len(shares)))
        step /= 2
