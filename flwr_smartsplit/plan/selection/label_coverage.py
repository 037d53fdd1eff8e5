"""Label coverage: how well the examples of some clients stand for all examples."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def divergence(counts: Floats, target: Floats) -> Floats:
    """Compare label counts with a distribution: Jensen-Shannon, in nats.

    From 0 (alike) to log 2 (no class in common, or no examples at all). Counts have
    shape (..., classes), the result (...,).

    Examples
    --------
    >>> divergence(np.array([[2.0, 2.0], [0.0, 0.0]]), np.array([0.5, 0.5])).round(3)
    array([0.   , 0.693])
    """
    totals = counts.sum(axis=-1, keepdims=True)
    shares = counts / np.maximum(totals, 1e-300)
    middle = (shares + target) / 2
    found = (_entropy_sum(shares, middle) + _entropy_sum(target, middle)) / 2
    return np.where(totals[..., 0] > 0, found, np.log(2.0))


def _entropy_sum(of: Floats, to: Floats) -> Floats:
    """Return the relative entropy, where 0 log 0 is 0."""
    ratio = np.where(of > 0, of / np.maximum(to, 1e-300), 1.0)
    found: Floats = (of * np.log(ratio)).sum(axis=-1)
    return found


def coverage_gains(covered: Floats, counts: Floats, target: Floats) -> Floats:
    """Say how much closer to the target each client would bring those chosen.

    ``covered`` has shape (classes,), ``counts`` of the other clients (clients,
    classes).
    """
    before = divergence(covered, target)
    gains: Floats = before - divergence(covered + counts, target)
    return gains
