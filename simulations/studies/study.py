"""Study: a suite of cases, each an experiment that is run once per seed.

A case makes one point; its methods are compared seed by seed, on the same data,
clients and first model.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from simulations.experiments.errors import ExperimentError
from simulations.experiments.experiment import Experiment
from simulations.fleets.presets import name_of
from simulations.methods import METHODS

NOT_SETTINGS = ("name", "methods", "seed", "data_dir", "num_workers", "in_process")
"""Fields of an experiment that change neither what a run computes nor its weights."""


LEARNING_CLAIMS = (
    *("accuracy", "gains", "classes", "participation", "routes", "memory"),
    *("traffic", "time", "energy"),
)
"""What a report says of a study about what is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One experiment of a study, to be run with several seeds."""

    name: str  # Its folder, and its name on the command line
    title: str  # What it is, in a few words
    claim: str  # What it is to show, or to refute
    experiment: Experiment  # Its ``methods`` may name some that do not exist yet
    num_seeds: int  # It is run with the seeds from 0 on
    target_accuracy: float  # That time-to-accuracy waits for

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that exist, in the order of the case."""
        return tuple(name for name in self.experiment.methods if name in METHODS)

    @property
    def missing(self) -> tuple[str, ...]:
        """The methods that the case names and nobody has written."""
        return tuple(name for name in self.experiment.methods if name not in METHODS)

    def experiment_of(self, seed: int) -> Experiment:
        """Return what is run with one seed."""
        return replace(
            self.experiment, methods=self.methods, seed=seed, in_process=True
        )

    def settings(self) -> dict[str, Any]:
        """Return, as JSON values, what must not change when a study is resumed."""
        values = asdict(self.experiment) | {
            "fleet": name_of(self.experiment.fleet),
            "partition": repr(self.experiment.partition),
        }
        return {name: v for name, v in values.items() if name not in NOT_SETTINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A suite with one command: cases, and what they cost."""

    name: str  # On the command line
    summary: str  # What it compares, in a line
    cases_fn: Callable[[bool], tuple[Case, ...]]  # Takes is_small
    claims: tuple[str, ...]  # That its report makes of every case, in order
    cost: str  # How long it takes, small and in full


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """What the command line asks of a study; None leaves a case as it is."""

    is_small: bool = False  # Whether minutes are all there is
    cases: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    num_seeds: int | None = None  # Seeds of every case
    changes: dict[str, Any] | None = None  # Fields to replace in every experiment


def chosen_cases(study: Study, options: StudyOptions) -> tuple[Case, ...]:
    """Return the study's cases as the options want them."""
    cases = {case.name: case for case in study.cases_fn(options.is_small)}
    wanted = tuple(cases) if options.cases is None else options.cases
    unknown = [name for name in wanted if name not in cases]
    if unknown or not wanted:
        found = ", ".join(map(repr, unknown)) or "nothing"
        raise ExperimentError(
            f"--cases names {found}, but {study.name!r} has only {', '.join(cases)}."
        )
    if options.num_seeds is not None and options.num_seeds < 1:
        raise ExperimentError(
            f"--seeds is {options.num_seeds}, but must be at least 1: the number of "
            "seeds, which count from 0."
        )
    changes = dict(options.changes or {})
    if options.methods is not None:
        changes["methods"] = options.methods
    return tuple(
        replace(
            case,
            experiment=replace(case.experiment, **changes),
            num_seeds=options.num_seeds or case.num_seeds,
        )
        for case in cases.values()
        if case.name in wanted
    )


def seed_folder(folder: Path, case: str, seed: int) -> Path:
    """Say where one seed of a case has its results."""
    return folder / case / f"seed-{seed}"
