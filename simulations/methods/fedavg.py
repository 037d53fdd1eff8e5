"""FedAvg: everybody trains the whole model, whatever its memory.

Flower's own strategy on devices without a limit: the ceiling that methods for weak
devices are measured against, and no answer to them.

References
----------
McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of
Deep Networks from Decentralized Data. AISTATS 2017. arXiv:1602.05629.
"""

from simulations.methods.method import Method
from simulations.methods.stock import build_strategy

FEDAVG = Method(
    name="fedavg",
    summary="everybody trains the whole model, budgets ignored",
    strategy_fn=build_strategy,
)
