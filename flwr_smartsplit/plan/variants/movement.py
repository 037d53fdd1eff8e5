"""Effective movement: how straight a block's parameters move, and when that has ended.

References
----------
.. [1] Wu et al., "ProFL", KDD 2025, arXiv:2404.13349, and its published code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_SCALARS = 10_000
"""Of a block's parameters that are looked at, as in ProFL's code."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """Freeze a block when its effective movement no longer falls.

    Parameters
    ----------
    window : int
        Rounds over which movement is measured, and its values over which the slope is.
    slope : float
        A block has ended if the slope of a least-squares line through the last
        ``window`` values, over a window of length 1, is smaller than this,
    patience : int
        in so many rounds one after the other.
    least_rounds : int
        Fewest rounds of a block.
    most_rounds : int, optional
        Most rounds of a block, whatever its movement.

    Raises
    ------
    ValueError
        If a number is too small, or the bounds exclude each other.

    Notes
    -----
    The numbers are those of ProFL's configuration [1]_; how they make a rule is not
    published. With fewer rounds than ``window + patience`` a block never ends by
    itself: give ``most_rounds``, or a pace.
    """

    window: int = 20
    slope: float = 0.2
    patience: int = 15
    least_rounds: int = 1
    most_rounds: int | None = None

    def __post_init__(self) -> None:
        most = self.least_rounds if self.most_rounds is None else self.most_rounds
        if (
            self.window < 2  # noqa: PLR2004 - no line goes through one value
            or self.patience < 1
            or not self.slope > 0
            or not 1 <= self.least_rounds <= most
        ):
            raise ValueError(
                f"{self!r}: give window >= 2, patience >= 1, slope > 0 and 1 <= "
                "least_rounds <= most_rounds."
            )

    def has_ended(self, movements: Sequence[float], num_rounds: int) -> bool:
        """Say whether a block with these movements is to be frozen.

        Examples
        --------
        >>> rule = Movement(window=2, patience=2)
        >>> rule.has_ended([0.9, 0.5], 3), rule.has_ended([0.5, 0.5, 0.5], 4)
        (False, True)
        """
        if self.most_rounds is not None and num_rounds >= self.most_rounds:
            return True
        needed = self.window + self.patience - 1
        if num_rounds < self.least_rounds or len(movements) < needed:
            return False
        ends = range(len(movements) - self.patience + 1, len(movements) + 1)
        slopes = [slope_of(movements[end - self.window : end]) for end in ends]
        return all(abs(each) < self.slope for each in slopes)


def slope_of(values: Sequence[float]) -> float:
    """Fit a line through values that lie evenly from 0 to 1; return its slope.

    Examples
    --------
    >>> round(slope_of([0.9, 0.7, 0.5]), 6)
    -0.4
    """
    at = np.linspace(0, 1, len(values)) - 0.5
    return float(at @ np.asarray(values, dtype=np.float64) / (at @ at))


def effective_movement(states: Sequence[Array]) -> float:
    """Divide how far states got by how far they went, in the L1 norm.

    1 is a straight line, 0 no progress; states that never move have 0.

    Parameters
    ----------
    states : Sequence[ndarray]
        The parameters after each round, ``(scalars,)`` each, the oldest first.

    Examples
    --------
    >>> one, two = np.zeros(3), np.ones(3)
    >>> effective_movement([one, two, 2 * two]), effective_movement([one, two, one])
    (1.0, 0.0)
    """
    steps = [float(np.abs(b - a).sum()) for a, b in pairwise(states)]
    length = sum(steps)
    return float(np.abs(states[-1] - states[0]).sum()) / length if length else 0.0


def noted(
    memory: Mapping[str, Any],
    state: Mapping[str, Array],
    names: Sequence[str],
    *,
    window: int,
) -> dict[str, Any]:
    """Add a round to what is remembered of a block: ``states`` and ``movements``."""
    states = [*memory.get("states", ()), scalars_of(state, names)][-window - 1 :]
    movements = list(memory.get("movements", ()))
    if len(states) > 1:
        movements.append(effective_movement(states))
    return {"states": states, "movements": movements}


def scalars_of(state: Mapping[str, Array], names: Sequence[str]) -> Array:
    """Take at most ``MAX_SCALARS`` of some arrays' values, evenly, as float64."""
    flat = [np.asarray(state[name]).reshape(-1) for name in names]
    values = np.concatenate(flat).astype(np.float64) if flat else np.zeros(0)
    return values[:: max(1, -(-len(values) // MAX_SCALARS))]
