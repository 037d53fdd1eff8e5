"""FedDUMAP: FedDU with momentum, and the model is pruned once on the way (FedAP).

References
----------
Liu et al.: Efficient Federated Learning Using Dynamic Update and Adaptive Pruning with
Momentum on Shared Server Data. ACM TIST 2024. arXiv:2408.05678. What differs:
``docs/howto/pruning.md``.
"""

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import Momentum, PruneAt, select_at_random
from simulations.methods.method import Method, Setting, split_strategy
from simulations.methods.server_steps.feddu import server_data

RATE = 0.6
"""What the published scripts prune at."""


def build_strategy(setting: Setting) -> Strategy:
    """Build FedDU after a momentum of 0.5 and 1, pruned after a third of the rounds."""
    data = server_data(setting.experiment)
    number = max(setting.experiment.num_rounds // 3, 1)
    return split_strategy(
        setting,
        more={"server_steps": (Momentum(beta=0.5), data)},
        select=select_at_random,
        variants=PruneAt(number, rate=RATE, data=data),
    )


FEDDUMAP = Method(
    name="feddumap",
    summary="feddu_momentum, pruned at rate 0.6 after a third of the rounds",
    strategy_fn=build_strategy,
)
