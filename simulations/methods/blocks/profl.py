"""ProFL's growing: the network is trained one block after the other.

``profl`` has no edges: a device below the present step's need sits the step out, as in
the paper. ``profl_routes`` lets it train the step along a split route. Rounds are
divided evenly among the blocks. Not here is the paper's first half, shrinking.

References
----------
Wu et al.: ProFL: Breaking the Memory Wall for Heterogeneous Federated Learning via
Progressive Training. KDD 2025. arXiv:2404.13349.
"""

from functools import partial

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import Progressive
from flwr_smartsplit.plan.selection.selection import select_at_random
from flwr_smartsplit.split.build import build_chain
from simulations.methods.method import NO_RECOMPUTE, Method, Setting, split_strategy


def growing(setting: Setting) -> Progressive:
    """Divide the simulations' networks before each convolution and the last pooling."""
    names = build_chain(setting.task).unit_names
    ends = [at for at, name in enumerate(names) if at and name.startswith("conv")]
    ends.append(names.index("pool"))
    each, rest = divmod(setting.experiment.num_rounds, len(ends))
    pace = tuple(each + (at < rest) for at in range(len(ends)))
    return Progressive(tuple(ends), pace=tuple(max(1, n) for n in pace))


def build_strategy(setting: Setting, *, has_edges: bool = False) -> Strategy:
    """Build the strategy that trains block by block."""
    return split_strategy(
        setting,
        has_edges=has_edges,
        constraints=NO_RECOMPUTE,
        select=select_at_random,
        variants=growing(setting),
    )


PROFL = Method(
    name="profl",
    summary="the model is trained block by block, by whom each block's step fits",
    strategy_fn=build_strategy,
)
PROFL_ROUTES = Method(
    name="profl_routes",
    summary="block by block, and a step that does not fit is split",
    strategy_fn=partial(build_strategy, has_edges=True),
)
