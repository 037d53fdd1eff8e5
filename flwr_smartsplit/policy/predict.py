"""Read a route's memory off a chain's profile."""

from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.types import DEVICE, ChainProfile, Route


def predicted_peak_bytes(profile: ChainProfile, route: Route) -> int:
    """Predict the most a device holds during a training step of its route.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size and optimizer.
    route : Route
        Whole, or one that leaves the device once.

    Returns
    -------
    int
        Bytes, equal to what the meter measures from the second step on
        (`docs/memory-model.md`).

    Raises
    ------
    InvalidRoute
        If a cut lies outside the chain, or the route comes back to the device.
    """
    if route.places.count(DEVICE) > 1:
        raise InvalidRoute(
            f"route {route} has several segments on the device; what they hold "
            "together is not known yet. Choose a route that leaves the device once."
        )
    first = route.legs(len(profile.units))[0]
    return profile.units[first.stop - 1].device_peak_bytes
