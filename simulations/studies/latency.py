"""Latency: how long rounds take on phones, in simulated seconds.

A round ends with its slowest selected device, so a method is fast if it asks nobody
for what takes him long. Nothing here is measured with a clock on the wall.
"""

from dataclasses import replace

from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import Dirichlet
from simulations.fleets.presets import phones, phones_near_edge
from simulations.studies.study import Case, Study

METHODS = ("fedavg", "drop_weak", "splitfed", "oort", "smartsplit")

EVERYBODY = Experiment(
    name="latency",
    methods=METHODS,
    fleet=phones_near_edge,
    partition=Dirichlet(alpha=0.5),
    num_clients=20,
    num_rounds=15,
    batch_size=16,
    learning_rate=0.03,
)


def latency_cases(is_small: bool) -> tuple[Case, ...]:
    """Return the cases; all of them train on digits."""
    some = replace(
        EVERYBODY,
        num_clients=40 if is_small else 100,
        fraction_train=0.25 if is_small else 0.1,
        num_rounds=15 if is_small else 40,
    )
    selected = Case(
        name="some_selected",
        title="Phones, some of them asked in each round",
        claim="Whoever chooses clients and cuts by memory, speed and link waits less "
        "for the slowest, and gets to the same accuracy sooner.",
        experiment=some,
        num_seeds=3 if is_small else 5,
        target_accuracy=0.8,
    )
    everybody = replace(
        selected,
        name="all_selected",
        title="Phones, all of them asked in every round",
        claim="With everybody selected only the cuts are left to choose.",
        experiment=EVERYBODY,
        num_seeds=1 if is_small else 5,
    )
    far = replace(
        selected,
        name="far_edge",
        title="Phones, some of them asked, and an edge as far as the server",
        claim="Without a fast local link to the edge, every batch's boundary crosses "
        "the mobile network: what is left of the gain?",
        experiment=replace(some, fleet=phones),
        num_seeds=1 if is_small else 5,
    )
    return (selected, everybody, far)


LATENCY = Study(
    name="latency",
    summary="How long rounds take on phones, in simulated seconds.",
    cases_fn=latency_cases,
    claims=(
        "time",
        "accuracy",
        "participation",
        "routes",
        "memory",
        "traffic",
        "energy",
    ),
    cost="Small: about 2 minutes on 2 cores; in full: about 0.3 CPU-hours.",
)
