"""Accuracy: what each method learns where half of the devices are weak.

Settings are those of a calibration in a plain loop: with these rates the first case
leaves `drop_weak` 52 points behind `fedavg`, with 100 clients coverage of the labels
beats chance. The small version needs no network.
"""

from dataclasses import replace

from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import Dirichlet, OwnLabels
from simulations.fleets.presets import half_weak
from simulations.studies.study import LEARNING_CLAIMS, Case, Study

METHODS = (
    "fedavg",
    "drop_weak",
    "fedprox",
    "fedadam",
    "splitfed",
    "oort",
    "random",
    "heterofl",
    "depthfl",
    "smartsplit",
)
"""What the cases compare, the two bounds first."""

IMAGE_METHODS = ("fedavg", "drop_weak", "heterofl", "depthfl", "smartsplit")
"""What differs if everybody is selected: the digits show that the others do not."""

NUM_SEEDS = 5
MANY_ROUNDS = 30
SMALL = {
    "own_labels": (8, 5),
    "dirichlet_01": (5, 1),
    "dirichlet_05": (5, 1),
    "many_clients": (8, 1),
}
"""Rounds and seeds that make the cases fit into the minutes of ``--small``."""

DIGITS = Experiment(
    name="accuracy",
    methods=METHODS,
    fleet=half_weak,
    partition=OwnLabels(num_own=5),
    num_clients=20,
    num_rounds=20,
    batch_size=16,
    learning_rate=0.03,
)
FASHION = replace(
    DIGITS,
    data="fashion_mnist",
    methods=IMAGE_METHODS,
    learning_rate=0.01,
    num_rounds=10,
    max_train_examples=3000,
    max_test_examples=2000,
)
CIFAR = replace(FASHION, data="cifar10", learning_rate=0.02, num_rounds=15)

OWN_CLAIM = (
    "The classes 0 to 4 live on the weak half alone, so any method that includes weak "
    "devices beats drop_weak by construction; the comparison that counts is with "
    "fedavg, which ignores memory, and with the other methods that include them."
)
DIRICHLET_CLAIM = (
    "Every client has classes of its own mixture, half of the clients are weak: what "
    "leaving them out costs depends on the draw."
)
MANY_CLAIM = (
    "Ten of 100 clients train in a round, half of them weak: here it matters which. "
    "smartsplit looks at the label counts that clients share; smartsplit_no_labels "
    "does without."
)


def accuracy_cases(is_small: bool) -> tuple[Case, ...]:
    """Return the cases, on digits alone if they are to be small."""
    digits = (
        *_cases_of("digits", DIGITS, target_accuracy=0.9),
        _many_clients(DIGITS, target_accuracy=0.8),
    )
    if is_small:
        return tuple(map(_smaller, digits))
    many = replace(FASHION, max_train_examples=6000)
    return (
        *digits,
        _many_clients(many, target_accuracy=0.6),
        *_cases_of("Fashion-MNIST", FASHION, target_accuracy=0.6),
        *_cases_of("CIFAR-10", CIFAR, target_accuracy=0.35),
    )


def _cases_of(
    data: str, experiment: Experiment, *, target_accuracy: float
) -> tuple[Case, ...]:
    """Return the three divisions of one data set."""
    own = Case(
        name=f"{_prefix(experiment)}own_labels",
        title=f"{data}: the weak half has labels of its own",
        claim=OWN_CLAIM,
        experiment=experiment,
        num_seeds=NUM_SEEDS,
        target_accuracy=target_accuracy,
    )
    dirichlet = (
        replace(
            own,
            name=f"{_prefix(experiment)}dirichlet_{text}",
            title=f"{data}: Dirichlet {alpha}",
            claim=DIRICHLET_CLAIM,
            experiment=replace(experiment, partition=Dirichlet(alpha=alpha)),
        )
        for text, alpha in (("01", 0.1), ("05", 0.5))
    )
    return (own, *dirichlet)


def _many_clients(experiment: Experiment, *, target_accuracy: float) -> Case:
    return Case(
        name=f"{_prefix(experiment)}many_clients",
        title=f"{experiment.data}: 100 clients, 10 a round, Dirichlet 0.1",
        claim=MANY_CLAIM,
        experiment=replace(
            many_of(experiment),
            partition=Dirichlet(alpha=0.1),
            share_labels=True,
            methods=(*METHODS, "smartsplit_no_labels"),
        ),
        num_seeds=NUM_SEEDS,
        target_accuracy=target_accuracy,
    )


def _prefix(experiment: Experiment) -> str:
    """Begin the names of a data set's cases; digits go without saying."""
    return "" if experiment.data == "digits" else f"{experiment.data}_"


def many_of(experiment: Experiment) -> Experiment:
    """Let 100 clients be there, and 10 of them train in a round."""
    return replace(
        experiment, num_clients=100, fraction_train=0.1, num_rounds=MANY_ROUNDS
    )


def _smaller(case: Case) -> Case:
    """Cut a case down to what fits into the minutes of the small version."""
    rounds, num_seeds = SMALL[case.name]
    experiment = replace(case.experiment, num_rounds=rounds)
    return replace(case, experiment=experiment, num_seeds=num_seeds)


ACCURACY = Study(
    name="accuracy",
    summary="What each method learns where half of the devices are weak.",
    cases_fn=accuracy_cases,
    claims=LEARNING_CLAIMS,
    cost="Small: about 6 minutes on 2 cores; in full: about 5 CPU-hours.",
)
