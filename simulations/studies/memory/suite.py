"""How small the device's part of a step gets, model by model, against the whole step.

A results folder has ``config.json``, a line of ``rows.jsonl`` for each model and size
of image, and what is made from them. A run goes on where an earlier one stopped.
"""

import json
import sys
from collections.abc import Sequence
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
from simulations.studies.memory.cases import MemoryCase, memory_cases
from simulations.studies.memory.measuring import MemoryRow, measure_case
from simulations.studies.memory.reports import headline, html_page, memory_table

ROWS = "rows.jsonl"
PROFILES = "profiles"


def run(folder: Path, options: MeasurementOptions) -> bool:
    """Measure the cases that the folder does not have; return False if interrupted."""
    cases = memory_cases(options.models, is_small=options.is_small, seed=options.seed)
    _prepare(folder, options.provenance)
    known = {row.key for row in read_rows(folder)}
    wanted = [c for c in cases if (c.model, c.input_side, c.seed) not in known]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _measure(folder, wanted)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: run it again to go on from here.\n")
        return False
    finally:
        torch.set_num_threads(threads)
    return True


def show(folder: Path, *, as_json: bool) -> None:
    """Write summary and page again from the rows, and print the table."""
    config = read_config(folder)
    rows = read_rows(folder)
    summary = {"rows": [row.values() for row in rows]}
    _write(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    _write(folder / REPORT, html_page(rows, config))
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        console = Console()
        console.print(f"{headline(rows)}\n")
        console.print(memory_table(rows))


def read_rows(folder: Path) -> list[MemoryRow]:
    """Read the finished rows; a line that an interrupt cut short is not one."""
    return [MemoryRow.from_json(line) for line in finished_lines(folder / ROWS)]


def _prepare(folder: Path, provenance: Any) -> None:
    """Start a results folder, or make sure that it is one to go on with.

    Raises
    ------
    ExperimentError
        If it holds other results, or cannot be written to.
    """
    before = read_config(folder)
    versions = provenance["versions"]
    if before and before.get(MEASUREMENT) != "memory":
        raise ExperimentError(
            f"{str(folder)!r} holds results of another suite: name another folder with "
            "--out."
        )
    if before and before["versions"] != versions:
        raise ExperimentError(
            f"{str(folder)!r} was begun with {before['versions']}, this is {versions}: "
            "name another folder with --out, or remove it."
        )
    begin_folder(folder, {MEASUREMENT: "memory", **provenance}, rows=ROWS)


def _measure(folder: Path, cases: Sequence[MemoryCase]) -> None:
    """Measure one case after the other, and write each down at once."""
    with progress_bar() as progress:
        bar = progress.add_task("models", total=len(cases))
        for case in cases:
            progress.update(bar, description=case.title)
            row = measure_case(case, cache_dir=folder / PROFILES)
            with (folder / ROWS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row.values()) + "\n")
            progress.advance(bar)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
