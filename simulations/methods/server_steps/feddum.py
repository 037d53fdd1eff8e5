"""FedDUM: FedDU with momentum on the server, as published and as it works.

References
----------
Liu et al.: Efficient Federated Learning Using Dynamic Update and Adaptive Pruning with
Momentum on Shared Server Data. ACM TIST 2024. arXiv:2408.05678. What differs:
``docs/howto/server-data.md``.
"""

from collections.abc import Sequence

from flwr_smartsplit import Momentum
from flwr_smartsplit.server.aggregation import ServerStep
from simulations.experiments.experiment import Experiment
from simulations.methods.server_steps.feddu import method_of, server_data


def as_published(experiment: Experiment) -> Sequence[ServerStep]:
    """Average the changes, before and after the server's training, in one memory."""
    momentum = Momentum(beta=0.9, dampening=0.9)
    return momentum, server_data(experiment), momentum


def with_gain(experiment: Experiment) -> Sequence[ServerStep]:
    """Add FedAvgM's momentum to the mean; then the server trains."""
    return Momentum(beta=0.5), server_data(experiment)


FEDDUM = (
    method_of("feddum", "feddu with its momentum of 0.9 and 0.1", as_published),
    method_of("feddu_momentum", "feddu after a momentum of 0.5 and 1", with_gain),
)
"""Two ways to add momentum."""
