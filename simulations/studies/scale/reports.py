"""The scale suite's table and pictures."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simulations.report.pages import Section, picture_of
from simulations.report.style import WIDTH_INCHES
from simulations.report.summary import bytes_text
from simulations.studies.measurement import Report, Row

MEMORY_COLOUR, DISK_COLOUR = "#0b67b2", "#d1700c"


def edge_memory_picture(cases: dict[str, Any]) -> Figure:
    """Draw an edge's memory and disk by how many clients were selected."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    panels = figure.subplots(1, max(len(cases), 1), squeeze=False)[0]
    for axes, (title, case) in zip(panels, cases.items(), strict=False):
        clients, memory, disk = zip(*case["points"], strict=True)
        for sizes, colour, label in (
            (memory, MEMORY_COLOUR, "memory, most so far"),
            (disk, DISK_COLOUR, "disk"),
        ):
            axes.plot(clients, [n / 2**20 for n in sizes], color=colour, label=label)
        budget = case["clients_at_once"] * case["predicted"]["memory_bytes"] / 2**20
        axes.axhline(budget, color=MEMORY_COLOUR, ls=":", label="memory budget")
        axes.set_ylim(0, None)
        axes.set_xlim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{title}, {case['clients_at_once']} training at a time")
        axes.set_xlabel("clients selected and sealed")
        axes.set_ylabel("MiB")
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=9)
    return figure


PLANNING, EDGE_MEMORY, VGG19_100 = "planning", "edge_memory", "vgg19"
ROUNDS, TRAINING = "rounds", "training"
COLUMNS = ("what", "clients", "found")


def report_of(rows: Sequence[Row]) -> Report:
    """Say what the items gave."""
    summary = summary_of(rows)
    parts = ", ".join(part.replace("_", " ") for part in summary)
    return Report(
        headline=f"scale: {parts or 'nothing is measured yet'}",
        columns=COLUMNS,
        cells=scale_rows(summary),
        sections=[
            Section(
                title="An edge holds whom it trains, not whom the round selected",
                picture=picture_of(edge_memory_picture, summary[EDGE_MEMORY]),
            )
        ]
        if EDGE_MEMORY in summary
        else [],
    )


def summary_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Put the rows together, by part; where a part has several, by name.

    Examples
    --------
    >>> summary_of([{"part": "a", "of": "", "x": 1}, {"part": "b", "of": "k", "y": 2}])
    {'a': {'x': 1}, 'b': {'k': {'y': 2}}}
    """
    summary: dict[str, Any] = {}
    for row in rows:
        values = {n: v for n, v in row.items() if n not in ("key", "part", "of")}
        if row["of"]:
            summary.setdefault(row["part"], {})[row["of"]] = values
        else:
            summary[row["part"]] = values
    return summary


def scale_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the cells of the table, a row for each measurement."""
    rows = [_planning_row(summary[PLANNING])] if PLANNING in summary else []
    rows += [_edge_row(n, each) for n, each in summary.get(EDGE_MEMORY, {}).items()]
    if VGG19_100 in summary:
        rows.append(_vgg19_row(summary[VGG19_100]))
    for clients, each in summary.get(ROUNDS, {}).items():
        seconds = each["seconds_per_round"]
        found = (
            f"{seconds['smartsplit']:.3f} s, FedAvg {seconds['fedavg']:.3f} s: "
            f"{each['ratio']:.2f} times"
        )
        rows.append(("round", clients, found))
    if TRAINING in summary:
        each = summary[TRAINING]
        seconds = median(each["seconds_per_round"])
        found = (
            f"{100 * each['accuracy'][-1]:.1f} % after {each['rounds']} rounds of "
            f"{each['clients_per_round']}, {seconds:.1f} s each"
        )
        rows.append(("training", f"{each['clients']:,}", found))
    return rows


def _planning_row(case: dict[str, Any]) -> tuple[str, str, str]:
    found = (
        f"{case['selected']} chosen with {case['cuts']} cuts each: "
        f"{case['seconds']:.2f} s, {case['peak_mib']:.0f} MiB; "
        f"{100 * case['regret']:.1f} % below a choice among all"
    )
    return "planning", f"{case['devices']:,}", found


def _edge_row(title: str, case: dict[str, Any]) -> tuple[str, str, str]:
    points = case["points"]
    first, last = points[case["clients_at_once"] - 1], points[-1]
    found = (
        f"memory {bytes_text(first[1])} for {first[0]}, {bytes_text(last[1])} for all; "
        f"disk {bytes_text(last[2])}, {bytes_text(last[2] // last[0])} each"
    )
    return f"edge, {title}", str(last[0]), found


def _vgg19_row(case: dict[str, Any]) -> tuple[str, str, str]:
    found = (
        f"worked out: memory {case['memory_bytes'] / 1e9:.1f} GB (all at once "
        f"{case['all_at_once_bytes'] / 1e9:.0f} GB; the paper "
        f"{case['paper_bytes'] / 1e9:.0f} GB), disk {case['disk_bytes'] / 1e9:.0f} GB"
    )
    return "edge, VGG-19", str(case["clients"]), found
