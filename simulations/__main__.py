"""The command line: ``python -m simulations run NAME | report DIR | list``."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Table

from flwr_smartsplit.errors import SmartSplitError
from simulations.errors import ExperimentError
from simulations.experiment import Experiment
from simulations.methods import METHODS
from simulations.provenance import Provenance
from simulations.reporting import REPORT, comparison_table, write_reports
from simulations.rows import EvaluationRow
from simulations.runner import run_experiment
from simulations.suites import SUITES
from simulations.summary import percent_text, read_results

MISUSE, INTERRUPTED = 2, 130

app = typer.Typer(
    help="Simulate fleets of weak devices and compare methods to train them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def run(  # noqa: PLR0913 - one argument per option of the command line
    suite: Annotated[str, typer.Argument(help="A suite that `list` names.")],
    *,
    data: Annotated[
        str, typer.Option(help="digits, fashion_mnist, cifar10 or FILE.npz.")
    ] = "digits",
    data_dir: Annotated[
        Path, typer.Option(help="Where torchvision's data sets are, or go.")
    ] = Path("data"),
    model: Annotated[
        str | None, typer.Option(help="small or torchvision:NAME.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of training.")] = None,
    clients: Annotated[int | None, typer.Option(help="Clients in the fleet.")] = None,
    train_examples: Annotated[
        int | None, typer.Option(help="Training examples to use at most.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Root of all chance.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Clients that train at once, a CPU each.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names that `list` shows, with commas.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Results folder [default: out/SUITE].")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON only.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Let Flower log.")] = False,
) -> None:
    """Run a suite; write journals, summary.json and report.html; print a table."""
    with _explained_errors():
        if suite not in SUITES:
            raise ExperimentError(
                f"suite {suite!r} is unknown: choose one of {', '.join(SUITES)}."
            )
        given = {
            "model": model,
            "num_rounds": rounds,
            "num_clients": clients,
            "max_train_examples": train_examples,
            "seed": seed,
            "num_workers": workers,
            "methods": _method_names(methods) if methods is not None else None,
            "data_dir": data_dir.resolve(),
        }
        experiment = replace(
            SUITES[suite](data),
            **{name: value for name, value in given.items() if value is not None},
        )
        folder = out or Path("out") / suite
        with _only_ours_on_stdout():
            finished = _run(experiment, folder, verbose=verbose)
        _show(folder, as_json=as_json)
    if not finished:
        # Flower's server thread waits for replies that will not come.
        sys.stdout.flush()
        os._exit(INTERRUPTED)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON only.")
    ] = False,
) -> None:
    """Make the summary, the table and the HTML page again from the journals."""
    with _explained_errors():
        _show(folder, as_json=as_json)


@app.command(name="list")
def list_names() -> None:
    """List the suites and the methods."""
    table = Table("kind", "name", "what it is", box=None)
    for name, suite in SUITES.items():
        table.add_row("suite", name, (suite.__doc__ or "").splitlines()[0])
    for name, method in METHODS.items():
        table.add_row("method", name, method.summary)
    Console().print(table)


def _method_names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list and check every name in it."""
    names = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ExperimentError(
            f"--methods names {', '.join(map(repr, unknown))}, which is not among "
            f"{', '.join(METHODS)}."
        )
    return names


def _run(experiment: Experiment, folder: Path, *, verbose: bool) -> bool:
    """Run with a progress bar; return False if interrupted."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        Elapsed(),
        console=Console(stderr=True),
    )
    bars = {
        name: progress.add_task(
            name, total=experiment.num_rounds, start=False, accuracy=""
        )
        for name in experiment.methods
    }

    def on_round(method: str, evaluation: EvaluationRow) -> None:
        if evaluation.round == 0:
            progress.start_task(bars[method])
        progress.update(
            bars[method],
            completed=evaluation.round,
            accuracy=percent_text(evaluation.accuracy),
        )

    provenance = Provenance.of_this_process(sys.argv[1:], now=datetime.now(UTC))
    try:
        with progress:
            run_experiment(
                experiment,
                folder,
                provenance=provenance,
                on_round=on_round,
                verbose=verbose,
            )
    except KeyboardInterrupt:
        return False
    return True


def _show(folder: Path, *, as_json: bool) -> None:
    """Write the reports of a results folder and print what was found."""
    results = read_results(folder)
    write_reports(results, folder)
    if as_json:
        sys.stdout.write(json.dumps(results.summary()) + "\n")
    else:
        Console().print(comparison_table(results))
    Console(stderr=True).print(f"[dim]open {folder / REPORT} for the pictures[/dim]")


@contextmanager
def _explained_errors() -> Iterator[None]:
    """End with the reason, not with a traceback, where the reader can mend it."""
    try:
        yield
    except (ExperimentError, SmartSplitError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(MISUSE)


@contextmanager
def _only_ours_on_stdout() -> Iterator[None]:
    """Send what other programs and libraries print to stderr, whatever way they do.

    Ray's processes and torchvision's downloads write to the file descriptor itself.
    """
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)


if __name__ == "__main__":
    app()
