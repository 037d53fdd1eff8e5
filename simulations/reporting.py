"""Reporting: the comparison table and the HTML page, made from a results folder.

Both can be made again at any time, since they read nothing but what a run wrote.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.table import Table

from simulations import plots
from simulations.summary import (
    Figures,
    Results,
    bytes_text,
    percent_text,
    reasons_to_stay_out,
    seconds_text,
)

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SUMMARY = "summary.json"
REPORT = "report.html"

COLUMNS = (
    "method",
    "accuracy",
    "mean of last 5",
    "took part",
    "largest device peak",
    "worst peak / budget",
    "devices received",
    "devices sent",
    "time per round",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One claim of the page: a picture, then its numbers."""

    title: str
    text: str
    plot: plots.Plot
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def write_reports(results: Results, out: Path) -> None:
    """Write ``summary.json`` and ``report.html`` into a results folder."""
    summary = json.dumps(results.summary(), indent=2) + "\n"
    (out / SUMMARY).write_text(summary, encoding="utf-8")
    (out / REPORT).write_text(html_page(results), encoding="utf-8")


def comparison_table(results: Results) -> Table:
    """Put the methods side by side."""
    experiment = results.config["experiment"]
    table = Table(
        *COLUMNS,
        title=f"{experiment['name']}: {headline(results)}",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
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
            _ratio_text(figures),
            bytes_text(figures.bytes_down),
            bytes_text(figures.bytes_up),
            seconds_text(figures.seconds_per_round),
        )
        for method, figures in results.figures().items()
    ]


def headline(results: Results) -> str:
    """Describe the experiment in one line."""
    experiment = results.config["experiment"]
    return (
        f"{experiment['data']}, {experiment['model']} model, "
        f"{experiment['num_clients']} clients, {experiment['num_rounds']} rounds, "
        f"seed {experiment['seed']}"
    )


def html_page(results: Results) -> str:
    """Make one HTML page that needs no other file and no network."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
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
            (section, _embedded(plots.svg_of(section.plot, results)))
            for section in sections(results)
        ],
    )


def sections(results: Results) -> list[Section]:
    """List the claims of the page in reading order."""
    figures = results.figures()
    return [
        Section(
            title="Who learns how much",
            text="Accuracy of the global model on the test set, which the server "
            "holds. Single rounds swing; the mean of the last five is steadier.",
            plot=plots.accuracy_over_rounds,
            columns=("method", "final accuracy", "mean of last 5", "rounds"),
            rows=[
                (
                    method,
                    percent_text(f.accuracy),
                    percent_text(f.accuracy_last5),
                    str(f.num_rounds),
                )
                for method, f in figures.items()
            ],
        ),
        Section(
            title="Which classes it learns",
            text="Where weak clients hold classes of their own, a method without "
            "them cannot learn these.",
            plot=plots.accuracy_per_class,
            columns=("method", "worst class", "best class"),
            rows=[_class_range(method, f) for method, f in figures.items()],
        ),
        Section(
            title="What a device holds",
            text="Measured peak of all tensors that are alive on a device during "
            "training, against the budget of that device. A red bar is a device that "
            "would have run out of memory: FedAvg trains without regard to budgets.",
            plot=plots.peak_against_budget,
            columns=(
                "method",
                "largest peak",
                "worst peak / budget",
                "devices above budget",
            ),
            rows=[
                (
                    method,
                    bytes_text(f.device_peak_bytes),
                    _ratio_text(f),
                    str(f.devices_over_budget),
                )
                for method, f in figures.items()
            ],
        ),
        *_cost_sections(results),
    ]


def _cost_sections(results: Results) -> list[Section]:
    """List the claims about participation, traffic and time."""
    figures = results.figures()
    num_clients = len(results.client_keys)
    return [
        Section(
            title="Who takes part",
            text="Every client in every round.",
            plot=plots.who_took_part,
            columns=("method", "clients with an accepted update"),
            rows=[
                (method, f"{f.participants} of {num_clients}")
                for method, f in figures.items()
            ],
        ),
        Section(
            title="What crosses the network",
            text="Tensors only, without protocol headers. Splitting trades device "
            "memory for traffic between device and edge.",
            plot=plots.bytes_per_round,
            columns=("method", "devices received", "devices sent", "all links"),
            rows=[
                (
                    method,
                    bytes_text(f.bytes_down),
                    bytes_text(f.bytes_up),
                    bytes_text(f.comm_bytes_total),
                )
                for method, f in figures.items()
            ],
        ),
        Section(
            title="How long a round takes",
            text="Wall-clock time of the simulation on this machine, where devices "
            "and edge share the processor; not that of a real fleet. The first round "
            "includes starting the workers.",
            plot=plots.seconds_per_round,
            columns=("method", "median", "mean", "of which merging"),
            rows=[
                (
                    method,
                    seconds_text(f.seconds_per_round),
                    seconds_text(f.round_wall_clock_sec),
                    seconds_text(f.server_aggregation_time_sec),
                )
                for method, f in figures.items()
            ],
        ),
    ]


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


def _class_range(method: str, figures: Figures) -> tuple[str, ...]:
    known = [value for value in figures.per_class_accuracy if value is not None]
    return (
        method,
        percent_text(min(known, default=None)),
        percent_text(max(known, default=None)),
    )


def _ratio_text(figures: Figures) -> str:
    ratio = figures.peak_over_budget
    return "–" if ratio is None else f"{ratio:.2f}"


def _unfinished(results: Results) -> list[str]:
    """Name the methods whose run was cut short."""
    wanted = results.config["experiment"]["num_rounds"]
    done = {run.method: len(run.rounds) for run in results.runs}
    return [
        f"{method} ({done.get(method, 0)} of {wanted} rounds)"
        for method in results.config["methods"]
        if done.get(method, 0) < wanted
    ]


def _embedded(svg: str) -> str:
    encoded = base64.b64encode(svg.encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}"
