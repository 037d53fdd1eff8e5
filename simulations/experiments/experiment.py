"""Experiment: one frozen value that says everything a run depends on.

It travels to Ray's workers, which rebuild data, partitions and models from it, so
every process sees the same experiment and none has to be sent its data.
"""

from dataclasses import dataclass
from pathlib import Path

from simulations.experiments.errors import ExperimentError
from simulations.experiments.partitions import Partition
from simulations.fleets.devices import Fleet

TORCHVISION = "torchvision:"
"""What the name of one of torchvision's models begins with."""

LEAST = {
    "num_clients": 2,
    "num_rounds": 1,
    "batch_size": 2,
    "local_epochs": 1,
    "num_workers": 1,
    "seed": 0,
    "max_train_examples": 1,
    "max_test_examples": 1,
}
"""The smallest value that each number may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One comparison of methods on the same data, clients and budgets.

    Raises
    ------
    ExperimentError
        Naming every value that no run could have.
    """

    name: str  # The suite it belongs to
    methods: tuple[str, ...]  # Names of the methods to compare, in order
    fleet: Fleet  # A function of a module or a frozen value: it is sent and compared
    partition: Partition  # Which client holds which examples
    data: str = (
        "digits"  # Or digits_mixed, fashion_mnist, cifar10, or the path of an ``.npz``
    )
    data_dir: Path = Path("data")  # Where torchvision keeps the downloaded data sets
    # Take at most so many examples, drawn by the seed; None takes all
    max_train_examples: int | None = None
    max_test_examples: int | None = None
    model: str = "small"  # Or ``"gated"``, or ``"torchvision:NAME"``
    num_clients: int = 20
    num_rounds: int = 15
    fraction_train: float = 1.0  # Share of the clients asked to train in a round
    batch_size: int = 16  # Examples per training step
    learning_rate: float = 0.03  # Of SGD, restarted every round as in FedAvg
    momentum: float = 0.9
    local_epochs: int = 1  # Passes of a client over its examples in a round
    seed: int = 0  # Root of every random choice
    num_workers: int = 2  # Clients that train at once, a process and a CPU each
    in_process: bool = False  # Clients and edges, one by one, without Flower's engine
    share_labels: bool = False  # Clients say how many examples of each class they have
    share_speed: bool = True  # They say how fast device and links are, if they know

    def __post_init__(self) -> None:
        """Refuse what no run could have, all problems at once."""
        problems = [
            f"{name} is {getattr(self, name)}, but must be at least {least}"
            for name, least in LEAST.items()
            if getattr(self, name) is not None and getattr(self, name) < least
        ]
        if not 0.0 < self.fraction_train <= 1.0:
            problems.append(
                f"fraction_train is {self.fraction_train}, but must be above 0 and "
                f"at most 1"
            )
        if self.learning_rate <= 0.0:
            problems.append(
                f"learning_rate is {self.learning_rate}, but must be above 0"
            )
        if not self.methods:
            problems.append("methods is empty: name at least one")
        if problems:
            raise ExperimentError("; ".join(problems) + ".")
