"""Parts of a state: cut for a variant, and merged value by value.

Each value is the weighted mean over the clients that have it; one that nobody has
stays. Sums are made and divided as in ``weighted_mean.py``, so where everybody has all
of an array the bits are the same.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.edge.weighted_mean import Sums, WeightedSum, add_sums
from flwr_smartsplit.errors import EdgeError
from flwr_smartsplit.types import Region, Regions

Array = npt.NDArray[Any]
State = Mapping[str, Array]
Part = tuple[Sums, Regions]
"""Sums of states that have the same regions of the global one."""


def cut_array(array: Array, region: Region | None) -> Array:
    """Copy a region of an array; None is all of it, and not copied.

    Runs of neighbours, which most widths keep, are copied much faster than others.
    """
    if region is None:
        return array
    runs = [None if each is None else _run_of(each) for each in region]
    if all(each is None or run for each, run in zip(region, runs, strict=True)):
        return np.array(array[tuple(run or slice(None) for run in runs)], order="C")
    return array[_index(array.shape, region)]


def _run_of(indices: npt.NDArray[np.int64]) -> slice | None:
    """Return the slice of these indices, if there is none missing between them."""
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first == len(indices) - 1 else None


def cut_state(state: State, regions: Regions) -> State:
    """Copy the regions of a state; arrays without one are not copied."""
    if not regions:
        return state
    return {name: cut_array(a, regions.get(name)) for name, a in state.items()}


def check_sums(
    sums: Sums, current: State, regions: Regions, *, most_weight: int
) -> None:
    """Raise ``EdgeError`` for sums that cannot be of clients with these regions.

    NumPy would stretch an array of another shape over a region.
    """
    for name, each in sums.items():
        shape: tuple[int, ...] | None = None
        if name in current:
            array, region = current[name], regions.get(name, ())
            kept = [None if axis is None else len(axis) for axis in region]
            sizes = zip_longest(kept, array.shape)
            shape = tuple(own if part is None else part for part, own in sizes)
            shape += (2,) * np.iscomplexobj(array)  # Complex ones are pairs.
        shapes = {np.shape(each.high), np.shape(each.low)}
        if shapes != {shape} or not 0 < each.weight <= most_weight:
            raise EdgeError(
                f"an edge's sum of {name!r} has shape {np.shape(each.high)} and weight "
                f"{each.weight}, where {shape} and up to {most_weight} can be: its "
                "clients are dropped from the round. Use one version everywhere."
            )


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
    for weight, at in _by_weight(weights):
        merged[at] = WeightedSum(high[at], low[at], weight).mean(array.dtype)
    return merged


def _by_weight(weights: npt.NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
    """Index the values of each weight; those of weight 0 are nobody's."""
    flat = weights.reshape(-1)
    order = np.argsort(flat, kind="stable")
    starts = np.flatnonzero(np.diff(flat[order], prepend=-1))
    for start, stop in pairwise([*starts, len(order)]):
        weight = int(flat[order[start]])
        if weight:
            yield weight, np.unravel_index(order[start:stop], weights.shape)


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
