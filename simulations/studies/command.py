"""What the command line does with a study: run it, show it, and keep its lines."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from simulations.experiments.errors import ExperimentError
from simulations.experiments.provenance import Provenance
from simulations.experiments.rows import EvaluationRow
from simulations.report.reporting import REPORT, SUMMARY
from simulations.report.studies.lines import StudyLines, read_lines, write_lines
from simulations.report.studies.page import html_page
from simulations.report.studies.reading import read_study
from simulations.report.studies.tables import (
    case_table,
    headline,
    notes,
    study_summary,
)
from simulations.report.summary import percent_text
from simulations.studies.folder import STUDY, begin
from simulations.studies.processes import run_in_processes
from simulations.studies.running import Unit, Watcher, units_of
from simulations.studies.study import Case, StudyOptions, chosen_cases
from simulations.studies.suites import STUDIES

RESULTS = Path("simulations") / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyStudy:
    """A study whose options have been checked."""

    name: str
    cases: tuple[Case, ...]
    is_small: bool
    provenance: Provenance

    def run(self, folder: Path, verbose: bool) -> bool:
        """Run what the folder lacks; return False if interrupted."""
        begin(
            folder,
            self.name,
            cases=self.cases,
            is_small=self.is_small,
            provenance=self.provenance,
        )
        _tell_what_is_missing(self.cases)
        try:
            units = units_of(folder, self.cases)
            wanted = [unit for unit in units if unit.unfinished()]
            with _watching(len(units), len(units) - len(wanted)) as watcher:
                run_in_processes(
                    wanted,
                    provenance=self.provenance,
                    watcher=watcher,
                    num_workers=self.cases[0].experiment.num_workers,
                    verbose=verbose,
                )
        except KeyboardInterrupt:
            sys.stderr.write(
                "Interrupted: what was done so far is reported; the same command goes "
                "on from there.\n"
            )
            return False
        return True


def ready_study(name: str, options: StudyOptions, provenance: Provenance) -> ReadyStudy:
    """Check what was asked of a study, and make it ready to run."""
    return ReadyStudy(
        name=name,
        cases=chosen_cases(STUDIES[name], options),
        is_small=options.is_small,
        provenance=provenance,
    )


def show_study(folder: Path, *, as_json: bool) -> None:
    """Write summary and page of a study's folder again, and print what was found."""
    study = read_study(folder)
    summary = json.dumps(study_summary(study), indent=2) + "\n"
    (folder / SUMMARY).write_text(summary, encoding="utf-8")
    (folder / REPORT).write_text(html_page(folder, study), encoding="utf-8")
    print_study(study, as_json=as_json)


def show_lines(path: Path, *, as_json: bool) -> None:
    """Print what a kept file of lines says."""
    print_study(read_lines(path), as_json=as_json)


def print_study(study: StudyLines, *, as_json: bool) -> None:
    """Print the summary as JSON, or a table per case."""
    if as_json:
        sys.stdout.write(json.dumps(study_summary(study)) + "\n")
        return
    console = Console()
    console.print(f"{headline(study)}\n")
    for case in study.cases():
        console.print(case_table(case))
        for note in notes(case):
            console.print(f"[yellow]{note}[/yellow]")
        console.print()


def keep_lines(folder: Path, *, hardware: str, results: Path = RESULTS) -> Path:
    """Write a study's lines to ``SUITE_HARDWARE_DATE.jsonl`` and return its path.

    Raises
    ------
    ExperimentError
        If nothing has finished, or the hardware's name does not suit a file's.
    """
    if not hardware or not hardware.replace("-", "").isalnum():
        raise ExperimentError(
            f"--hardware is {hardware!r}, but is part of a file's name: letters, "
            "digits and hyphens, such as epyc2."
        )
    study = read_study(folder)
    if not any(line.is_finished for line in study.lines):
        raise ExperimentError(
            f"{str(folder)!r} holds no finished run: nothing to keep yet."
        )
    date = str(study.config["date"])[:10]
    path = results / f"{study.config[STUDY]}_{hardware}_{date}.jsonl"
    write_lines(path, study)
    return path


def _tell_what_is_missing(cases: Sequence[Case]) -> None:
    """Say which methods a study cannot run, since it skips none in silence."""
    missing = dict.fromkeys(name for case in cases for name in case.missing)
    if missing:
        sys.stderr.write(f"Not there yet, and left out: {', '.join(missing)}.\n")


@contextmanager
def _watching(num_units: int, num_finished: int) -> Iterator[Watcher]:
    """Show a bar for the seeds of all cases, and one for each at work."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        Elapsed(),
        console=Console(stderr=True),
    ) as progress:
        yield _watcher(progress, num_units, num_finished)


def _watcher(progress: Progress, num_units: int, num_finished: int) -> Watcher:
    whole = progress.add_task(
        "seeds of all cases", total=num_units, completed=num_finished, accuracy=""
    )
    bars: dict[str, TaskID] = {}

    def on_begin(unit: Unit) -> None:
        bars[unit.label] = progress.add_task(
            f"  {unit.label}", total=unit.experiment.num_rounds, accuracy=""
        )

    def on_round(unit: Unit, method: str, row: EvaluationRow) -> None:
        progress.update(
            bars[unit.label],
            description=f"  {unit.label}, {method}",
            completed=row.round,
            accuracy=percent_text(row.accuracy),
        )

    def on_end(unit: Unit) -> None:
        progress.remove_task(bars.pop(unit.label))
        progress.advance(whole)

    return Watcher(on_begin=on_begin, on_round=on_round, on_end=on_end)
