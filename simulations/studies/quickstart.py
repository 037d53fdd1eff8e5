"""Quickstart: what splitting gains weak devices, and what it costs, in minutes.

Twenty clients, ten of them too weak for the whole model and one too weak for any part
of it. Half of the classes live on the weak ones only.
"""

from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import OwnLabels
from simulations.fleets.presets import half_weak

LEARNING_RATES = {"digits": 0.03, "fashion_mnist": 0.01, "cifar10": 0.02}
"""Found by hand for batches of 16 with momentum; other data get the smallest."""

MAX_TRAIN_EXAMPLES = 4000
MAX_TEST_EXAMPLES = 2000


def quickstart(data: str = "digits") -> Experiment:
    """Compare FedAvg, dropping weak devices, and splitting, within minutes.

    Parameters
    ----------
    data : str
        Name of the data set or path of an ``.npz``; large ones are cut down to
        4,000 training and 2,000 test examples.
    """
    return Experiment(
        name="quickstart",
        methods=("fedavg", "drop_weak", "smartsplit"),
        data=data,
        num_rounds=20,
        fleet=half_weak,
        partition=OwnLabels(num_own=5),
        max_train_examples=MAX_TRAIN_EXAMPLES,
        max_test_examples=MAX_TEST_EXAMPLES,
        learning_rate=LEARNING_RATES.get(data, min(LEARNING_RATES.values())),
    )
