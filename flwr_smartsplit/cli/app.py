"""The command line: ``smartsplit profile``, ``plan``, ``check`` and ``edge MODEL``.

Torch and the reports are imported where they are needed, so that help and most mistakes
are answered at once.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from flwr_smartsplit.cli.arguments import (
    BadArgument,
    choose_cut,
    choose_cuts,
    parse_bytes,
    parse_codec,
    parse_shape,
)
from flwr_smartsplit.errors import NoFeasiblePlan, SmartSplitError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flwr_smartsplit.cli.check_report import CheckReport
    from flwr_smartsplit.cli.subject import Subject

DIFFERENT = INFEASIBLE = 1
MISUSE = 2
PIPED_WIDTH = 10_000
MAX_SEED = 2**63

app = typer.Typer(
    help="Show what a model costs a device at each cut; prove that cuts are exact; "
    "serve as an edge.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# The commands' docstrings explain MODEL: typer 0.20 under click 8.5 drops its help.
ModelArgument = Annotated[str, typer.Argument(show_default=False)]
InputOption = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Shape of one input without the batch, such as 3x32x32. Default for "
        "torchvision: 3x224x224.",
    ),
]
BatchSizeOption = Annotated[int, typer.Option(help="Examples per training step.")]
OptimizerOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="sgd (default), momentum or adam.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print only JSON on stdout, no table.")
]
CodecOption = Annotated[
    str,
    typer.Option(
        metavar="CODEC",
        help="What crosses the cuts is written by: raw, packed, float16, bfloat16, "
        "integer:8, integer:4 or topk:0.1.",
    ),
]
BudgetOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Show what fits, such as 64MiB.")
]
CutOption = Annotated[
    str | None,
    typer.Option(
        metavar="CUT",
        help="Plan one cut for the budget: its number, its last unit, or whole.",
    ),
]
CutsOption = Annotated[
    str,
    typer.Option(
        metavar="CUTS",
        help="all, or with commas: first, middle, last, a number, random:N.",
    ),
]
CacheDirOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Cache profiles in this folder.")
]
PlotOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also draw a .png, .svg or .pdf.")
]


@app.command()
def profile(
    model: ModelArgument,
    *,
    input_shape: InputOption = None,
    batch_size: BatchSizeOption = 32,
    optimizer: OptimizerOption = None,
    budget: BudgetOption = None,
    codec: CodecOption = "raw",
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Show what each unit costs, and what a device needs that ends with it.

    MODEL is torchvision:NAME, or package.module:function; the function returns an
    nn.Module or a flwr_smartsplit.Task. A dry run finds the costs: nothing is trained
    and no memory is taken.
    """
    with _explained_errors():
        budget_bytes = parse_bytes(budget) if budget is not None else None
        _check_plot(plot)
        subject = _subject(
            model, input_shape, batch_size, optimizer, cache_dir, codec=codec
        )
        from flwr_smartsplit.cli.profile_report import ProfileReport

        report = ProfileReport(subject=subject, budget_bytes=budget_bytes)
        _print(report.as_json() if as_json else report.for_people())
        if plot is not None:
            from flwr_smartsplit.cli.profile_plot import profile_figure

            _save_plot(plot, profile_figure, report)


@app.command()
def plan(
    model: ModelArgument,
    *,
    input_shape: InputOption = None,
    batch_size: BatchSizeOption = 32,
    optimizer: OptimizerOption = None,
    budget: BudgetOption = None,
    cut: CutOption = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Show which cuts and recomputations are worth it, and recommend one.

    MODEL is torchvision:NAME, or package.module:function; the function returns an
    nn.Module or a flwr_smartsplit.Task. Nothing is trained. The exit code is 1 if
    nothing fits the budget.
    """
    with _explained_errors():
        budget_bytes = parse_bytes(budget) if budget is not None else None
        if cut is not None and (budget is None or plot is not None):
            raise BadArgument("--cut needs --budget, and has no --plot.")
        _check_plot(plot)
        subject = _subject(model, input_shape, batch_size, optimizer, cache_dir)
        from flwr_smartsplit.cli.plan_report import front_report, route_report

        if cut is not None and budget_bytes is not None:
            names = [unit.name for unit in subject.profile.units]
            chosen = choose_cut(cut, unit_names=names)
            with _waiting("planning"):
                one_route = route_report(subject, chosen, budget_bytes=budget_bytes)
            _print(one_route.as_json() if as_json else one_route.for_people())
            return
        with _bar() as bar:
            report = front_report(
                subject,
                lambda routes: bar.track(routes, description="routes"),
                budget_bytes=budget_bytes,
            )
        _print(report.as_json() if as_json else report.for_people())
        if plot is not None:
            from flwr_smartsplit.cli.plan_plot import plan_figure

            _save_plot(plot, plan_figure, report)


@app.command()
def check(
    model: ModelArgument,
    *,
    input_shape: InputOption = None,
    batch_size: BatchSizeOption = 3,
    optimizer: OptimizerOption = None,
    cuts: CutsOption = "first,middle,last",
    codec: CodecOption = "raw",
    seed: Annotated[int, typer.Option(help="Draws batches and random cuts.")] = 0,
    tolerance: Annotated[
        float, typer.Option(help="Accepted relative error of a predicted peak.")
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Train whole and cut, and compare every number and every predicted peak.

    MODEL is torchvision:NAME, or package.module:function; the function returns an
    nn.Module or a flwr_smartsplit.Task, which is compared without its defence. The exit
    code is 1 if anything differs.
    """
    with _explained_errors():
        if not tolerance >= 0:
            raise BadArgument(f"--tolerance {tolerance} is not at least 0.")
        if not 0 <= seed < MAX_SEED:
            raise BadArgument(f"--seed {seed} is not in 0..{MAX_SEED - 1}.")
        subject = _subject(
            model, input_shape, batch_size, optimizer, is_stock=True, codec=codec
        )
        num_units = len(subject.profile.units)
        chosen = choose_cuts(cuts, num_units=num_units, rng=Random(seed))
        report = _check(subject, chosen, seed=seed, tolerance=tolerance)
        _print(report.as_json() if as_json else report.for_people())
    if not report.is_good:
        raise typer.Exit(DIFFERENT)


# longer than 40 lines because each option has a line, and says what it is
@app.command()
def edge(
    model: ModelArgument,
    *,
    name: Annotated[str, typer.Option(help="The edge's name in routes.")] = "edge",
    host: Annotated[
        str, typer.Option(help="Address of this machine to listen at; 0.0.0.0: all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen at; 0 takes a free one.")
    ] = 50051,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate chain, as PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its private key, as PEM.")
    ] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Let only those in who have a certificate of these authorities.",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS; on loopback only.")
    ] = False,
    insecure_anywhere: Annotated[
        bool, typer.Option("--insecure-anywhere", help="No TLS, at any address.")
    ] = False,
    admin_secret_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Secret with which strategies begin runs."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For sessions, such as 8GiB.")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For sealed tails, as 50GiB.")
    ] = None,
    spill: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Held states and sealed tails. Default: "
            "~/.local/state/smartsplit/NAME.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "cpu",
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve /metrics and /healthz at this port.")
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(help="Where to serve them.")
    ] = "127.0.0.1",
    max_runs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 8,
    max_connections: Annotated[
        int, typer.Option(min=2, help="Clients and strategies at the same time.")
    ] = 512,
    lease: Annotated[
        float, typer.Option(min=1, help="Seconds until a silent run is deleted.")
    ] = 86_400.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds until a lost client's session is.")
    ] = 60.0,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds for open sessions after SIGTERM.")
    ] = 300.0,
) -> None:
    """Serve as an edge on a network, until SIGTERM or Ctrl-C.

    MODEL is package.module:function; the function returns the flwr_smartsplit.Task that
    strategy and clients have, too. One line says when the edge is ready. On SIGTERM it
    finishes open sessions, and takes no new ones. The exit code is 1 if some were cut
    off.
    """
    options = dict(locals())
    with _explained_errors():
        from flwr_smartsplit.cli.edge_command import EdgeOptions, serve

        code = serve(EdgeOptions(**options))
    raise typer.Exit(code)


