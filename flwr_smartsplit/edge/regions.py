"""Parts of a state: cut for a variant, and merged value by value.

Each value is the weighted mean over the clients that have it; one that nobody has
stays. Sums are made and divided as in ``weighted_mean.py``, so where everybody has all
of an array the bits are the same.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.edge.weighted_mean import Sums, WeightedSum, add_sums
from flwr_smartsplit.types import Region, Regions

Array = npt.NDArray[Any]
State = Mapping[str, Array]
Part = tuple[Sums, Regions]
"""Sums of states that have the same regions of the global one."""


def cut_array(array: Array, region: Region | None) -> Array:
    """Copy a region of an array; None is all of it, and not copied."""
    return array if region is None else array[_index(array.shape, region)]


def cut_state(state: State, regions: Regions) -> State:
    """Copy the regions of a state; arrays without one are not copied."""
    if not regions:
        return state
    return {name: cut_array(a, regions.get(name)) for name, a in state.items()}


def merge_parts(current: State, parts: Iterable[Part]) -> dict[str, Array]:
    """Replace the values of a state that were summed by their weighted means."""
    parts = list(parts)
    return {name: _merged(name, array, parts) for name, array in current.items()}


def _merged(name: str, array: Array, parts: list[Part]) -> Array:
    own = [(sums[name], regions.get(name)) for sums, regions in parts if name in sums]
    if not own:
        return array
    if all(region is None for _, region in own):
        return add_sums({name: each} for each, _ in own)[name].mean(array.dtype)
    total = _placed(*own[0], array)
    for each, region in own[1:]:
        total = _both(total, _placed(each, region, array))
    high, low, weights = total
    merged = array.copy()
    for weight in map(int, np.unique(weights)):
        at = weights == weight
        if weight:
            merged[at] = WeightedSum(high[at], low[at], weight).mean(array.dtype)
    return merged


_Placed = tuple[Array, Array, npt.NDArray[np.int64]]
"""A sum, its rounding error and its weight, for every value of the global array."""


def _placed(part: WeightedSum, region: Region | None, array: Array) -> _Placed:
    """Place a sum where its values are in the global array; elsewhere is nothing."""
    shape = (*array.shape, *part.high.shape[array.ndim :])  # Complex ones are pairs.
    weights = np.zeros(array.shape, dtype=np.int64)
    if region is None:
        weights[...] = part.weight
        return part.high, part.low, weights
    at = _index(array.shape, region)
    high, low = np.zeros(shape), np.zeros(shape)
    high[at], low[at], weights[at] = part.high, part.low, part.weight
    return high, low, weights


def _both(one: _Placed, other: _Placed) -> _Placed:
    total = WeightedSum(*one[:2], 0) + WeightedSum(*other[:2], 0)
    return total.high, total.low, one[2] + other[2]


def _index(shape: tuple[int, ...], region: Region) -> tuple[Array, ...]:
    """Make NumPy's index of a region; axes that it does not tell of stay whole."""
    found = [np.arange(size) for size in shape]
    for axis, indices in enumerate(region):
        if indices is not None:
            found[axis] = indices
    return np.ix_(*found)
