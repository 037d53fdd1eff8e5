"""What the command line does with a study: run it, show it, and keep its lines."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.progress import TaskID

from simulations.experiments.errors import ExperimentError
from simulations.experiments.provenance import Provenance
from simulations.report.pages import REPORT, SUMMARY, terminal
from simulations.report.progress import progress_bar
from simulations.report.studies.cells import (
    headline,
    notes,
    study_figures,
    study_summary,
)
from simulations.report.studies.lines import StudyLines, read_lines, write_lines
from simulations.report.studies.page import case_table, study_page
from simulations.report.studies.reading import read_study
from simulations.report.summary import methods_object, percent_text
from simulations.studies.folder import STUDY, begin_folder
from simulations.studies.running import Event, run_in_processes, units_of
from simulations.studies.study import Case

RESULTS = Path("simulations") / "results"


def run_study(
    folder: Path,
    name: str,
    cases: Sequence[Case],
    *,
    is_small: bool,
    provenance: Provenance,
    verbose: bool = False,
) -> bool:
    """Run what the folder lacks of a study; return False if interrupted."""
    begin_folder(
        folder, STUDY, name, cases=cases, is_small=is_small, provenance=provenance
    )
    missing = dict.fromkeys(name for case in cases for name in case.missing)
    if missing:
        sys.stderr.write(f"Not there yet, and left out: {', '.join(missing)}.\n")
    units = units_of(folder, cases)
    wanted = [unit for unit in units if unit.unfinished()]
    try:
        events = run_in_processes(
            wanted,
            provenance=provenance,
            num_workers=cases[0].experiment.num_workers,
            verbose=verbose,
        )
        _show_progress(events, len(units), num_finished=len(units) - len(wanted))
    except KeyboardInterrupt:
        sys.stderr.write(
            "Interrupted: what was done so far is reported; the same command goes on "
            "from there.\n"
        )
        return False
    return True


def _show_progress(
    events: Iterable[Event], num_units: int, *, num_finished: int
) -> None:
    """Show a bar for the seeds of all cases, and one for each at work."""
    bars: dict[str, TaskID] = {}
    with progress_bar() as progress:
        whole = progress.add_task(
            "seeds of all cases", total=num_units, completed=num_finished
        )
        for event in events:
            label = event.unit.label
            if event.is_end:
                progress.remove_task(bars.pop(label))
                progress.advance(whole)
            elif event.row is None:
                num_rounds = event.unit.experiment.num_rounds
                bars[label] = progress.add_task(f"  {label}", total=num_rounds)
            else:
                progress.update(
                    bars[label],
                    description=f"  {label}, {event.method} "
                    f"{percent_text(event.row.accuracy)}",
                    completed=event.row.round,
                )


def show_study(folder: Path, claims: Sequence[str], *, as_json: bool) -> None:
    """Write summary and page of a study's folder again, and print what was found."""
    study = read_study(folder)
    summary = json.dumps(study_summary(study), indent=2) + "\n"
    (folder / SUMMARY).write_text(summary, encoding="utf-8")
    (folder / REPORT).write_text(study_page(folder, study, claims), encoding="utf-8")
    print_study(study, as_json=as_json)


def show_lines(path: Path, *, as_json: bool) -> None:
    """Print what a kept file of lines says."""
    print_study(read_lines(path), as_json=as_json)


def print_study(study: StudyLines, *, as_json: bool) -> None:
    """Print the object of all methods, or a table per case."""
    if as_json:
        sys.stdout.write(json.dumps(methods_object(study_figures(study))) + "\n")
        return
    console = terminal()
    console.print(f"{headline(study)}\n")
    for case in study.cases():
        console.print(case_table(case, study.config))
        for note in notes(case):
            console.print(f"[yellow]{note}[/yellow]")
        console.print()


def keep_lines(folder: Path, *, hardware: str, results: Path = RESULTS) -> Path:
    """Write a study's lines to ``SUITE_HARDWARE_DATE.jsonl`` and return its path."""
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
