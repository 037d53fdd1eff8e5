"""SplitFed: every device trains the same front of the model, an edge the rest.

Its first version, with a copy of the rest for each client, merged at the end of the
round. The one cut is the one that the most devices can hold.

References
----------
Thapa, Chamikara, Camtepe, Sun: SplitFed: When Federated Learning Meets Split Learning.
AAAI 2022. arXiv:2004.12088.
"""

from collections.abc import Callable

from flwr_smartsplit import Route, RouteRequest, predicted_peak_bytes
from flwr_smartsplit.plan.selection.selection import select_at_random
from simulations.methods.method import NO_RECOMPUTE, Method, Setting, split_strategy


def one_cut_for_all(setting: Setting) -> Callable[[RouteRequest], Route]:
    """Return a rule that cuts every model where the least memory is needed."""
    profile = setting.clock.profile
    cuts = range(1, len(profile.units))
    cut = min(cuts, key=lambda cut: predicted_peak_bytes(profile, Route.split(cut)))
    return lambda request: Route.split(cut, edge=request.edge or "")


SPLITFED = Method(
    name="splitfed",
    summary="one cut for all: every device trains the same front",
    strategy_fn=lambda setting: split_strategy(
        setting,
        select=select_at_random,
        choose_route=one_cut_for_all(setting),
        constraints=NO_RECOMPUTE,
    ),
)
