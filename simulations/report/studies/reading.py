"""Read a study's folder: the journals of each seed, and the lines made of them.

The folder of a single experiment is read as a study of one case and one seed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simulations.experiments.marks import Mark, read_marks
from simulations.experiments.rows import ACCEPTED, MethodRun
from simulations.report.studies.lines import CaseLines, Line, StudyLines
from simulations.report.summary import CONFIG, Results, common_accuracy, read_results
from simulations.studies.folder import SINGLE, STUDY, read_config
from simulations.studies.study import seed_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedResults:
    """One seed of a case: its journals, and the marks of the methods that finished."""

    seed: int
    results: Results
    marks: Mapping[str, Mark]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResults:
    """All that a case left: pictures are drawn from this, tables from its lines."""

    lines: CaseLines  # What was found
    seeds: tuple[SeedResults, ...]  # The seeds that were begun, in order

    def runs(self, method: str) -> list[tuple[SeedResults, MethodRun]]:
        """Return the finished runs of a method."""
        return [
            (seed, run)
            for seed in self.seeds
            for run in seed.results.runs
            if run.method == method and method in seed.marks
        ]


def study_config(folder: Path) -> dict[str, Any]:
    """Read what a folder's configuration says of its study."""
    config = read_config(folder)
    if SINGLE not in config:
        if STUDY not in config:
            read_results(folder)  # Says what is wrong with it.
        return config
    experiment, results = config[SINGLE], read_results(folder)
    name, data = experiment["name"], Path(experiment["data"]).name
    counts = [f"num_{split}_examples" for split in ("train", "test")]
    peaks = [f"{part}_peak_bytes" for part in ("whole", "smallest")]
    case = {
        "title": f"{data}, {experiment['model']} model, {experiment['num_clients']} "
        f"clients, seed {experiment['seed']}",
        "claim": "The target is the best accuracy that all methods reach.",
        "methods": list(config["methods"]),
        "missing": [],
        "target_accuracy": common_accuracy(results.runs) or 0.0,
        "settings": experiment | {name: config[name] for name in (*counts, *peaks)},
        "seeds": [experiment["seed"]],
    }
    return config | {STUDY: name, "is_small": False, "cases": {name: case}}


def read_case(folder: Path, name: str) -> CaseResults:
    """Read the seeds of one case of a study's folder."""
    config = study_config(folder)
    case = config["cases"][name]
    seeds = []
    for seed in case["seeds"]:
        out = folder if SINGLE in config else seed_folder(folder, name, seed)
        if (out / CONFIG).exists():
            marks, results = read_marks(out), read_results(out)
            seeds.append(SeedResults(seed=seed, results=results, marks=marks))
    lines = [
        _line(name, seed, run, target=case["target_accuracy"])
        for seed in seeds
        for run in seed.results.runs
        if run.method in case["methods"]
    ]
    return CaseResults(lines=CaseLines.of(config, name, lines), seeds=tuple(seeds))


def read_study(folder: Path) -> StudyLines:
    """Read the lines of all cases; the journals of one case at a time are held."""
    config = study_config(folder)
    cases = [read_case(folder, name).lines for name in config["cases"]]
    return StudyLines(
        config=config, lines=tuple(line for case in cases for line in case.lines)
    )


def _line(case: str, seed: SeedResults, run: MethodRun, *, target: float) -> Line:
    """Work out the figures of one run."""
    accuracies = [row.accuracy for row in run.evaluations]
    timeline = seed.results.timelines().get(run.method)
    mark = seed.marks.get(run.method)
    figures = asdict(seed.results.figures()[run.method]) | {
        "routes": _routes(run),
        "rounds_to_target": rounds_to(accuracies, target),
        "simulated_seconds_to_target": timeline and timeline.seconds_to(target),
    }
    return Line(
        case=case,
        method=run.method,
        seed=seed.seed,
        num_clients=len(seed.results.client_keys),
        state_sha256="" if mark is None else mark.state_sha256,
        figures=figures,
        accuracies=accuracies,
        slowest_seconds=tuple(timeline.seconds_by_round.values()) if timeline else (),
    )


def _routes(run: MethodRun) -> dict[str, int]:
    """Count the routes of all accepted updates."""
    training = run.training()
    return dict(Counter(route_name(r.route) for r in training if r.status == ACCEPTED))


def route_name(route: str) -> str:
    """Shorten a route to what the device trains."""
    return route.partition(" > ")[0]


def rounds_to(accuracies: Sequence[float], target: float) -> int | None:
    """Return the round whose evaluation first reaches the target.

    Examples
    --------
    >>> rounds_to([0.1, 0.5, 0.8, 0.9], 0.8)
    2
    """
    reached = (n for n, found in enumerate(accuracies) if n > 0 and found >= target)
    return next(reached, None)
