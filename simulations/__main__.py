"""The command line: ``python -m simulations run NAME | report DIR | list``."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from flwr_smartsplit.errors import SmartSplitError
from simulations.experiments.errors import ExperimentError
from simulations.experiments.experiment import Experiment
from simulations.experiments.provenance import Provenance
from simulations.experiments.rows import EvaluationRow
from simulations.experiments.runner import prepare, quiet_libraries, run_methods
from simulations.methods import METHODS
from simulations.report.pages import REPORT
from simulations.report.progress import only_ours_on_stdout, progress_bar
from simulations.report.summary import percent_text
from simulations.studies.command import keep_lines, run_study, show_lines, show_study
from simulations.studies.folder import MEASUREMENT, STUDY, read_config
from simulations.studies.measurement import MeasurementOptions
from simulations.studies.study import StudyOptions, chosen_cases
from simulations.studies.suites import MEASUREMENTS, SINGLE_CLAIMS, STUDIES, SUITES

DIFFERS, MISUSE, INTERRUPTED = 1, 2, 130
_NO_STUDY = {"data", "model", "models", "seed", "library", "sample", "codec"}

Run = Callable[[Path, bool], bool]
"""``run(folder, verbose)`` runs a suite and returns False if it was interrupted."""

app = typer.Typer(
    help="Simulate fleets of weak devices and compare methods to train them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


JsonOption = Annotated[bool, _option("Print one object of methods.", "--json")]
OutOption = Annotated[Path | None, _option("Results folder; out/SUITE if not given.")]


# longer than 40 lines because it has a line for every option
@app.command()
def run(  # noqa: PLR0913 - one argument per option of the command line
    context: typer.Context,
    suite: Annotated[str, typer.Argument(help="A suite that `list` names.")],
    *,
    data: Annotated[
        str | None, _option("digits (if not given), fashion_mnist, cifar10, FILE.npz.")
    ] = None,
    data_dir: Annotated[
        Path | None, _option("Where torchvision's data sets are; data if not given.")
    ] = None,
    model: Annotated[str | None, _option("small, gated or torchvision:NAME.")] = None,
    rounds: Annotated[int | None, _option("Rounds of training.")] = None,
    clients: Annotated[int | None, _option("Clients in the fleet.")] = None,
    train_examples: Annotated[
        int | None, _option("Training examples, at most.")
    ] = None,
    seed: Annotated[int | None, _option("Root of all chance.")] = None,
    workers: Annotated[int | None, _option("What runs at once, a CPU each.")] = None,
    methods: Annotated[str | None, _option("Names of `list`, with commas.")] = None,
    models: Annotated[
        str | None, _option("Suites without rounds: some models, with commas.")
    ] = None,
    library: Annotated[
        str | None, _option("zoo: torchvision (if not given), timm or transformers.")
    ] = None,
    sample: Annotated[int | None, _option("zoo: how many models of it.")] = None,
    codec: Annotated[str | None, _option("zoo: at each cut, such as packed.")] = None,
    cases: Annotated[
        str | None, _option("Suites of cases: some of them, with commas.")
    ] = None,
    seeds: Annotated[
        int | None, _option("Suites of cases: how many seeds, from 0 on.")
    ] = None,
    small: Annotated[
        bool, _option("A look, in minutes, as quickstart always is.", "--small")
    ] = False,
    out: OutOption = None,
    as_json: JsonOption = False,
    verbose: Annotated[bool, _option("Let Flower log.", "--verbose")] = False,
) -> None:
    """Run a suite; write its results, summary.json and report.html; print a table."""
    own = ("suite", "out", "as_json", "verbose")
    given = {
        n: v for n, v in context.params.items() if v is not None and v is not False
    }
    given = {name: value for name, value in given.items() if name not in own}
    folder = out or Path("out") / suite
    with _explained_errors():
        go_on = _prepared(suite, given)
        with only_ours_on_stdout():
            finished = go_on(folder, verbose)
        if not finished:
            _report_afresh(folder, as_json=as_json)
        _show(folder, as_json=as_json)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="A results folder, or a file that `archive` wrote.")
    ],
    as_json: JsonOption = False,
    interrupted: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Make the summary, the table and the HTML page again from the journals."""
    with _explained_errors():
        if folder.suffix == ".jsonl":
            show_lines(folder, as_json=as_json)
        else:
            _show(folder, as_json=as_json)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command()
def archive(
    folder: Annotated[Path, typer.Argument(help="The results folder of a study.")],
    hardware: Annotated[
        str, typer.Option(help="A short name of the machine, such as epyc2.")
    ],
) -> None:
    """Keep a study's lines in one small file below simulations/results."""
    with _explained_errors():
        typer.echo(keep_lines(folder, hardware=hardware))


@app.command(name="list")
def list_names() -> None:
    """List the suites and the methods."""
    table = Table("kind", "name", "what it is", box=None)
    suites = {
        name: (suite.__doc__ or "").splitlines()[0] for name, suite in SUITES.items()
    }
    suites |= {name: each.summary for name, each in MEASUREMENTS.items()}
    suites |= {name: f"{study.summary} {study.cost}" for name, study in STUDIES.items()}
    for name, text in suites.items():
        table.add_row("suite", name, text)
    for name, method in METHODS.items():
        table.add_row("method", name, method.summary)
    Console().print(table)


def _prepared(suite: str, given: dict[str, Any]) -> Run:
    """Check what was asked of a suite, and make it ready to run."""
    if suite in STUDIES:
        return _study(suite, given)
    return (_measurement if suite in MEASUREMENTS else _experiment)(suite, given)


