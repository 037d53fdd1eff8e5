"""FedAvg: everybody trains the whole model, whatever its memory.

Flower's own strategy on devices without a limit: the ceiling that methods for weak
devices are measured against, and no answer to them.

References
----------
McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of
Deep Networks from Decentralized Data. AISTATS 2017. arXiv:1602.05629.
"""

from flwr.serverapp.strategy import FedAvg, Strategy

from simulations.methods.journalled import ASKED_BY_SAMPLER, Journalled
from simulations.methods.method import Method, Setting


def build_strategy(setting: Setting) -> Strategy:
    """Build Flower's FedAvg over everybody."""
    return Journalled(FedAvg(**ASKED_BY_SAMPLER), setting)


FEDAVG = Method(
    name="fedavg",
    summary="everybody trains the whole model, budgets ignored",
    strategy_fn=build_strategy,
)
