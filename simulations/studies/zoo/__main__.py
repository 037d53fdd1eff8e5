"""Write docs/models.md: ``python -m simulations.studies.zoo --write docs/models.md``.

It reads every model of torchvision as a chain. What ``python -m simulations run zoo``
compared fills two more columns.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from simulations.report.progress import progress_bar
from simulations.studies.zoo.cases import read_outcomes
from simulations.studies.zoo.reading import page, readings


def main(
    write: Annotated[
        Path | None, typer.Option(help="Where the page goes; printed if not given.")
    ] = None,
    proof: Annotated[
        Path | None, typer.Option(help="The rows.jsonl of a run of the suite zoo.")
    ] = None,
) -> None:
    """Read every model of torchvision as a chain, and write the page about it."""
    found = []
    with progress_bar() as progress:
        bar = progress.add_task("models", total=None)
        for reading in readings():
            found.append(reading)
            progress.update(bar, advance=1, description=reading.model)
    origin = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
    text = page(found, read_outcomes(proof), origin=origin)
    if write is None:
        sys.stdout.write(text)
    else:
        write.write_text(text, encoding="utf-8")
    cut = sum(reading.num_units > 1 for reading in found)
    typer.echo(f"{cut} of {len(found)} models can be cut.", err=True)


if __name__ == "__main__":
    typer.run(main)
