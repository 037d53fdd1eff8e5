"""Drop weak: federated averaging over the devices that can hold the whole model.

What is usually done about memory limits, and the baseline SmartSplit is measured
against. It is SmartSplit without an edge: who has no route sits out.

References
----------
McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of
Deep Networks from Decentralized Data. AISTATS 2017. arXiv:1602.05629.
"""

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit.plan.selection.selection import select_at_random
from simulations.methods.method import Method, Setting
from simulations.methods.splitting import NO_RECOMPUTE, split_strategy


def build_strategy(setting: Setting) -> Strategy:
    """Build the strategy that leaves weak devices out."""
    return split_strategy(
        setting, has_edges=False, constraints=NO_RECOMPUTE, select=select_at_random
    )


DROP_WEAK = Method(
    name="drop_weak",
    summary="who cannot hold the whole model sits out",
    strategy_fn=build_strategy,
)
