"""The scale suite's table and pictures."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from simulations.report.pages import Section, picture_of
from simulations.report.style import WIDTH_INCHES
from simulations.report.summary import bytes_text
from simulations.studies.measurement import Report, Row

MEMORY_COLOUR, DISK_COLOUR, PAPER_COLOUR = "#0b67b2", "#d1700c", "#c0392b"
WAY_STYLES = {
    "plain": ("FedAvg, plain client", "#9aa3af", "x"),
    "fedavg": ("FedAvg", "#6b7280", "s"),
    "smartsplit": ("SmartSplit", "#0b67b2", "o"),
}


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


def vgg19_picture(values: dict[str, Any]) -> Figure:
    """Draw 100 clients of VGG-19, worked out, beside the paper's number."""
    figure = Figure(figsize=(WIDTH_INCHES, 2.4))
    axes = figure.subplots()
    clients = values["clients"]
    bars = (
        ("MP-SL's paper, one node", values["paper_bytes"], PAPER_COLOUR),
        (f"all {clients} tails in memory", values["all_at_once_bytes"], "#9aa3af"),
        ("memory, two at a time", values["memory_bytes"], MEMORY_COLOUR),
        ("disk, all sealed tails", values["disk_bytes"], DISK_COLOUR),
    )
    for y, (_, num_bytes, colour) in enumerate(bars):
        axes.barh(y, num_bytes / 1e9, color=colour, height=0.6)
        axes.text(num_bytes / 1e9 + 1, y, f"{num_bytes / 1e9:.1f} GB", va="center")
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(size for _, size, _ in bars) / 1e9)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("GB")
    axes.set_title(f"{clients} clients of VGG-19 at one edge (worked out)")
    return figure


def rounds_picture(rounds: dict[str, Any]) -> Figure:
    """Draw the seconds of a round by the number of clients, both on log axes."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    axes = figure.subplots()
    clients = [int(count) for count in rounds]
    for way, (label, colour, marker) in WAY_STYLES.items():
        seconds = [each["seconds_per_round"][way] for each in rounds.values()]
        axes.plot(clients, seconds, color=colour, marker=marker, label=label)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_xlabel("clients in a round")
    axes.set_ylabel("seconds per round")
    most = max(each["ratio"] for each in rounds.values())
    axes.set_title(f"a round takes at most {most:.2f} times FedAvg's")
    axes.legend(loc="best", fontsize=9)
    return figure


def training_picture(values: dict[str, Any]) -> Figure:
    """Draw the accuracy by rounds."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.0))
    axes = figure.subplots()
    accuracy = [100 * value for value in values["accuracy"]]
    axes.plot(range(len(accuracy)), accuracy, color=MEMORY_COLOUR, marker="o")
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 100)
    axes.set_title(
        f"{values['clients']:,} clients, {values['clients_per_round']} in a round"
    )
    return figure


PLANNING, EDGE_MEMORY, VGG19_100 = "planning", "edge_memory", "vgg19"
ROUNDS, TRAINING = "rounds", "training"

Picture = Callable[[dict[str, Any]], Figure]
PICTURES: dict[str, tuple[Picture, str]] = {
    EDGE_MEMORY: (
        edge_memory_picture,
        "An edge holds whom it trains, not whom the round selected",
    ),
    VGG19_100: (vgg19_picture, "A hundred clients of VGG-19"),
    ROUNDS: (rounds_picture, "What a round takes besides training"),
    TRAINING: (training_picture, "A thousand clients"),
}
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
            Section(title=title, picture=picture_of(picture, summary[part]))
            for part, (picture, title) in PICTURES.items()
            if part in summary
        ],
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
