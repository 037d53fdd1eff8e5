"""Fleets: how much memory each client may use, as shares of what the model needs.

Budgets are worked out from the predicted peaks of the model at hand, so one fleet
makes sense for a network of 40 thousand parameters and for one of 40 million. The
first half of the clients is the weak one, here and in ``partitions``.

``half_weak`` and ``unlimited`` say nothing of speed and links, and the clock takes all
their devices for the same, nominal phone. ``phones`` and ``phones_near_edge`` are
measured phones, each with a speed and links of its own.
"""

import math

from flwr_smartsplit.types import Link
from simulations.fleets.devices import Devices, Fleet, FleetDevice, Needs
from simulations.fleets.phones import Phones
from simulations.fleets.whale import whale_devices

HOPELESS_FRACTION = 0.5
"""Budget of the weakest client, as a share of the smallest possible peak."""

STRONGEST_FRACTION = 4.0
"""Budget of the strongest client, as a share of the whole model's peak."""

MARGIN_FRACTION = 1.02
"""Room above a peak that a client is meant to be able to hold."""


def weak_clients(num_clients: int) -> range:
    """Name the clients whose devices cannot hold the whole model: the first half."""
    return range(num_clients // 2)


def half_weak(needs: Needs, num_clients: int, seed: int = 0) -> Devices:
    """Spread the budgets from hopeless over tight to ample.

    Client 0 has half of what the smallest possible part of the model needs, so it
    fits nothing. The other weak clients go in equal ratios from just enough for the
    smallest part up to just too little for the whole model; the strong ones from just
    enough for the whole model up to four times that.
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
    """Give nobody a limit: the control in which every method is FedAvg."""
    del needs, seed
    return _nominal((None,) * num_clients)


phones = Phones()
"""Measured phones and links; edges are reached over the same link as the server."""

NEAR_LINK = Link(
    up_bytes_per_second=6.25e6, down_bytes_per_second=6.25e6, latency_seconds=0.005
)
"""An assumption: 50 Mbit/s of a wireless network with the edge in it."""

phones_near_edge = Phones(edge_link=NEAR_LINK)
"""The same phones with an edge nearby."""

moving_phones = Phones(link_deviation=0.37)
"""The phones, whose links give more or less than they say from round to round, as far
as the median link of ``links.csv``."""

heavy_phones = Phones(edge_link=NEAR_LINK, slowdown=32.0)
"""The same, for which the network for digits is as much work as ResNet-18 for 32 x 32:
108 million FLOPs a step with 16 images, and 3,477 million."""

FLEETS: dict[str, Fleet] = {
    "half_weak": half_weak,
    "unlimited": unlimited,
    "phones": phones,
    "phones_near_edge": phones_near_edge,
    "moving_phones": moving_phones,
    "heavy_phones": heavy_phones,
    "whale_devices": whale_devices,
}


def name_of(fleet: Fleet) -> str:
    """Return a fleet's name, or all its settings if it has none.

    Examples
    --------
    >>> name_of(Phones()), name_of(Phones(weak_fraction=None))[:26]
    ('phones', 'Phones(weak_fraction=None,')
    """
    names = [name for name, known in FLEETS.items() if known == fleet]
    return names[0] if names else getattr(fleet, "__name__", repr(fleet))


def _nominal(budgets_bytes: tuple[int | None, ...]) -> Devices:
    """Make devices that say nothing of themselves but their budgets."""
    return tuple(FleetDevice(name="nominal", budget_bytes=b) for b in budgets_bytes)


def _ratios(lowest: float, highest: float, count: int) -> tuple[int, ...]:
    """Go from lowest to highest in ``count`` equal ratios."""
    if count == 1:
        return (int(lowest),)
    step = math.log(highest / lowest) / max(count - 1, 1)
    return tuple(round(lowest * math.exp(step * index)) for index in range(count))
