"""Faults, long runs and strangers.

``python -m simulations.faults table | kill | soak | deployment | stranger``.
"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from simulations.faults import deployment, killed, soak
from simulations.faults import stranger as strangers
from simulations.faults import table as faults
from simulations.faults.run import APIS

app = typer.Typer(
    help="Inject faults for real, and run for long, on loopback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
ApiOption = Annotated[str, typer.Option(help="message or legacy.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print rows as JSON.")]


def _checked(api: str) -> str:
    if api not in APIS:
        raise typer.BadParameter(f"--api is {api!r}: choose message or legacy.")
    return api


@app.command()
def table(
    *,
    api: ApiOption = "message",
    small: Annotated[bool, typer.Option("--small", help="Some of them.")] = False,
    only: Annotated[str, typer.Option(help="Those with this in their name.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Inject each fault into a run of three clients, and compare the final weights."""
    cases = faults.chosen(small=small, only=only)
    rows = faults.rows_of(
        cases,
        api=_checked(api),
        on_row=lambda row: _note(f"{row.fault}: {row.weights} {row.problems or ''}"),
    )
    if as_json:
        sys.stdout.write(json.dumps([*faults.as_values(rows)]) + "\n")
    else:
        Console(width=200).print(faults.shown(rows))
    if any(row.problems for row in rows):
        raise typer.Exit(1)


@app.command()
def kill(
    *,
    moments: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of each run.")] = 10,
    api: Annotated[str, typer.Option(help="message, legacy or both.")] = "both",
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Kill a run's ServerApp at random moments, resume it, and compare the bits."""
    found = [
        each
        for name in (APIS if api == "both" else (_checked(api),))
        for each in killed.kills(
            name, num_moments=moments, num_rounds=rounds, seed=seed, on_kill=_note
        )
    ]
    if as_json:
        sys.stdout.write(json.dumps([*map(asdict, found)]) + "\n")
    else:
        Console(width=120).print(killed.shown(found))
    if not all(each.is_same and not each.problems for each in found):
        raise typer.Exit(1)


@app.command(name="soak")
def run_soak(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="How many.")] = 200,
    clients: Annotated[int, typer.Option(min=2, help="How many.")] = 20,
    out: Annotated[Path, typer.Option(help="A new folder.")] = Path("out/soak"),
    as_json: JsonOption = False,
) -> None:
    """Run for long, restart the edge every 20 rounds, and watch what is held."""
    out.mkdir(parents=True)
    samples, problems = soak.soak(out, num_rounds=rounds, num_clients=clients)
    if as_json:
        found = {"samples": samples, "problems": problems}
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        table = Table("", "rounds 21 to 40", "the last 20", "maximum", box=None)
        for row in soak.summary(samples):
            table.add_row(*row)
        Console(width=100).print(table, *problems, f"open {out / soak.PICTURE}")
    if problems:
        raise typer.Exit(1)


@app.command(name="deployment")
def kill_in_deployment(
    *,
    only: Annotated[str, typer.Option(help="Those with this in their name.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Kill Flower's processes in examples/deployment; about two minutes each."""
    with redirect_stdout(sys.stderr):
        found = deployment.losses(only, on_loss=_note)
    if as_json:
        sys.stdout.write(json.dumps([*map(asdict, found)]) + "\n")
    else:
        Console(width=160).print(deployment.shown(found))


@app.command()
def stranger(*, as_json: JsonOption = False) -> None:
    """Try all open ports of examples/deployment without a secret."""
    with redirect_stdout(sys.stderr):
        found, still_runs = strangers.at_the_example()
    problems = strangers.problems(found)
    problems += [] if still_runs else ["the run fails afterwards"]
    if as_json:
        sys.stdout.write(json.dumps([*map(asdict, found)]) + "\n")
    else:
        Console(width=120).print(strangers.shown(found), *problems)
    if problems:
        raise typer.Exit(1)


def _note(what: object) -> None:
    typer.echo(what, err=True)


if __name__ == "__main__":
    app()
