"""Quickstart: what splitting gains weak devices, and what it costs, in minutes.

Twenty clients, ten of them too weak for the whole model and one too weak for any part
of it. Half of the classes live on the weak ones only.
"""

from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import OwnLabels
from simulations.fleets.presets import half_weak

LEARNING_RATES = {"digits": 0.03, "fashion_mnist": 0.01, "cifar10": 0.02}
"""Found by hand for batches of 16 with momentum; other data get the smallest."""


def quickstart(data: str = "digits") -> Experiment:
    """Compare FedAvg, dropping weak devices, and splitting, within minutes.

    Large data sets are cut down to 4,000 training and 2,000 test examples.
    """
    return Experiment(
        name="quickstart",
        methods=("fedavg", "drop_weak", "smartsplit", "smartsplit_by_rate"),
        data=data,
        num_rounds=20,
        fleet=half_weak,
        partition=OwnLabels(num_own=5),
        max_train_examples=4000,
        max_test_examples=2000,
        learning_rate=LEARNING_RATES.get(data, min(LEARNING_RATES.values())),
    )
