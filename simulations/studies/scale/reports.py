"""The scale suite's table for the terminal and its HTML page."""

from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from simulations.report.pages import embedded, render
from simulations.report.summary import bytes_text
from simulations.studies.scale.items import (
    EDGE_MEMORY,
    PLANNING,
    ROUNDS,
    TRAINING,
    VGG19_100,
)
from simulations.studies.scale.pictures import (
    Picture,
    edge_memory_picture,
    rounds_picture,
    svg_text,
    training_picture,
    vgg19_picture,
)

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


def headline(summary: dict[str, Any]) -> str:
    """Sum the results up in a line."""
    if not summary:
        return "scale: nothing is measured yet"
    parts = ", ".join(part.replace("_", " ") for part in summary)
    return f"scale: {parts}"


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


def scale_table(summary: dict[str, Any]) -> Table:
    """Put the measurements one below the other."""
    table = Table(*COLUMNS, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for row in scale_rows(summary):
        table.add_row(*row)
    return table


def html_page(summary: dict[str, Any], config: dict[str, Any]) -> str:
    """Make one HTML page that needs no other file and no network."""
    return render(
        "scale.html.jinja",
        headline=headline(summary),
        pictures=[
            (title, embedded(svg_text(picture, summary[part])))
            for part, (picture, title) in PICTURES.items()
            if part in summary
        ],
        columns=COLUMNS,
        rows=scale_rows(summary),
        settings=_settings(config),
    )


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        *((name, str(config[name])) for name in ("command", "date") if name in config),
        *((f"version of {name}", v) for name, v in config.get("versions", {}).items()),
        *config.get("hardware", {}).items(),
    ]
