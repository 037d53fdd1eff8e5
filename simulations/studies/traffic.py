"""Traffic: what crosses one cut, as it is, coded, or through a learned gate.

Everybody has memory for everything and the same cut, so that the methods differ in
what crosses and in nothing else.
"""

from dataclasses import replace

from simulations.experiments.experiment import Experiment
from simulations.experiments.models import GATED
from simulations.experiments.partitions import Iid
from simulations.fleets.presets import unlimited
from simulations.methods.crossing import CROSSINGS
from simulations.studies.study import Case, Study

DIGITS = Experiment(
    name="traffic",
    methods=tuple(method.name for method in CROSSINGS),
    fleet=unlimited,
    partition=Iid(),
    model=GATED,
    num_clients=5,
    num_rounds=22,
    batch_size=16,
    learning_rate=0.03,
)
CIFAR = replace(
    DIGITS,
    data="cifar10",
    learning_rate=0.02,
    max_train_examples=20000,
    max_test_examples=4000,
)

CLAIM = (
    "Eight bits are a quarter of the bytes, and should cost no accuracy. deprune's "
    "threefold saving has to be compared with that, and not with a plain cut alone. "
    "All rounds with few channels open, or with 2 % of the values, save more and "
    "should cost accuracy."
)


def traffic_cases(is_small: bool) -> tuple[Case, ...]:
    """Return the cases: digits, and CIFAR-10 if it may take hours."""
    digits = Case(
        name="digits",
        title="digits, one cut for all, 5 clients",
        claim=CLAIM,
        experiment=DIGITS,
        num_seeds=3,
        target_accuracy=0.9,
    )
    cifar = replace(
        digits,
        name="cifar10",
        title="CIFAR-10, one cut for all, 5 clients",
        experiment=CIFAR,
        target_accuracy=0.5,
    )
    return (digits,) if is_small else (digits, cifar)


TRAFFIC = Study(
    name="traffic",
    summary="What crosses a cut: accuracy, bytes, seconds and peaks by codec.",
    cases_fn=traffic_cases,
    claims=("crossing", "accuracy", "traffic", "time", "memory"),
    cost="Small: some 10 minutes on 2 cores; in full: 5 CPU-hours, an estimate.",
)