def _subject(
    model: str,
    input_shape: str | None,
    batch_size: int,
    optimizer: str | None,
    cache_dir: Path | None = None,
    *,
    is_stock: bool = False,
    codec: str = "raw",
) -> "Subject":
    """Read and profile MODEL; what its code prints goes to stderr."""
    if batch_size < 1:
        raise BadArgument(f"--batch-size {batch_size} is less than 1.")
    shape = parse_shape(input_shape) if input_shape is not None else None
    chosen = parse_codec(codec)
    if cache_dir is not None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadArgument(
                f"--cache-dir {cache_dir} is not a folder: {error}."
            ) from error
    with redirect_stdout(sys.stderr), _waiting(f"profiling {model}"):
        from flwr_smartsplit.cli.subject import read_subject

        return read_subject(
            model,
            input_shape=shape,
            batch_size=batch_size,
            optimizer=optimizer,
            cache_dir=cache_dir,
            is_stock=is_stock,
            codec=chosen,
        )


def _check(
    subject: "Subject", cuts: tuple[int, ...], *, seed: int, tolerance: float
) -> "CheckReport":
    """Check the routes, with a progress bar on stderr; then a merge."""
    from flwr_smartsplit.cli.check_report import (
        CheckReport,
        check_routes,
        trained_checker,
    )

    bar = _bar()
    with redirect_stdout(sys.stderr), _waiting("training the stock model"):
        checker = trained_checker(subject, seed=seed)
    found = check_routes(subject, cuts, checker, tolerance=tolerance)
    total = len(cuts) + 1
    # Closed, or an interruption would leave the edge's folder behind.
    with closing(found), redirect_stdout(sys.stderr), bar:
        results = list(bar.track(found, total=total, description="routes"))
    return CheckReport(
        subject=subject,
        seed=seed,
        results=results,
        merge_differences=checker.merge_differences(),
    )


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
        console=Console(stderr=True),
    )


@contextmanager
def _waiting(message: str) -> Iterator[None]:
    """Show on stderr that work is going on, if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(message):
        yield


def _check_plot(path: Path | None) -> None:
    """Refuse a plot that could not be drawn, before anything is computed."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise BadArgument(
            "--plot needs matplotlib: pip install 'flwr-smartsplit[plot]'."
        )
    if path.suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise BadArgument(f"--plot {path} is not a .png, .svg or .pdf file.")
    if not path.parent.is_dir():
        raise BadArgument(f"--plot {path}: there is no folder {path.parent}.")


def _save_plot(path: Path, draw: "Callable[[Any], Figure]", report: Any) -> None:
    """Draw a report, write the picture, and say so on stderr."""
    from matplotlib import rc_context

    from flwr_smartsplit.cli.profile_plot import STYLE

    try:
        with rc_context(STYLE):
            draw(report).savefig(path, dpi=120)
    except OSError as error:
        raise BadArgument(f"--plot {path} cannot be written: {error}") from error
    typer.echo(f"Wrote {path}.", err=True)


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
    """Turn an error that the user can fix into one line and an exit code."""
    try:
        yield
    except SmartSplitError as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        is_infeasible = isinstance(error, NoFeasiblePlan)
        raise typer.Exit(INFEASIBLE if is_infeasible else MISUSE) from None


def main() -> None:
    """Run the command line."""
    app(prog_name="smartsplit")
