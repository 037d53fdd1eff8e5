"""Progressive training: what ProFL's growing is worth, alone and along split routes.

The weak half has labels of its own, so that it counts who takes part. Everybody trains
in every round, since that differs from block to block as it is.
"""

from dataclasses import replace

from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import OwnLabels
from simulations.fleets.presets import half_weak
from simulations.studies.study import Case, Study

METHODS = (
    "fedavg",
    "drop_weak",
    "allsmall",
    "heterofl",
    "fedrolex",
    "depthfl",
    "smartsplit",
    "profl",
    "profl_routes",
)
"""Two bounds, those who include weak devices, and the blocks."""

DIGITS = Experiment(
    name="progressive",
    methods=METHODS,
    fleet=half_weak,
    partition=OwnLabels(num_own=5),
    num_clients=20,
    num_rounds=24,
    batch_size=16,
    learning_rate=0.03,
)
FASHION = replace(
    DIGITS,
    data="fashion_mnist",
    learning_rate=0.01,
    max_train_examples=3000,
    max_test_examples=2000,
)

CLAIM = (
    "profl should be above drop_weak where a step fits devices that the model does not "
    "fit, and profl_routes above profl, since everybody trains every block. Until the "
    "last block both are evaluated with later blocks that are not trained yet."
)


def progressive_cases(is_small: bool) -> tuple[Case, ...]:
    """Return the cases: digits in few rounds, or digits and Fashion-MNIST."""
    digits = Case(
        name="digits",
        title="digits: the weak half has labels of its own",
        claim=CLAIM,
        experiment=replace(DIGITS, num_rounds=9) if is_small else DIGITS,
        num_seeds=3,
        target_accuracy=0.8,
    )
    if is_small:
        return (digits,)
    fashion = replace(
        digits,
        name="fashion_own_labels",
        title="Fashion-MNIST: the weak half has labels of its own",
        experiment=FASHION,
        target_accuracy=0.6,
    )
    return digits, fashion


PROGRESSIVE = Study(
    name="progressive",
    summary="Training block by block: ProFL's growing, alone and along routes.",
    cases_fn=progressive_cases,
    claims=("accuracy", "classes", "traffic", "time"),
    cost="Small: about 8 minutes on 2 idle cores; in full: 2 CPU-hours, an estimate.",
)
