"""Drop weak: federated averaging over the devices that can hold the whole model.

What is usually done about memory limits, and the baseline SmartSplit is measured
against. It is SmartSplit without an edge: who has no route sits out.

References
----------
McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of
Deep Networks from Decentralized Data. AISTATS 2017. arXiv:1602.05629.
"""

from flwr_smartsplit.plan.selection.selection import select_at_random
from simulations.methods.method import NO_RECOMPUTE, Method, split_strategy

DROP_WEAK = Method(
    name="drop_weak",
    summary="who cannot hold the whole model sits out",
    strategy_fn=lambda setting: split_strategy(
        setting, has_edges=False, constraints=NO_RECOMPUTE, select=select_at_random
    ),
)
