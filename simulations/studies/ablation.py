"""Ablation: what each part of smartsplit is worth, by leaving it out."""

from dataclasses import replace

from simulations.experiments.partitions import Dirichlet
from simulations.fleets.presets import heavy_phones, phones_near_edge
from simulations.studies.accuracy import DIGITS, FASHION, many_of
from simulations.studies.study import LEARNING_CLAIMS, Case, Study

METHODS = (
    "smartsplit",
    "smartsplit_no_labels",
    "smartsplit_no_loss",
    "smartsplit_no_speed",
    "smartsplit_no_fairness",
    "smartsplit_advised",
    "smartsplit_no_recompute",
    "smartsplit_one_cut",
    "random",
)
"""smartsplit, with one part more or less each, and feasible routes by chance."""


SILENT_METHODS = (
    "smartsplit",
    "smartsplit_no_learning",
    "smartsplit_advised",
    "random",
)
"""What is left to the managers where devices do not say how fast they are."""

KEPT_METHODS = ("smartsplit", "smartsplit_keep_quarter", "smartsplit_keep_half")


def ablation_cases(is_small: bool) -> tuple[Case, ...]:
    """Return the cases: everything matters, speeds are unknown, units are kept."""
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
    some = Case(
        name="some_selected",
        title=f"{experiment.data}: {experiment.num_clients} phones, "
        f"{experiment.fraction_train:.0%} a round, Dirichlet 0.1",
        claim="Each part that is left out should cost accuracy, time or memory. "
        "One that costs nothing is not worth its lines.",
        experiment=experiment,
        num_seeds=3 if is_small else 5,
        target_accuracy=0.8 if is_small else 0.6,
    )
    return some, _silent_phones(some), _units_kept(some)


def _silent_phones(some: Case) -> Case:
    """Let phones say nothing of their speed, and have heavy work."""
    return replace(
        some,
        name="silent_phones",
        title="digits: 20 phones that do not say how fast they are",
        claim="Heavy work on phones that say nothing of their speed: the central "
        "manager can learn it from their steps, the edge can move their cuts.",
        experiment=replace(
            DIGITS,
            name="ablation",
            methods=SILENT_METHODS,
            fleet=heavy_phones,
            partition=Dirichlet(alpha=0.5),
            batch_size=8,
            num_rounds=10,
            share_speed=False,
        ),
        target_accuracy=0.8,
    )


def _units_kept(some: Case) -> Case:
    """Keep more and more units at the devices."""
    return replace(
        some,
        name="units_kept",
        title="digits: 40 phones, 25% a round, a quarter and half of the units kept",
        claim="A deep boundary tells less about the data. Keeping more of the model at "
        "the devices costs time, memory, and the devices that cannot hold it.",
        experiment=replace(
            DIGITS,
            name="ablation",
            methods=KEPT_METHODS,
            fleet=phones_near_edge,
            partition=Dirichlet(alpha=0.5),
            num_clients=40,
            fraction_train=0.25,
            num_rounds=15,
        ),
        target_accuracy=0.8,
    )


ABLATION = Study(
    name="ablation",
    summary="What each part of smartsplit is worth, by leaving it out.",
    cases_fn=ablation_cases,
    claims=LEARNING_CLAIMS,
    cost="Small: about 10 minutes on 2 cores; in full: about 1 CPU-hour.",
)