def _study(suite: str, given: dict[str, Any]) -> Run:
    """Make a study of several cases and seeds ready to run."""
    _refuse(suite, given, _NO_STUDY & set(given))
    options = StudyOptions(
        is_small="small" in given,
        cases=_names(given["cases"]) if "cases" in given else None,
        methods=_method_names(given["methods"]) if "methods" in given else None,
        num_seeds=given.get("seeds"),
        changes=_changes(given),
    )
    cases, provenance = chosen_cases(STUDIES[suite], options), _provenance()
    return lambda folder, verbose: run_study(
        folder,
        suite,
        cases,
        is_small=options.is_small,
        provenance=provenance,
        verbose=verbose,
    )


def _measurement(suite: str, given: dict[str, Any]) -> Run:
    """Make a measurement ready to run; it measures models, and has no rounds."""
    _refuse(suite, given, set(given) - MEASUREMENTS[suite].options)
    models = given.get("models")
    options = MeasurementOptions(
        models=None if models is None else _names(models),
        is_small="small" in given,
        library=given.get("library"),
        num_models=given.get("sample"),
        codec=given.get("codec", "raw"),
        seed=given.get("seed", 0),
        num_workers=given.get("workers", 1),
        provenance=_provenance(),
    )
    return lambda folder, _: MEASUREMENTS[suite].run(folder, options)


def _experiment(suite: str, given: dict[str, Any]) -> Run:
    """Make an experiment with rounds ready to run."""
    if suite not in SUITES:
        raise ExperimentError(
            f"suite {suite!r} is unknown: choose one of "
            f"{', '.join([*SUITES, *STUDIES, *MEASUREMENTS])}."
        )
    data = given.get("data", "digits")
    data = str(Path(data).resolve()) if data.endswith(".npz") else data
    experiment = SUITES[suite](data)
    _refuse(
        suite,
        given,
        {"models", "cases", "seeds", "library", "sample", "codec"} & set(given),
    )
    changes = _changes(given)
    if "methods" in given:
        changes["methods"] = _method_names(given["methods"])
    return partial(_run, replace(experiment, **changes))


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an experiment that options replace."""
    fields = {
        "model": "model",
        "rounds": "num_rounds",
        "clients": "num_clients",
        "train_examples": "max_train_examples",
        "seed": "seed",
        "workers": "num_workers",
    }
    changes = {fields[name]: given[name] for name in fields if name in given}
    changes["data_dir"] = given.get("data_dir", Path("data")).resolve()
    return changes


def _refuse(suite: str, given: dict[str, Any], names: set[str]) -> None:
    """Refuse options that a suite would not heed."""
    if names:
        flags = ", ".join(
            f"--{name.replace('_', '-')}" for name in given if name in names
        )
        kind = "measures models and has no rounds"
        if suite in SUITES:
            kind = "trains one model in rounds"
        if suite in STUDIES:
            kind = "has cases that say this themselves"
        raise ExperimentError(f"suite {suite!r} {kind}: leave out {flags}.")


def _method_names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list and check every name in it."""
    names = _names(text)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ExperimentError(
            f"--methods names {', '.join(map(repr, unknown))}, but there are only "
            f"{', '.join(METHODS)}."
        )
    return names


def _names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list; each name counts once."""
    return tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))


def _provenance() -> Provenance:
    return Provenance.of_this_process(sys.argv[1:], now=datetime.now(UTC))


def _run(experiment: Experiment, folder: Path, verbose: bool) -> bool:
    """Run with a progress bar; return False if interrupted."""
    prepared = prepare(experiment, folder, provenance=_provenance())
    with progress_bar() as progress:
        bars = {
            name: progress.add_task(name, total=experiment.num_rounds, start=False)
            for name in experiment.methods
        }

        def on_round(method: str, evaluation: EvaluationRow) -> None:
            if evaluation.round == 0:
                progress.start_task(bars[method])
            progress.update(
                bars[method],
                completed=evaluation.round,
                description=f"{method} {percent_text(evaluation.accuracy)}",
            )

        try:
            with quiet_libraries(verbose=verbose):
                run_methods(experiment, folder, prepared=prepared, on_round=on_round)
        except KeyboardInterrupt:
            typer.echo("Interrupted: what was done so far is reported.", err=True)
            return False
    return True


def _show(folder: Path, *, as_json: bool) -> None:
    """Write the reports of a results folder and print what was found."""
    config = read_config(folder)
    problems: list[str] = []
    if MEASUREMENT in config:
        measurement = MEASUREMENTS[config[MEASUREMENT]]
        problems = measurement.show(folder, as_json=as_json)
    else:
        claims = STUDIES[config[STUDY]].claims if STUDY in config else SINGLE_CLAIMS
        show_study(folder, claims, as_json=as_json)
    Console(stderr=True).print(f"[dim]open {folder / REPORT} for the pictures[/dim]")
    if problems:
        typer.echo("\n".join(problems), err=True)
        raise typer.Exit(DIFFERS)


def _report_afresh(folder: Path, *, as_json: bool) -> NoReturn:
    """Become a process that reports what an interrupted run has left.

    In this one, Flower's server thread waits for replies for ever, and Ray may crash
    while others of its threads go on.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    options = ["--interrupted", *(["--json"] if as_json else [])]
    command = [sys.executable, "-m", "simulations", "report", str(folder), *options]
    os.execv(sys.executable, command)


@contextmanager
def _explained_errors() -> Iterator[None]:
    """End with the reason, not with a traceback, where the reader can mend it."""
    try:
        yield
    except (ExperimentError, SmartSplitError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(MISUSE) from error


if __name__ == "__main__":
    app()
