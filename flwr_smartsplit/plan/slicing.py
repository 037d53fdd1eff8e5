"""Which fronts a device may run in slices of a batch."""

from collections.abc import Sequence

from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.types import Route


def deepest_sliced_cut(is_samplewise: Sequence[bool]) -> int:
    """Tell the last cut whose front may run slice by slice; 0 if there is none.

    Parameters
    ----------
    is_samplewise : Sequence[bool]
        For each unit of a chain, whether it treats samples one by one.

    Examples
    --------
    >>> deepest_sliced_cut([True, True, False, True])
    2
    """
    front = list(is_samplewise[:-1])  # No cut is after the last unit.
    return front.index(False) if False in front else len(front)


def require_sliceable(
    route: Route, slice_size: int, is_samplewise: Sequence[bool]
) -> None:
    """Make sure that a route's front can run in slices of so many samples.

    Parameters
    ----------
    route : Route
        Where the segments run.
    slice_size : int
        Samples per slice.
    is_samplewise : Sequence[bool]
        For each unit of the chain, whether it treats samples one by one.

    Raises
    ------
    ValueError
        If a slice has no samples.
    InvalidRoute
        If the route does not end at an edge, or a unit of its front mixes samples.
    """
    if slice_size < 1:
        raise ValueError(f"slice_size is {slice_size}: give at least 1, or None.")
    if not route.cuts or route.returns:
        raise InvalidRoute(
            f"route {route} cannot be sliced: the loss, which is one of all samples, "
            "is on the device. Use Route.split or Route.hops, or no slice_size."
        )
    deepest = deepest_sliced_cut(is_samplewise)
    if route.cuts[0] > deepest:
        raise InvalidRoute(
            f"route {route} cannot be sliced: unit {deepest} is not known to treat "
            f"samples one by one. Cut at {deepest} or before, or use no slice_size.",
            cut=route.cuts[0],
            deepest_cut=deepest,
        )
