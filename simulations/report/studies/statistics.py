"""Statistics: means over seeds with their intervals, and differences seed by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean, and how far the truth may be from it."""

    mean: float  # Over the seeds
    half_width: float | None  # Half of the 95 % t interval; None with a single seed
    num: int  # Seeds

    def text(self, *, scale: float = 100.0, sign: str = "+") -> str:
        """Print mean and half width, in points if not told otherwise.

        Examples
        --------
        >>> Estimate(mean=0.0123, half_width=0.004, num=5).text()
        '+1.2 ± 0.4'
        """
        mean = f"{scale * self.mean:{sign}.1f}"
        if self.half_width is None:
            return mean
        return f"{mean} ± {scale * self.half_width:.1f}"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean with its t interval; None of nothing.

    Examples
    --------
    >>> estimate([0.1, 0.2, 0.3]).text()
    '+20.0 ± 24.8'
    """
    if not values:
        return None
    num = len(values)
    if num == 1:
        return Estimate(mean=values[0], half_width=None, num=1)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, num - 1))
    half_width = quantile * stdev(values) / math.sqrt(num)
    return Estimate(mean=fmean(values), half_width=half_width, num=num)


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float]
) -> Estimate | None:
    """Estimate ``first - second`` from the seeds that both have.

    Examples
    --------
    >>> paired_difference({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.6}).text()
    '+10.0 ± 0.0'
    """
    return estimate([first[seed] - second[seed] for seed in first if seed in second])


def geometric_mean_ratio(
    first: Mapping[int, float], second: Mapping[int, float]
) -> float | None:
    """Return the geometric mean of ``first / second`` over the seeds that both have.

    Examples
    --------
    >>> geometric_mean_ratio({0: 1.0, 1: 8.0}, {0: 2.0, 1: 4.0})
    1.0
    """
    logs = [
        math.log(first[seed] / second[seed])
        for seed in first
        if seed in second and first[seed] > 0 and second[seed] > 0
    ]
    return math.exp(fmean(logs)) if logs else None
