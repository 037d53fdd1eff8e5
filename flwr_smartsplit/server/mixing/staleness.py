"""Mixings by staleness: the older the state a reply began with, the less it counts.

They see means of whole states, wherever the parts were trained, so a client's front and
its tail at an edge get one weight.
"""

from dataclasses import dataclass, fields
from math import isfinite, sqrt
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.server.aggregation import RoundSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class PolynomialStaleness:
    """Let a reply count ``alpha * (1 + staleness) ** -power``, as FedAsync does.

    Parameters
    ----------
    alpha : float
        How much a fresh reply counts, above 0 and at most 1.
    power : float
        How fast that falls with staleness; 0 for not at all.

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    Xie, Koyejo, Gupta: Asynchronous Federated Optimization, OPT 2020,
    arXiv:1903.03934, its polynomial function.

    Examples
    --------
    >>> from flwr_smartsplit.server.aggregation import RoundSummary
    >>> old = RoundSummary(round_number=9, staleness=3, reports={})
    >>> PolynomialStaleness(alpha=0.6, power=0.5).weight(old)
    0.3
    """

    alpha: float = 0.6
    power: float = 0.5

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}: give a number above 0, up to 1.")

    def weight(self, summary: RoundSummary) -> float:
        """Return how much the mean counts, above 0 and at most 1."""
        return float(self.alpha * (1 + summary.staleness) ** -self.power)

    def mix(self, current: State, mean: State, summary: RoundSummary) -> State:
        """Go a part of the way from the current state to the mean."""
        return mixed(current, mean, self.weight(summary), maker=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicStaleness:
    """Let a reply count by its staleness and the age of the run, as FedASMU does.

    ``xi = lambda_ / sqrt(t * s ** sigma) + iota``, and the mean counts
    ``mu * xi / (1 + mu * xi)``, where ``t`` counts merges from 1 and ``s`` is the
    staleness plus 1.

    Parameters
    ----------
    lambda_ : float
        How much fresh replies count more, at least 0.
    sigma : float
        How fast that falls with staleness, at least 0.
    iota : float
        What every reply counts at least, however old it or the run is. With 0, as
        published, replies count less and less as the run goes on.
    mu : float
        Factor of all, above 0.

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    Liu et al.: FedASMU: Efficient Asynchronous Federated Learning with Dynamic
    Staleness-aware Model Update, AAAI 2024, arXiv:2312.05770, equations 1 and 2.

    Examples
    --------
    >>> from flwr_smartsplit.server.aggregation import RoundSummary
    >>> old = RoundSummary(round_number=4, staleness=3, reports={})
    >>> DynamicStaleness.as_published().weight(old)
    0.2
    """

    lambda_: float = 1.0
    sigma: float = 1.0
    iota: float = 0.3
    mu: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        if self.mu <= 0 or self.lambda_ + self.iota <= 0:
            raise ValueError(
                f"mu is {self.mu}, lambda_ {self.lambda_} and iota {self.iota}: mu, "
                "and one of the others, must be above 0, or nothing is ever learned."
            )

    @classmethod
    def as_published(cls) -> Self:
        """Return the coefficients that the published equations begin with."""
        return cls(iota=0.0)

    def weight(self, summary: RoundSummary) -> float:
        """Return how much the mean counts, above 0 and below 1."""
        age = summary.round_number * (1 + summary.staleness) ** self.sigma
        xi = self.lambda_ / sqrt(age) + self.iota
        return float(self.mu * xi / (1 + self.mu * xi))

    def mix(self, current: State, mean: State, summary: RoundSummary) -> State:
        """Go a part of the way from the current state to the mean."""
        return mixed(current, mean, self.weight(summary), maker=self)


def mixed(
    current: State, mean: State, weight: float, *, maker: object = "a mixing"
) -> State:
    """Go a share of the way from one state to another, in float64, cast once.

    At 0 nothing changes and at 1 all does, bit for bit; nor does a value that is equal
    in both. Whole numbers are truncated, as a mean of them is.

    Parameters
    ----------
    current, mean : Mapping[str, ndarray]
        States with the same names and shapes.
    weight : float
        The share, from 0 to 1.
    maker : object
        Who says so, for the error.

    Raises
    ------
    SmartSplitError
        If the weight is no number from 0 to 1.
    """
    if not 0 <= weight <= 1:
        raise SmartSplitError(
            f"{maker!r} gives a mean the weight {weight}: return a number from 0 "
            "(the state stays) to 1 (the mean replaces it)."
        )
    if weight in (0, 1):
        return dict(mean if weight else current)
    return {name: _between(each, mean[name], weight) for name, each in current.items()}


def _between(
    one: npt.NDArray[Any], other: npt.NDArray[Any], weight: float
) -> npt.NDArray[Any]:
    wide = np.result_type(one.dtype, np.float64)
    with np.errstate(invalid="ignore"):  # Infinities that are equal stay.
        there = one.astype(wide) + weight * (other.astype(wide) - one.astype(wide))
        made = np.asarray(there.astype(one.dtype))
    return np.asarray(np.where(one == other, one, made))


def _check(mixing: PolynomialStaleness | DynamicStaleness) -> None:
    for each in fields(mixing):
        value = getattr(mixing, each.name)
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"{each.name} is {value}: give a number of at least 0.")
