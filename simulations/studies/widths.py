"""Widths: adaptive ones against the whole model, a ladder by speed, and a deadline.

Devices and times are those of WHALE-FL's authors, whose rule it is about.
"""

from dataclasses import replace

from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import Dirichlet
from simulations.fleets.whale import whale_devices
from simulations.studies.study import Case, Study

DIGITS = Experiment(
    name="widths",
    methods=(
        *("fedavg", "width_ladder", "deadline_widths"),
        *("whale_published", "whale_rescaled", "whale"),
    ),
    fleet=whale_devices,
    partition=Dirichlet(alpha=0.5),
    num_clients=20,
    num_rounds=40,
    local_epochs=2,
    batch_size=16,
)

CLAIM = (
    "whale should be sooner than fedavg, which trains the whole model everywhere, at "
    "the lower accuracies. Nothing says that it is sooner than the ladder, which needs "
    "no measurements; nor than the deadline."
)


def widths_cases(is_small: bool) -> tuple[Case, ...]:
    """Return the case, with more rounds if it may take longer."""
    experiment = DIGITS if is_small else replace(DIGITS, num_rounds=150)
    return (
        Case(
            name="digits",
            title="digits, 20 clients of WHALE-FL's five devices",
            claim=CLAIM,
            experiment=experiment,
            num_seeds=3,
            target_accuracy=0.9,
        ),
    )


WIDTHS = Study(
    name="widths",
    summary="Which width by which rule: WHALE-FL, a deadline, a ladder by speed.",
    cases_fn=widths_cases,
    claims=("time", "accuracy", "participation"),
    cost="Small: about 5 minutes on 2 idle cores, an estimate; in full: about an hour.",
)
