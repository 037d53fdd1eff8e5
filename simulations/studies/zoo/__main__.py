"""Every torchvision model, cut and compared: ``python -m simulations.studies.zoo``.

``prove`` trains each classifier whole in a plain loop and along cut routes, over the
bytes of the wire, compares to the last bit, and sets predicted against measured peaks.
``table`` reads every model as a chain and writes docs/models.md.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Table

from simulations.studies.zoo.cases import (
    SUBSET,
    Outcome,
    all_cases,
    classifiers,
    read_outcomes,
    run_case,
)
from simulations.studies.zoo.reading import page, readings

app = typer.Typer(
    help="Read, cut and compare every torchvision classifier.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelsOption = Annotated[str, typer.Option(help="all, subset, or names with commas.")]
OutOption = Annotated[
    Path | None, typer.Option(help="JSON lines; cases that are there are not run.")
]
WorkersOption = Annotated[int, typer.Option(help="Processes, a core each.")]
SeedOption = Annotated[int, typer.Option(help="Chooses the random cuts and batches.")]


@app.command()
def prove(
    models: ModelsOption = "all",
    out: OutOption = None,
    workers: WorkersOption = 1,
    seed: SeedOption = 0,
) -> None:
    """Compare cut with stock training, bit for bit; exit 1 if anything differs."""
    groups = {"all": classifiers(), "subset": list(SUBSET)}
    names = groups.get(models) or models.split(",")
    done = read_outcomes(out)
    known = {(outcome.model, outcome.optimizer) for outcome in done}
    cases = [
        case
        for case in all_cases(names, seed=seed)
        if (case.model, case.optimizer) not in known
    ]
    outcomes = [outcome for outcome in done if outcome.model in names]
    # One process per case: what a model leaves behind harms no other.
    context = multiprocessing.get_context("spawn")
    with (
        _progress() as progress,
        ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool,
    ):
        bar = progress.add_task("models", total=len(cases))
        for future in as_completed([pool.submit(run_case, case) for case in cases]):
            outcome = future.result()
            outcomes.append(outcome)
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.write(outcome.to_json() + "\n")
            progress.update(bar, advance=1, description=outcome.model)
    Console().print(outcome_table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.differences]
    for outcome in failed:
        for text in outcome.differences[:5]:
            Console().print(f"{outcome.model}, {outcome.optimizer}: {text}")
    raise typer.Exit(1 if failed else 0)


WriteOption = Annotated[
    Path | None, typer.Option(help="Where the page goes; printed if not given.")
]
ProofOption = Annotated[
    Path | None, typer.Option(help="What `prove --out` wrote, for two more columns.")
]


@app.command()
def table(write: WriteOption = None, proof: ProofOption = None) -> None:
    """Read every model of torchvision as a chain, and write the page about it."""
    with _progress() as progress:
        found = []
        bar = progress.add_task("models", total=None)
        for reading in readings():
            found.append(reading)
            progress.update(bar, advance=1, description=reading.model)
    packages = ("torch", "torchvision")
    origin = ", ".join(f"{name} {version(name)}" for name in packages)
    text = page(found, read_outcomes(proof), origin=origin)
    if write is None:
        sys.stdout.write(text)
    else:
        write.write_text(text, encoding="utf-8")
    cut = sum(reading.num_units > 1 for reading in found)
    Console(stderr=True).print(f"{cut} of {len(found)} models can be cut.")


def outcome_table(outcomes: list[Outcome]) -> Table:
    """Lay out what was compared, a line for each model and optimizer."""
    table = Table("model", "optimizer", "cuts compared", "differ", "worst prediction")
    for outcome in sorted(outcomes, key=lambda o: (o.model, o.optimizer)):
        table.add_row(
            outcome.model,
            outcome.optimizer,
            f"{outcome.num_cuts} of {outcome.num_units}",
            str(len(outcome.differences)),
            f"{outcome.worst_error:.3%}",
        )
    cuts = sum(outcome.num_cuts for outcome in outcomes)
    differ = sum(len(outcome.differences) for outcome in outcomes)
    worst = max((outcome.worst_error for outcome in outcomes), default=0.0)
    num_models = len({outcome.model for outcome in outcomes})
    table.add_section()
    table.add_row(f"{num_models} models", "", str(cuts), str(differ), f"{worst:.3%}")
    return table


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


if __name__ == "__main__":
    app()
