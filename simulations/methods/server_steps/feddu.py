"""FedDU: the server trains the mean on its own data, weighted by what they can add.

References
----------
Zhang, Liu, Jia, Zhou, Dai, Dou: FedDUAP: Federated Learning with Dynamic Update and
Adaptive Pruning Using Shared Insensitive Data. IJCAI 2022. arXiv:2204.11536.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import ServerData, select_at_random
from flwr_smartsplit.server.aggregation import ServerStep
from simulations.experiments.data import server_loader
from simulations.experiments.experiment import Experiment
from simulations.methods.method import Method, Setting, split_strategy

Steps = Callable[[Experiment], Sequence[ServerStep]]
"""``steps(experiment)`` makes the server's steps of a run."""


def server_data(experiment: Experiment, **how: Any) -> ServerData:
    """Make FedDU's step, with as many passes as a client does."""
    return ServerData(server_loader(experiment), epochs=experiment.local_epochs, **how)


def build_strategy(setting: Setting, *, steps: Steps) -> Strategy:
    """Build a strategy with steps of the server's, on randomly sampled clients."""
    more = {"server_steps": steps(setting.experiment)}
    return split_strategy(setting, more=more, select=select_at_random)


def method_of(name: str, summary: str, steps: Steps) -> Method:
    """Make a method of the server's steps."""
    strategy_fn = partial(build_strategy, steps=steps)
    return Method(name=name, summary=summary, strategy_fn=strategy_fn)


FEDDU = (
    method_of(
        "feddu",
        "fedavg, and the server trains on its own data after each round",
        lambda experiment: (server_data(experiment),),
    ),
    method_of(
        "feddu_holdout",
        "feddu, whose accuracy is that of a tenth that the server does not train",
        lambda experiment: (server_data(experiment, holdout=0.1),),
    ),
)
"""As published, and with an accuracy that stays honest."""
