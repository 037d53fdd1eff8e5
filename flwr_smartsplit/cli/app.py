"""The command line: ``smartsplit profile``, ``plan`` and ``check MODEL``.

Torch is loaded by what a command needs, inside it, so that help and most mistakes are
answered at once.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from flwr_smartsplit.cli.arguments import (
    BadArgument,
    check_batch_size,
    choose_cut,
    choose_cuts,
    parse_bytes,
    parse_shape,
)
from flwr_smartsplit.errors import NoFeasiblePlan, SmartSplitError

if TYPE_CHECKING:
    from flwr_smartsplit.cli.check_report import RouteResult
    from flwr_smartsplit.cli.plan_report import FrontReport, RouteReport
    from flwr_smartsplit.cli.subject import Subject

DIFFERENT = INFEASIBLE = 1
MISUSE = 2
PIPED_WIDTH = 10_000
MAX_SEED = 2**63

app = typer.Typer(
    help="What a model costs a device at each cut, and proof that cuts are exact.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# Explained in the commands' own words: typer 0.20 under click 8.5 drops its help.
ModelArgument = Annotated[str, typer.Argument(show_default=False)]
InputOption = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="One input without the batch, such as 3x32x32; 3x224x224 for "
        "torchvision if not given.",
    ),
]
BatchSizeOption = Annotated[int, typer.Option(help="Examples per training step.")]
OptimizerOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="sgd (if not given), momentum or adam."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")
]

BudgetOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Say what fits, such as 64MiB.")
]
CacheDirOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Keep profiles here for next time.")
]
PlotOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw a .png, .svg or .pdf, too.")
]


@app.command()
def profile(  # noqa: PLR0913 - one argument per option of the command line
    model: ModelArgument,
    *,
    input_shape: InputOption = None,
    batch_size: BatchSizeOption = 32,
    optimizer: OptimizerOption = None,
    budget: BudgetOption = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Show what each unit costs, and what a device needs that ends with it.

    MODEL is torchvision:NAME, or package.module:function; the function returns an
    nn.Module or a flwr_smartsplit.Task. Nothing is trained and no memory is taken: the
    costs are found by a dry run.
    """
    with _explained_errors():
        budget_bytes = parse_bytes(budget) if budget is not None else None
        if plot is not None:
            _check_picture(plot)
        subject = _subject(
            model,
            input_shape,
            batch_size,
            optimizer=optimizer,
            cache_dir=_folder(cache_dir),
        )
        from flwr_smartsplit.cli.profile_report import ProfileReport  # noqa: PLC0415

        report = ProfileReport(subject=subject, budget_bytes=budget_bytes)
        _print(report.as_json() if as_json else report.for_people())
        if plot is not None:
            from flwr_smartsplit.cli.profile_plot import save_plot  # noqa: PLC0415

            with _written(plot):
                save_plot(report, plot)


