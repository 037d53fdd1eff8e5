"""Random: any clients, each on any route that its memory allows.

What a choice by utility has to beat.
"""

from flwr_smartsplit import Selection, SelectionRequest
from flwr_smartsplit.plan.selection.candidates import Candidate
from flwr_smartsplit.plan.selection.selection import sampled
from flwr_smartsplit.types import RouteOption
from simulations.methods.method import Method, split_strategy


def random_routes(request: SelectionRequest) -> Selection:
    """Draw clients, and for each of them one of the options that fit."""

    def shuffled(candidate: Candidate) -> list[RouteOption]:
        options = list(candidate.options)
        request.rng.shuffle(options)
        return options

    return request.take(sampled(request), shuffled)


RANDOM = Method(
    name="random",
    summary="any clients, each on any route that fits",
    strategy_fn=lambda setting: split_strategy(setting, select=random_routes),
)
