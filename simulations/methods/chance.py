"""Random: any clients, each on any route that its memory allows.

What a choice by utility has to beat.
"""

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit.plan.placement import Places
from flwr_smartsplit.plan.selection.selection import (
    EDGES_FULL,
    NOT_SAMPLED,
    Selection,
    SelectionRequest,
    place,
    sample_clients,
)
from simulations.methods.method import Method, Setting
from simulations.methods.splitting import split_strategy


def random_routes(request: SelectionRequest) -> Selection:
    """Draw clients, and for each of them one of the offers that fit."""
    candidates = request.candidates
    passed = {each.device.client_key: NOT_SAMPLED for each in candidates}
    drawn = sample_clients(
        list(passed), num_clients=request.num_clients, rng=request.rng
    )
    places, chosen = Places(request.edges), []
    for index, each in enumerate(candidates):
        key = each.device.client_key
        if key not in drawn:
            continue
        wanted = [int(offer) for offer in each.fits]
        request.rng.shuffle(wanted)
        placed = place(each, wanted, places, request.home(index))
        if placed is None:
            passed[key] = EDGES_FULL
        else:
            chosen.append(placed)
            del passed[key]
    return Selection(chosen=chosen, passed=passed)


def build_strategy(setting: Setting) -> Strategy:
    """Build the strategy that leaves clients and routes to chance."""
    return split_strategy(setting, select=random_routes, refine=False)


RANDOM = Method(
    name="random",
    summary="any clients, each on any route that fits",
    strategy_fn=build_strategy,
)
