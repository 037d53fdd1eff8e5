"""Nested states: the part of a model that a smaller one holds, and their mean.

A smaller model holds some of the whole one's arrays, and of each the first values
along every axis. Pure functions of arrays; which model is how large is said elsewhere.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

State = Mapping[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one client trained, and how much it counts."""

    state: State  # Its arrays, each with the first values of the whole one
    weight: int  # Its weight, such as its number of examples
    # The rows of an array that it trained, by name; all of them if not given
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def cut_state(state: State, shapes: Shapes) -> dict[str, npt.NDArray[Any]]:
    """Take the part of a state that a smaller model holds.

    Examples
    --------
    >>> cut_state({"w": np.arange(6).reshape(2, 3), "b": np.ones(1)}, {"w": (1, 2)})
    {'w': array([[0, 1]])}
    """
    return {name: state[name][_first(shape)].copy() for name, shape in shapes.items()}


def average_shares(
    state: State, shares: Iterable[Share]
) -> dict[str, npt.NDArray[Any]]:
    """Replace each value by its weighted mean over the clients that trained it.

    Sums are in float64 and rounded once; they are made in the order of the shares.

    Examples
    --------
    >>> small, large = {"w": np.float32([1])}, {"w": np.float32([4, 8])}
    >>> shares = [Share(state=small, weight=2), Share(state=large, weight=1)]
    >>> average_shares({"w": np.float32([0, 0, 7])}, shares)["w"]
    array([2., 8., 7.], dtype=float32)
    """
    sums = {name: np.zeros(array.shape) for name, array in state.items()}
    weights = {name: np.zeros(array.shape) for name, array in state.items()}
    for share in shares:
        for name, array in share.state.items():
            rows = list(share.rows.get(name, range(len(array))))
            held = _first(array.shape)
            sums[name][held][rows] += share.weight * array[rows].astype(np.float64)
            weights[name][held][rows] += share.weight
    return {
        name: np.divide(
            sums[name],
            weights[name],
            out=array.astype(np.float64),
            where=weights[name] > 0,
        ).astype(array.dtype)
        for name, array in state.items()
    }


def unusable(state: State, shapes: Shapes) -> list[str]:
    """Name what a client should not have sent, as SmartSplit refuses it, too.

    Examples
    --------
    >>> unusable({"a": np.ones(2), "b": np.array([np.nan])}, {"a": (2,), "b": (1,)})
    ['b']
    >>> unusable({"a": np.ones(2)}, {"a": (3,), "b": (1,)})
    ['a', 'b']
    """
    return [
        name
        for name in sorted({*state, *shapes})
        if name not in state
        or name not in shapes
        or state[name].shape != shapes[name]
        or not np.isfinite(state[name]).all()
    ]


def _first(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Select the first values along every axis."""
    return tuple(slice(size) for size in shape)
