"""Reporting: the comparison table and the HTML page, made from a results folder.

Both can be made again at any time, since they read nothing but what a run wrote.
"""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table

from simulations.report.pages import embedded, render
from simulations.report.plots import svg_of
from simulations.report.sections import SECTIONS
from simulations.report.summary import (
    Results,
    bytes_text,
    percent_text,
    ratio_text,
    reasons_to_stay_out,
    seconds_text,
)

TEMPLATE = "report.html.jinja"
SUMMARY = "summary.json"
REPORT = "report.html"

COLUMNS = (
    "method",
    "accuracy",
    "mean of\nlast 5",
    "took\npart",
    "largest\npeak",
    "peak /\nbudget",
    "devices\nreceived",
    "devices\nsent",
    "simulated\n/ round",
    "wall-clock\n/ round",
)
"""Heads of the comparison, with the line breaks that fit it into a terminal."""

TABLE_COLUMNS = 100
"""Characters that the comparison has room in, whatever names methods have."""


def write_reports(results: Results, out: Path) -> None:
    """Write ``summary.json`` and ``report.html`` into a results folder."""
    summary = json.dumps(results.summary(), indent=2) + "\n"
    (out / SUMMARY).write_text(summary, encoding="utf-8")
    (out / REPORT).write_text(html_page(results), encoding="utf-8")


def comparison_table(results: Results) -> Table:
    """Put the methods side by side."""
    table = Table(
        caption="Peak: the most a device held while training; peak / budget: the worst "
        "case. Received, sent: all devices, all rounds. Simulated: the slowest client "
        "on its device, median. Wall-clock: on this machine, median from round 2 on.",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    for name in COLUMNS:
        justify: JustifyMethod = "left" if name == "method" else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in comparison_rows(results):
        table.add_row(*row)
    return table


def comparison_rows(results: Results) -> list[tuple[str, ...]]:
    """Return the cells of the comparison, one row per method."""
    num_clients = len(results.client_keys)
    return [
        (
            method,
            percent_text(figures.accuracy),
            percent_text(figures.accuracy_last5),
            f"{figures.participants} of {num_clients}",
            bytes_text(figures.device_peak_bytes),
            ratio_text(figures.peak_over_budget),
            bytes_text(figures.bytes_down),
            bytes_text(figures.bytes_up),
            seconds_text(figures.simulated_seconds_per_round),
            seconds_text(figures.seconds_per_round),
        )
        for method, figures in results.figures().items()
    ]


def headline(results: Results) -> str:
    """Describe the experiment in one line."""
    experiment = results.config["experiment"]
    return (
        f"{Path(experiment['data']).name}, {experiment['model']} model, "
        f"{experiment['num_clients']} clients, {experiment['num_rounds']} rounds, "
        f"seed {experiment['seed']}"
    )


def html_page(results: Results) -> str:
    """Make one HTML page that needs no other file and no network."""
    return render(
        TEMPLATE,
        headline=headline(results),
        config=results.config,
        settings=settings_rows(results.config),
        columns=COLUMNS,
        comparison=comparison_rows(results),
        unfinished=_unfinished(results),
        stayed_out=[
            (run.method, key, reason)
            for run in results.runs
            for key, reason in reasons_to_stay_out(run).items()
        ],
        sections=[
            (section, embedded(svg_of(section.plot, results)))
            for section in (describe(results) for describe in SECTIONS)
        ],
    )


def settings_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Flatten the configuration into names and values."""
    return [
        ("command", config["command"]),
        ("date", config["date"]),
        *((name, str(value)) for name, value in config["experiment"].items()),
        ("training examples", str(config["num_train_examples"])),
        ("test examples", str(config["num_test_examples"])),
        ("peak of the whole model", bytes_text(config["whole_peak_bytes"])),
        ("peak of its smallest part", bytes_text(config["smallest_peak_bytes"])),
        *((f"version of {name}", v) for name, v in config["versions"].items()),
        *config["hardware"].items(),
    ]


def _unfinished(results: Results) -> list[str]:
    """Name the methods whose run was cut short."""
    wanted = results.config["experiment"]["num_rounds"]
    done = {run.method: len(run.rounds) for run in results.runs}
    return [
        f"{method} ({done.get(method, 0)} of {wanted} rounds)"
        for method in results.config["methods"]
        if done.get(method, 0) < wanted
    ]
