"""HeteroFL on the package's variants: real narrow models of any model that is traced.

The widest slice that a device can hold whole, the first channels of each layer, a mean
value by value. Beside ``heterofl``, which masks foreign classes and knows the small
networks only, this is the method without labels at the server. As there, clients count
by their number of examples.

References
----------
Diao, Ding, Tarokh: HeteroFL: Computation and Communication Efficient Federated Learning
for Heterogeneous Clients. ICLR 2021. arXiv:2010.01264.
"""

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import Widths
from flwr_smartsplit.plan.selection.selection import select_at_random
from simulations.methods.heterofl import WIDTHS
from simulations.methods.method import NO_RECOMPUTE, Method, Setting, split_strategy


def width_strategy(setting: Setting, *, roll: bool = False) -> Strategy:
    """Build the strategy that gives each client the widest slice it can hold."""
    return split_strategy(
        setting,
        has_edges=False,
        constraints=NO_RECOMPUTE,
        select=select_at_random,
        variants=Widths(WIDTHS, roll=roll),
    )


HETEROFL_WIDTHS = Method(
    name="heterofl_widths",
    summary="weak devices train a slice of the channels, of any model",
    strategy_fn=width_strategy,
)
