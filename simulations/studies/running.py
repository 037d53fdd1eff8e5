"""Run a study: the seeds of all cases, without what has finished before.

Each seed of a case is a unit of work that depends on no other, so several run at once
and the result is the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simulations.experiments.experiment import Experiment
from simulations.experiments.local_runs import run_methods_here
from simulations.experiments.marks import read_marks
from simulations.experiments.provenance import Provenance
from simulations.experiments.rows import EvaluationRow
from simulations.experiments.runner import OnRound, prepare
from simulations.methods import METHODS
from simulations.studies.study import Case, seed_folder

RunUnit = Callable[[Experiment, Path, Provenance, OnRound], None]
"""``run_unit(experiment, out, provenance, on_round)`` runs what ``out`` lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One seed of a case.

    Parameters
    ----------
    case : str
        The case's name.
    experiment : Experiment
        What is run, with its seed.
    out : Path
        Its results folder.
    """

    case: str
    experiment: Experiment
    out: Path

    @property
    def label(self) -> str:
        """Name it for people."""
        return f"{self.case}, seed {self.experiment.seed}"

    def unfinished(self) -> tuple[str, ...]:
        """Name the methods that have left no mark."""
        marks = read_marks(self.out)
        return tuple(name for name in self.experiment.methods if name not in marks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """Who is told how far a study is.

    Parameters
    ----------
    on_begin, on_end : Callable[[Unit], None]
        Told when a unit begins, and when it has ended.
    on_round : Callable[[Unit, str, EvaluationRow], None]
        Told each evaluation of each method.
    """

    on_begin: Callable[[Unit], None]
    on_end: Callable[[Unit], None]
    on_round: Callable[[Unit, str, EvaluationRow], None]


def units_of(folder: Path, cases: Sequence[Case]) -> list[Unit]:
    """List the seeds of all cases in their order, finished or not."""
    return [
        Unit(
            case=case.name,
            experiment=case.experiment_of(seed),
            out=seed_folder(folder, case.name, seed),
        )
        for case in cases
        for seed in range(case.num_seeds)
    ]


def run_one_by_one(
    units: Sequence[Unit],
    *,
    provenance: Provenance,
    watcher: Watcher,
    run_unit: RunUnit | None = None,
) -> None:
    """Run units in this process.

    Parameters
    ----------
    units : Sequence[Unit]
        What to run.
    provenance : Provenance
        Stored with each unit.
    watcher : Watcher
        Told how far it is.
    run_unit : RunUnit, optional
        Runs one unit; ``run_unfinished`` if not given.
    """
    run = run_unit or run_unfinished
    for unit in units:
        watcher.on_begin(unit)

        def on_round(method: str, row: EvaluationRow, unit: Unit = unit) -> None:
            watcher.on_round(unit, method, row)

        run(unit.experiment, unit.out, provenance, on_round)
        watcher.on_end(unit)


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
    run_methods_here(
        replace(experiment, methods=wanted), out, prepared=prepared, on_round=on_round
    )
