"""Ablation: what each part of smartsplit is worth, by leaving it out."""

from dataclasses import replace

from simulations.fleets import phones_near_edge
from simulations.partitions import Dirichlet
from simulations.studies.accuracy import DIGITS, FASHION, many_of
from simulations.studies.study import Case, Study

METHODS = (
    "smartsplit",
    "smartsplit_surrogate",
    "smartsplit_no_labels",
    "smartsplit_no_loss",
    "smartsplit_no_speed",
    "smartsplit_no_fairness",
    "smartsplit_no_refining",
    "smartsplit_no_recompute",
    "smartsplit_one_cut",
    "random",
)
"""smartsplit, with one part more or less each, and feasible routes by chance."""


def ablation_cases(is_small: bool) -> tuple[Case, ...]:
    """Return the one case: a choice of clients, memory and speed all matter in it."""
    data = DIGITS if is_small else replace(FASHION, max_train_examples=6000)
    experiment = replace(
        many_of(data),
        name="ablation",
        methods=METHODS,
        fleet=phones_near_edge,
        partition=Dirichlet(alpha=0.1),
        share_labels=True,
    )
    if is_small:
        experiment = replace(experiment, num_clients=40, fraction_train=0.25)
    return (
        Case(
            name="some_selected",
            title=f"{experiment.data}: {experiment.num_clients} phones, "
            f"{experiment.fraction_train:.0%} a round, Dirichlet 0.1",
            claim="Each part that is left out should cost accuracy, time or memory. "
            "One that costs nothing is not worth its lines.",
            experiment=experiment,
            num_seeds=3 if is_small else 5,
            target_accuracy=0.8 if is_small else 0.6,
        ),
    )


ABLATION = Study(
    name="ablation",
    summary="What each part of smartsplit is worth, by leaving it out.",
    cases_fn=ablation_cases,
    claims=(
        "accuracy",
        "gains",
        "time",
        "classes",
        "participation",
        "routes",
        "memory",
        "traffic",
        "energy",
    ),
    cost="Small: about 3 minutes on 2 cores; in full: about 0.4 CPU-hours.",
)
