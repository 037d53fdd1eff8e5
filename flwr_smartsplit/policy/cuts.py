"""Which routes fit a memory budget, and which of them to take.

The first policy: the deepest route that fits, since it leaves most of the model
and the least leaky boundary on the device. Peaks do not grow evenly with depth
(a pooled boundary can cost less than the one before it), so every cut is tried.
"""

from flwr_smartsplit.errors import NoFeasibleRoute, bytes_text
from flwr_smartsplit.policy.predict import predicted_peak_bytes
from flwr_smartsplit.types import ChainProfile, Route


def deepest_route(
    profile: ChainProfile, *, budget_bytes: int | None, edge: str | None
) -> Route:
    """Choose the route that keeps the most units on the device within its budget.

    Parameters
    ----------
    profile : ChainProfile
        Exact costs at the client's batch size.
    budget_bytes : int or None
        What its tensors may take; None means no limit.
    edge : str or None
        The edge that may host the rest; None allows whole models only.

    Returns
    -------
    Route
        Whole if that fits, else the deepest split that does.

    Raises
    ------
    NoFeasibleRoute
        With the least bytes that would do.
    """
    if budget_bytes is None:
        return Route.whole()
    routes = [Route.whole()]
    if edge is not None:
        deepest = len(profile.units) - 1
        routes += [Route.split(cut, edge=edge) for cut in range(deepest, 0, -1)]
    peaks = [predicted_peak_bytes(profile, route) for route in routes]
    for route, peak in zip(routes, peaks, strict=True):
        if peak <= budget_bytes:
            return route
    least = min(peaks)
    cheapest = routes[peaks.index(least)]
    raise NoFeasibleRoute(
        f"no route fits: the cheapest ({cheapest}) needs {bytes_text(least)} "
        f"at batch size {profile.batch_size}, the budget is "
        f"{bytes_text(budget_bytes)}. Lower the batch size"
        f"{', give the strategy an edge' if edge is None else ''} or raise the budget.",
        needed_bytes=least,
        budget_bytes=budget_bytes,
    )
