"""What grows with the number of clients: an edge's memory and disk, and a round.

A results folder has ``config.json``, a line of ``rows.jsonl`` for each measurement, and
what is made from them. A run goes on where an earlier one stopped.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from simulations.experiments.errors import ExperimentError
from simulations.report.reporting import REPORT, SUMMARY
from simulations.studies.measurement import (
    MEASUREMENT,
    MeasurementOptions,
    begin_folder,
    finished_lines,
    progress_bar,
    read_config,
)
from simulations.studies.scale.items import scale_items
from simulations.studies.scale.reports import headline, html_page, scale_table

NAME, ROWS, IS_SMALL = "scale", "rows.jsonl", "is_small"


def run(folder: Path, options: MeasurementOptions) -> bool:
    """Measure what the folder does not have yet; return False if interrupted."""
    if options.models is not None:
        raise ExperimentError(
            "suite 'scale' has models of its own: leave out --models."
        )
    _prepare(folder, options)
    known = {(row["part"], row["key"]) for row in read_rows(folder)}
    wanted = [i for i in scale_items(options) if (i.part, i.key) not in known]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress_bar() as progress:
            bar = progress.add_task("scale", total=len(wanted))
            for item in wanted:
                progress.update(bar, description=item.title)
                row = {"part": item.part, "key": item.key, **item.measure(folder)}
                with (folder / ROWS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                progress.advance(bar)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: run it again to go on from here.\n")
        return False
    finally:
        torch.set_num_threads(threads)
    return True


def show(folder: Path, *, as_json: bool) -> None:
    """Write summary and page again from the rows, and print the table."""
    summary = summary_of(read_rows(folder))
    _write(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    _write(folder / REPORT, html_page(summary, read_config(folder)))
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        console = Console()
        console.print(f"{headline(summary)}\n")
        console.print(scale_table(summary))


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the rows together, by part and, where a part has several, by key.

    Examples
    --------
    >>> summary_of([{"part": "a", "key": "", "x": 1}, {"part": "b", "key": "k"}])
    {'a': {'x': 1}, 'b': {'k': {}}}
    """
    summary: dict[str, Any] = {}
    for row in rows:
        values = {name: v for name, v in row.items() if name not in ("part", "key")}
        if row["key"]:
            summary.setdefault(row["part"], {})[row["key"]] = values
        else:
            summary[row["part"]] = values
    return summary


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the finished rows; a line that an interrupt cut short is not one."""
    return [json.loads(line) for line in finished_lines(folder / ROWS)]


def _prepare(folder: Path, options: MeasurementOptions) -> None:
    """Start a results folder, or make sure that it is one to go on with.

    Raises
    ------
    ExperimentError
        If it holds other results, or cannot be written to.
    """
    before = read_config(folder)
    same = {MEASUREMENT: NAME, IS_SMALL: options.is_small}
    same["versions"] = options.provenance["versions"]
    if before and {name: before.get(name) for name in same} != same:
        raise ExperimentError(
            f"{str(folder)!r} holds results of another suite, of other versions, or of "
            "the other size: name another folder with --out, or remove it."
        )
    begin_folder(folder, {**options.provenance, **same}, rows=ROWS)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
