"""Fleets: how much memory each client may use, as shares of what the model needs.

Budgets are worked out from the predicted peaks of the model at hand, so one fleet
makes sense for a network of 40 thousand parameters and for one of 40 million. The
first half of the clients is the weak one, here and in ``partitions``.
"""

import math

HOPELESS_FRACTION = 0.5
"""Budget of the weakest client, as a share of the smallest possible peak."""

STRONGEST_FRACTION = 4.0
"""Budget of the strongest client, as a share of the whole model's peak."""

MARGIN_FRACTION = 1.02
"""Room above a peak that a client is meant to be able to hold."""


def weak_clients(num_clients: int) -> range:
    """Name the clients whose devices cannot hold the whole model: the first half."""
    return range(num_clients // 2)


def half_weak(
    whole_peak_bytes: int, smallest_peak_bytes: int, num_clients: int
) -> tuple[int | None, ...]:
    """Spread the budgets from hopeless over tight to ample.

    Client 0 has half of what the smallest possible part of the model needs, so it
    fits nothing. The other weak clients go in equal ratios from just enough for the
    smallest part up to just too little for the whole model; the strong ones from just
    enough for the whole model up to four times that.

    Parameters
    ----------
    whole_peak_bytes : int
        The most a device holds in a training step of the whole model.
    smallest_peak_bytes : int
        The least it can get by with, at the best cut.
    num_clients : int
        Size of the fleet.

    Returns
    -------
    tuple[int or None, ...]
        One budget per client, in bytes and in rising order.

    Examples
    --------
    >>> half_weak(1000, 100, 6)
    (50, 102, 980, 1020, 2020, 4000)
    """
    num_weak = len(weak_clients(num_clients))
    lowest = smallest_peak_bytes * MARGIN_FRACTION
    highest = max(whole_peak_bytes / MARGIN_FRACTION, lowest)
    weak = _ratios(lowest, highest, num_weak - 1)
    strong = _ratios(
        whole_peak_bytes * MARGIN_FRACTION,
        whole_peak_bytes * STRONGEST_FRACTION,
        num_clients - num_weak,
    )
    return (int(smallest_peak_bytes * HOPELESS_FRACTION), *weak, *strong)


def unlimited(
    whole_peak_bytes: int, smallest_peak_bytes: int, num_clients: int
) -> tuple[int | None, ...]:
    """Give nobody a limit: the control in which every method is FedAvg.

    Examples
    --------
    >>> unlimited(1000, 100, 3)
    (None, None, None)
    """
    del whole_peak_bytes, smallest_peak_bytes
    return (None,) * num_clients


def _ratios(lowest: float, highest: float, count: int) -> tuple[int, ...]:
    """Go from lowest to highest in ``count`` equal ratios.

    Examples
    --------
    >>> _ratios(1, 100, 3)
    (1, 10, 100)
    """
    if count == 1:
        return (int(lowest),)
    step = math.log(highest / lowest) / max(count - 1, 1)
    return tuple(round(lowest * math.exp(step * index)) for index in range(count))