@app.command()
def plan(  # noqa: PLR0913 - one argument per option of the command line
    model: ModelArgument,
    *,
    input_shape: InputOption = None,
    batch_size: BatchSizeOption = 32,
    optimizer: OptimizerOption = None,
    budget: BudgetOption = None,
    cut: Annotated[
        str | None,
        typer.Option(
            metavar="CUT",
            help="Plan this one for the budget: a number, its last unit, or whole.",
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Show which cuts and recomputations are worth it, and which to take.

    MODEL is torchvision:NAME, or package.module:function; the function returns an
    nn.Module or a flwr_smartsplit.Task. Nothing is trained. Ends with 1 if nothing fits
    the budget.
    """
    with _explained_errors():
        budget_bytes = parse_bytes(budget) if budget is not None else None
        _check_plan_options(cut, budget=budget, plot=plot)
        subject = _subject(
            model,
            input_shape,
            batch_size,
            optimizer=optimizer,
            cache_dir=_folder(cache_dir),
        )
        if cut is not None and budget_bytes is not None:
            report: FrontReport | RouteReport = _planned(subject, cut, budget_bytes)
            _print(report.as_json() if as_json else report.for_people())
            return
        report = _front(subject, budget_bytes)
        _print(report.as_json() if as_json else report.for_people())
        if plot is not None:
            from flwr_smartsplit.cli.plan_plot import save_plot  # noqa: PLC0415

            with _written(plot):
                save_plot(report, plot)


@app.command()
def check(  # noqa: PLR0913 - one argument per option of the command line
    model: ModelArgument,
    *,
    input_shape: InputOption = None,
    batch_size: BatchSizeOption = 3,
    optimizer: OptimizerOption = None,
    cuts: Annotated[
        str,
        typer.Option(
            metavar="CUTS",
            help="all, or with commas: first, middle, last, a number, random:N.",
        ),
    ] = "first,middle,last",
    seed: Annotated[int, typer.Option(help="Draws the batches and random cuts.")] = 0,
    tolerance: Annotated[
        float,
        typer.Option(help="Relative error of a peak that counts as none."),
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Train whole and cut, and compare every number and every predicted peak.

    MODEL is torchvision:NAME, or package.module:function; the function returns an
    nn.Module or a flwr_smartsplit.Task. Ends with 1 if anything differs.
    """
    with _explained_errors():
        if not tolerance >= 0:
            raise BadArgument(f"--tolerance {tolerance} is not at least 0.")
        if not 0 <= seed < MAX_SEED:
            raise BadArgument(f"--seed {seed} is not in 0..{MAX_SEED - 1}.")
        subject = _subject(model, input_shape, batch_size, optimizer=optimizer)
        chosen = choose_cuts(
            cuts, num_units=len(subject.profile.units), rng=Random(seed)
        )
        results = _check(subject, chosen, seed=seed, tolerance=tolerance)
        from flwr_smartsplit.cli.check_report import CheckReport  # noqa: PLC0415

        report = CheckReport(subject=subject, seed=seed, results=results)
        _print(report.as_json() if as_json else report.for_people())
    if not report.is_good:
        raise typer.Exit(DIFFERENT)


def _subject(
    model: str,
    input_shape: str | None,
    batch_size: int,
    *,
    optimizer: str | None,
    cache_dir: Path | None = None,
) -> "Subject":
    """Read and profile MODEL; what its code prints goes to stderr."""
    check_batch_size(batch_size)
    shape = parse_shape(input_shape) if input_shape is not None else None
    with redirect_stdout(sys.stderr), _waiting(f"profiling {model}"):
        from flwr_smartsplit.cli.subject import read_subject  # noqa: PLC0415

        return read_subject(
            model,
            input_shape=shape,
            batch_size=batch_size,
            optimizer=optimizer,
            cache_dir=cache_dir,
        )


def _check(
    subject: "Subject", cuts: tuple[int, ...], *, seed: int, tolerance: float
) -> "list[RouteResult]":
    """Check the routes with a progress bar on stderr."""
    from flwr_smartsplit.cli.check_report import (  # noqa: PLC0415
        check_routes,
        trained_checker,
    )

    progress = _bar()
    with redirect_stdout(sys.stderr), _waiting("training the stock model"):
        checker = trained_checker(subject, seed=seed)
    found = check_routes(subject, cuts, checker, tolerance=tolerance)
    total = len(cuts) + 1
    # Closed, or an interruption would leave the edge's folder behind.
    with closing(found), redirect_stdout(sys.stderr), progress:
        return list(progress.track(found, total=total, description="routes"))


def _check_plan_options(
    cut: str | None, *, budget: str | None, plot: Path | None
) -> None:
    """Refuse options of ``plan`` that do not go together, or no picture."""
    if cut is not None and (budget is None or plot is not None):
        raise BadArgument("--cut needs --budget, and has no --plot.")
    if plot is not None:
        _check_picture(plot)


def _planned(subject: "Subject", cut: str, budget_bytes: int) -> "RouteReport":
    """Plan the one route that was asked for."""
    from flwr_smartsplit.cli.plan_report import route_report  # noqa: PLC0415

    names = [unit.name for unit in subject.profile.units]
    chosen = choose_cut(cut, unit_names=names)
    with _waiting("planning"):
        return route_report(subject, chosen, budget_bytes=budget_bytes)


def _front(subject: "Subject", budget_bytes: int | None) -> "FrontReport":
    """Plan all routes with a progress bar on stderr."""
    from flwr_smartsplit.cli.plan_report import (  # noqa: PLC0415
        front_report,
        planned_options,
        planned_routes,
    )

    routes = planned_routes(subject)
    with _bar() as progress:
        options = [
            option
            for route in progress.track(routes, description="routes")
            for option in planned_options(subject, route)
        ]
    return front_report(subject, tuple(options), budget_bytes=budget_bytes)


def _bar() -> Progress:
    """Make a progress bar on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
        console=Console(stderr=True),
    )


@contextmanager
def _written(picture: Path) -> Iterator[None]:
    """Say that a picture was written, or why not."""
    try:
        yield
    except OSError as error:
        raise BadArgument(f"--plot {picture} cannot be written: {error}") from error
    typer.echo(f"Wrote {picture}.", err=True)


@contextmanager
def _waiting(message: str) -> Iterator[None]:
    """Show on stderr that something goes on, if a person looks."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(message):
        yield


def _folder(path: Path | None) -> Path | None:
    """Make a folder, or say why not."""
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadArgument(f"--cache-dir {path} is no folder: {error}.") from error
    return path


def _check_picture(path: Path) -> None:
    """Refuse a picture that could not be drawn, before anything is computed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BadArgument(
            "--plot needs matplotlib: pip install 'flwr-smartsplit[plot]'."
        )
    if path.suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise BadArgument(f"--plot {path} is no .png, .svg or .pdf file.")
    if not path.parent.is_dir():
        raise BadArgument(f"--plot {path}: there is no folder {path.parent}.")


def _print(result: str | RenderableType) -> None:
    """Print JSON as it is, or a table as wide as the terminal; a file has no width."""
    if isinstance(result, str):
        sys.stdout.write(result + "\n")
        return
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(result)


@contextmanager
def _explained_errors() -> Iterator[None]:
    """End with the reason in one line, where the reader can mend it."""
    try:
        yield
    except SmartSplitError as error:
        is_infeasible = isinstance(error, NoFeasiblePlan)
        _fail(" ".join(str(error).split()), INFEASIBLE if is_infeasible else MISUSE)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line."""
    app(prog_name="smartsplit")
