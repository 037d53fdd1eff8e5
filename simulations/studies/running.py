"""Run a study: case by case and seed by seed, without what has finished before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simulations.experiment import Experiment
from simulations.marks import read_marks
from simulations.methods import METHODS
from simulations.provenance import Provenance
from simulations.runner import OnRound, prepare, run_methods
from simulations.studies.study import Case, seed_folder

RunSeed = Callable[[Experiment, Path, Provenance, OnRound], None]
"""``run_seed(experiment, out, provenance, on_round)`` runs what ``out`` lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """Who is told how far a study is.

    Parameters
    ----------
    on_seed : Callable[[Case, int], None]
        Told of each case and seed, finished before or not, when its turn comes.
    on_round : OnRound
        Told each method's evaluations.
    on_seed_end : Callable[[], None]
        Told when the seed is done.
    """

    on_seed: Callable[[Case, int], None]
    on_round: OnRound
    on_seed_end: Callable[[], None]


def run_study(
    folder: Path,
    cases: Sequence[Case],
    *,
    provenance: Provenance,
    watcher: Watcher,
    run_seed: RunSeed | None = None,
) -> None:
    """Run every seed of every case that has not finished.

    Parameters
    ----------
    folder : Path
        The study's folder, which ``begin`` has accepted.
    cases : Sequence[Case]
        What to run.
    provenance : Provenance
        Stored with each seed.
    watcher : Watcher
        Told how far it is.
    run_seed : RunSeed, optional
        Runs one seed; ``run_unfinished`` if not given.
    """
    run = run_seed or run_unfinished
    for case in cases:
        for seed in range(case.num_seeds):
            watcher.on_seed(case, seed)
            out = seed_folder(folder, case.name, seed)
            run(case.experiment_of(seed), out, provenance, watcher.on_round)
            watcher.on_seed_end()


def run_unfinished(
    experiment: Experiment, out: Path, provenance: Provenance, on_round: OnRound
) -> None:
    """Run the methods of an experiment that have left no mark in its folder."""
    finished = read_marks(out)
    wanted = tuple(name for name in experiment.methods if name not in finished)
    if not wanted:
        return
    both = tuple(name for name in METHODS if name in {*wanted, *finished})
    prepared = prepare(
        replace(experiment, methods=both), out, provenance=provenance, kept=finished
    )
    run_methods(
        replace(experiment, methods=wanted), out, prepared=prepared, on_round=on_round
    )
