"""Measurement: a suite that measures one item after the other, without rounds.

A results folder has ``config.json``, a line of ``rows.jsonl`` for each item, and what
is made from them. A run goes on where an earlier one stopped.
"""

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flwr_smartsplit.train.threads import torch_threads
from simulations.experiments.provenance import Provenance
from simulations.report.pages import (
    REPORT,
    SUMMARY,
    Section,
    html_page,
    settings_rows,
    terminal,
    terminal_table,
)
from simulations.report.progress import progress_bar
from simulations.report.summary import methods_object
from simulations.studies.folder import MEASUREMENT, begin_folder, read_config

ROWS = "rows.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementOptions:
    """What the command line asks of a measurement."""

    models: tuple[str, ...] | None = None  # Some of its models; all if None
    is_small: bool = False  # Whether a quick look is enough
    seed: int = 0  # Root of all chance
    library: str | None = None  # Where the models come from, if one can choose
    num_models: int | None = None  # How many of them; the suite's own number if None
    codec: str = "raw"  # At each cut, if one can choose
    num_workers: int = 1  # Processes, where the items are measured in their own
    provenance: Provenance  # Which program on which machine; stored with the results


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing to measure: ``measure(folder)`` makes the row that ``key`` names."""

    key: str
    measure: Callable[[Path], Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the rows say."""

    headline: str  # In a line
    columns: Sequence[str]
    cells: Sequence[tuple[str, ...]]
    caption: str = ""  # What to know about it
    sections: Sequence[Section] = ()  # What the page has besides
    problems: Sequence[str] = ()  # What should not be so; a run that finds any fails


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A suite of items."""

    name: str
    summary: str
    items_fn: Callable[[MeasurementOptions], list[Item]]  # The quickest first
    report_fn: Callable[[list[Row]], Report]  # Makes the report of the rows
    figures_fn: Callable[[list[Row]], dict[str, Row]]  # For ``--json``, by name
    options: frozenset[str] = frozenset({"models", "small", "seed", "workers"})
    in_processes: bool = False  # Each item in its own: what it leaves harms no other
    preload: tuple[str, ...] = ()  # Modules that such a process has from the start

    def run(self, folder: Path, options: MeasurementOptions) -> bool:
        """Measure what the folder does not have; return False if interrupted."""
        items = self.items_fn(options)
        begin_folder(
            folder,
            MEASUREMENT,
            self.name,
            is_small=options.is_small,
            provenance=options.provenance,
        )
        known = read_rows(folder)
        path = folder / ROWS  # Half a line, which an interrupt left, goes.
        path.write_text("".join(map(_line, known)), encoding="utf-8")
        done = {row["key"] for row in known}
        wanted = [item for item in items if item.key not in done]
        try:
            with progress_bar() as progress, torch_threads(1):
                bar = progress.add_task(self.name, total=len(wanted))
                for key, row in self._measured(wanted, folder, options.num_workers):
                    with path.open("a", encoding="utf-8") as file:
                        file.write(_line({"key": key, **row}))
                    progress.update(bar, advance=1, description=key)
        except KeyboardInterrupt:
            sys.stderr.write("Interrupted: run it again to go on from here.\n")
            return False
        return True

    def _measured(
        self, items: list[Item], folder: Path, num_workers: int
    ) -> Iterator[tuple[str, Row]]:
        if not self.in_processes:
            yield from ((item.key, item.measure(folder)) for item in items)
            return
        # Forked from one that has imported torch: that takes longer than most items.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(self.preload))
        with ProcessPoolExecutor(num_workers, context, max_tasks_per_child=1) as pool:
            futures = {pool.submit(_apart, item, folder): item.key for item in items}
            for future in as_completed(futures):
                yield futures[future], future.result()

    def show(self, folder: Path, *, as_json: bool) -> list[str]:
        """Write the reports, print the table or the object, and return problems."""
        rows = read_rows(folder)
        report = self.report_fn(rows)
        summary = json.dumps({"rows": rows}, indent=2) + "\n"
        (folder / SUMMARY).write_text(summary, encoding="utf-8")
        table = Section(columns=report.columns, rows=report.cells, text=report.caption)
        page = html_page(
            self.name,
            report.headline,
            [table, *report.sections],
            limits=self.name,
            settings=settings_rows(read_config(folder)),
        )
        (folder / REPORT).write_text(page, encoding="utf-8")
        if as_json:
            sys.stdout.write(json.dumps(methods_object(self.figures_fn(rows))) + "\n")
        else:
            console = terminal()
            console.print(f"{report.headline}\n")
            console.print(
                terminal_table(report.columns, report.cells, caption=report.caption)
            )
        return list(report.problems)


def read_rows(folder: Path) -> list[Row]:
    """Read the finished rows; a line that an interrupt cut short is not one."""
    path = folder / ROWS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _apart(item: Item, folder: Path) -> Row:
    torch.set_num_threads(1)
    return item.measure(folder)
