"""Read a route's memory off a chain's profile."""

from flwr_smartsplit.types import ChainProfile, Route


def predicted_peak_bytes(profile: ChainProfile, route: Route) -> int:
    """Predict the most a device holds during a training step of its route.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size and optimizer.
    route : Route
        Any route of the chain.

    Returns
    -------
    int
        Bytes, equal to what the meter measures from the second step on
        (`docs/memory-model.md`).

    Raises
    ------
    InvalidRoute
        If a cut lies outside the chain.

    Notes
    -----
    A device that gets the last segment back holds both segments all the time. The
    first one's activations wait while the last one does its whole step; then the first
    goes backward as if nothing else were there.
    """
    first, *rest = route.device_legs(len(profile.units))
    head = profile.units[first.stop - 1]
    if not rest:
        return head.device_peak_bytes
    tail = profile.units[rest[0].start :]
    resident_bytes = sum(unit.resident_bytes for unit in tail)
    kept_bytes = sum(u.gradient_bytes for u in tail) if profile.updates_last else 0
    before = profile.batch_bytes + sum(
        unit.resident_bytes for unit in profile.units[: first.stop]
    )
    return resident_bytes + max(
        head.device_peak_bytes + kept_bytes,
        before + head.waiting_bytes + tail[0].return_bytes,
    )
