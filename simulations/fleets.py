"""Fleets: how much memory each client may use, as shares of what the model needs.

Budgets are worked out from the predicted peaks of the model at hand, so one fleet
makes sense for a network of 40 thousand parameters and for one of 40 million. The
first half of the clients is the weak one, here and in ``partitions``.

These fleets say nothing of speed, so that the clock takes every device for the same
``NOMINAL`` one. ``phones`` has devices that differ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from flwr_smartsplit.types import EDGE, NO_TRAITS, DeviceTraits

HOPELESS_FRACTION = 0.5
"""Budget of the weakest client, as a share of the smallest possible peak."""

STRONGEST_FRACTION = 4.0
"""Budget of the strongest client, as a share of the whole model's peak."""

MARGIN_FRACTION = 1.02
"""Room above a peak that a client is meant to be able to hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watts:
    """What a device takes while it works, above what it takes when idle.

    Parameters
    ----------
    compute : float
        While it trains.
    radio : float
        While it sends or receives.
    """

    compute: float = 4.0
    radio: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a fleet is made for.

    Parameters
    ----------
    whole_peak_bytes : int
        The most a device holds in a training step of the whole model.
    smallest_peak_bytes : int
        The least it can get by with, at the best cut.
    edges : tuple[str, ...]
        Names of the edges, to which devices may have links of their own.
    """

    whole_peak_bytes: int
    smallest_peak_bytes: int
    edges: tuple[str, ...] = (EDGE,)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetDevice:
    """One simulated device.

    Parameters
    ----------
    name : str
        What kind of device it is.
    budget_bytes : int or None
        What its tensors may take when a round begins; None is no limit.
    traits : DeviceTraits
        The speed and the links that it declares.
    free_memory : tuple[float, ...]
        Its budget over ``budget_bytes`` from step to step of a round, over and over;
        empty for a budget that stays. The first is 1.
    speed : tuple[float, ...]
        Its true speed over the declared one from round to round, over and over; empty
        for a device that is always as fast as it says.
    watts : Watts
        What it takes.
    """

    name: str
    budget_bytes: int | None
    traits: DeviceTraits = NO_TRAITS
    free_memory: tuple[float, ...] = ()
    speed: tuple[float, ...] = ()
    watts: Watts = Watts()

    def speed_in(self, round_number: int) -> float:
        """Return its true speed in a round, over the declared one.

        Examples
        --------
        >>> FleetDevice(name="old", budget_bytes=None, speed=(1.0, 0.5)).speed_in(2)
        0.5
        """
        if not self.speed:
            return 1.0
        return self.speed[(round_number - 1) % len(self.speed)]


Devices = tuple[FleetDevice, ...]

Fleet = Callable[[Needs, int, int], Devices]
"""``fleet(needs, num_clients, seed)`` makes the devices, the least memory first."""


def weak_clients(num_clients: int) -> range:
    """Name the clients whose devices cannot hold the whole model: the first half."""
    return range(num_clients // 2)


def is_weak(device: FleetDevice, needs: Needs) -> bool:
    """Say whether a device cannot hold the whole model."""
    budget_bytes = device.budget_bytes
    return budget_bytes is not None and budget_bytes < needs.whole_peak_bytes


def half_weak(needs: Needs, num_clients: int, seed: int = 0) -> Devices:
    """Spread the budgets from hopeless over tight to ample.

    Client 0 has half of what the smallest possible part of the model needs, so it
    fits nothing. The other weak clients go in equal ratios from just enough for the
    smallest part up to just too little for the whole model; the strong ones from just
    enough for the whole model up to four times that.

    Parameters
    ----------
    needs : Needs
        What the model takes.
    num_clients : int
        Size of the fleet.
    seed : int
        Not used: nothing here is chance.

    Examples
    --------
    >>> needs = Needs(whole_peak_bytes=1000, smallest_peak_bytes=100)
    >>> [device.budget_bytes for device in half_weak(needs, 6)]
    [50, 102, 980, 1020, 2020, 4000]
    """
    del seed
    num_weak = len(weak_clients(num_clients))
    lowest = needs.smallest_peak_bytes * MARGIN_FRACTION
    highest = max(needs.whole_peak_bytes / MARGIN_FRACTION, lowest)
    weak = _ratios(lowest, highest, num_weak - 1)
    strong = _ratios(
        needs.whole_peak_bytes * MARGIN_FRACTION,
        needs.whole_peak_bytes * STRONGEST_FRACTION,
        num_clients - num_weak,
    )
    hopeless = int(needs.smallest_peak_bytes * HOPELESS_FRACTION)
    return _nominal((hopeless, *weak, *strong))


def unlimited(needs: Needs, num_clients: int, seed: int = 0) -> Devices:
    """Give nobody a limit: the control in which every method is FedAvg.

    Examples
    --------
    >>> needs = Needs(whole_peak_bytes=1000, smallest_peak_bytes=100)
    >>> [device.budget_bytes for device in unlimited(needs, 3)]
    [None, None, None]
    """
    del needs, seed
    return _nominal((None,) * num_clients)


def _nominal(budgets_bytes: tuple[int | None, ...]) -> Devices:
    """Make devices that say nothing of themselves but their budgets."""
    return tuple(FleetDevice(name="nominal", budget_bytes=b) for b in budgets_bytes)


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
