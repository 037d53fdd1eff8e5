"""Run the methods of an experiment in this process, without Ray."""

import random
from pathlib import Path

from simulations.experiments.experiment import Experiment
from simulations.experiments.local_grid import LocalGrid
from simulations.experiments.runner import (
    OnRound,
    Prepared,
    client_app_of,
    run_method,
    setting_of,
)
from simulations.methods import METHODS


def run_methods_here(
    experiment: Experiment, out: Path, *, prepared: Prepared, on_round: OnRound
) -> None:
    """Run the methods one after the other, each with clients of its own.

    The experiment's ``in_process`` has to be true: edges are in this process, too.
    Flower's strategies draw clients from Python's own generator, so that is seeded
    before each method: what it draws does not depend on which methods ran before.

    Parameters
    ----------
    experiment : Experiment
        What to run.
    out : Path
        The results folder.
    prepared : Prepared
        What ``prepare`` worked out.
    on_round : OnRound
        Told how good the model is after every round.
    """
    for name in experiment.methods:
        random.seed(experiment.seed)
        app = client_app_of(experiment, prepared)
        grid = LocalGrid(app, experiment.num_clients)
        setting = setting_of(experiment, prepared, out=out, method=name)
        run_method(METHODS[name], setting, grid, on_round=on_round)
