"""Label coverage: how well the examples of some clients stand for all examples."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def divergence(counts: Floats, target: Floats) -> Floats:
    """Compare label counts with a distribution: Jensen-Shannon, in nats.

    Parameters
    ----------
    counts : ndarray
        Examples per class, shape (..., classes); a row of zeros is as far as can be.
    target : ndarray
        A distribution, shape (classes,).

    Returns
    -------
    ndarray
        Shape (...,), from 0 (alike) to log 2 (no class in common).

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

    Parameters
    ----------
    covered : ndarray
        Examples per class of the clients chosen so far, shape (classes,).
    counts : ndarray
        Of each other client, shape (clients, classes).
    target : ndarray
        The distribution to come close to, shape (classes,).
    """
    before = divergence(covered, target)
    gains: Floats = before - divergence(covered + counts, target)
    return gains
