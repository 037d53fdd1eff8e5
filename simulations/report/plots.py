"""Plots: one picture per claim, as SVG text, drawn from results read back.

Titles say what was found, so they are worked out from the same figures.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from simulations.experiments.rows import (
    ACCEPTED,
    NOT_SAMPLED,
    SAT_OUT,
    ClientRow,
    MethodRun,
)
from simulations.report.summary import (
    Results,
    bytes_text,
    participants,
    peaks_by_client,
    percent_text,
)

COLOURS = {
    "fedavg": "#6b7280",
    "drop_weak": "#d1700c",
    "smartsplit": "#0b67b2",
    "splitfed": "#2f9e8f",
    "oort": "#b03060",
    "random": "#a3862a",
    "heterofl": "#7a3e9d",
    "depthfl": "#2f7d4f",
    "fedprox": "#a0a7b3",
    "fedadam": "#c9a27e",
}
OTHER_COLOURS = ("#7a3e9d", "#2f7d4f", "#b03060", "#2f9e8f", "#a3862a", "#8c564b")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 10.0,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "font.size": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "simulations",
}
WIDTH_INCHES = 9.0
MAX_NAMES = 30
ACCEPTED_COLOUR, SAT_OUT_COLOUR, IDLE_COLOUR, FAILED_COLOUR = (
    "#3a86c8",
    "#d9dce1",
    "#f3f4f6",
    "#c0392b",
)
Plot = Callable[[Results], Figure]
Drawn = TypeVar("Drawn")


def svg_of(plot: Callable[[Drawn], Figure | None], drawn: Drawn) -> str:
    """Draw a plot and return it as the text of an SVG file; empty if it is None."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = plot(drawn)
        if figure is not None:
            figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def colour_of(method: str, index: int) -> str:
    """Give a method the colour it has in every plot."""
    return COLOURS.get(method, OTHER_COLOURS[index % len(OTHER_COLOURS)])


def accuracy_over_rounds(results: Results) -> Figure:
    """Draw each method's accuracy on the test set after every round."""
    figure = Figure(figsize=(WIDTH_INCHES, 4.2))
    axes = figure.subplots()
    ends = []
    for index, run in enumerate(results.runs):
        colour = colour_of(run.method, index)
        rounds = [row.round for row in run.evaluations]
        accuracy = [100 * row.accuracy for row in run.evaluations]
        axes.plot(rounds, accuracy, color=colour, marker="o", ms=3.5, lw=1.8)
        if rounds:
            ends.append((accuracy[-1], f"{run.method} {accuracy[-1]:.1f} %", colour))
    for height, (_, label, colour) in zip(
        spread([end[0] for end in ends], gap=5.0), ends, strict=True
    ):
        axes.annotate(
            label,
            (1.01, height),
            xycoords=("axes fraction", "data"),
            color=colour,
            va="center",
            weight="bold",
        )
    axes.set(xlabel="round", ylabel="accuracy on the test set (%)", ylim=(0, 102))
    axes.set_xlim(-0.3, results.config["experiment"]["num_rounds"] + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Accuracy: " + _ranking(results))
    return figure


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Move labels apart that would lie on each other, the highest first."""
    order = sorted(range(len(heights)), key=lambda index: -heights[index])
    placed = list(heights)
    for above, below in pairwise(order):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed


def _ranking(results: Results) -> str:
    """Name the methods from the most to the least accurate."""
    figures = results.figures()
    known = [m for m in figures if figures[m].accuracy is not None]
    if not known:
        return "no round has ended yet"
    known.sort(key=lambda method: -(figures[method].accuracy or 0.0))
    return ", ".join(f"{m} {percent_text(figures[m].accuracy)}" for m in known)


def accuracy_per_class(results: Results) -> Figure:
    """Draw the accuracy of each class after the last round, as a table of colours."""
    figures = results.figures()
    return class_table(
        {m: f.per_class_accuracy for m, f in figures.items() if f.per_class_accuracy}
    )


def class_table(rows: Mapping[str, Sequence[float | None]]) -> Figure:
    """Draw a table of colours: methods by classes."""
    figure = Figure(figsize=(WIDTH_INCHES, 1.5 + 0.55 * max(len(rows), 1)))
    axes = figure.subplots()
    axes.grid(visible=False)
    axes.set_title("Accuracy per class: " + _unlearned(rows))
    if not rows:
        return figure
    values = np.array(
        [[np.nan if v is None else 100 * v for v in row] for row in rows.values()]
    )
    image = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.0f}"
        dark = value > 55  # noqa: PLR2004 - where white text reads better
        axes.text(
            column, row, text, ha="center", va="center", color="w" if dark else "k"
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xticks(range(values.shape[1]))
    axes.set_xlabel("class")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("accuracy (%)")
    return figure


def _unlearned(rows: Mapping[str, Sequence[float | None]]) -> str:
    """Say which methods never get an example of some classes right."""
    if not rows:
        return "no round has ended yet"
    zeros = {
        method: [str(label) for label, value in enumerate(row) if value == 0.0]
        for method, row in rows.items()
    }
    found = [
        f"{method} knows nothing of {', '.join(labels)}"
        for method, labels in zeros.items()
        if labels
    ]
    return "; ".join(found) or "every method has learned something of every class"


def peak_against_budget(results: Results) -> Figure:
    """Draw each device's measured peak as a bar and its budget as a mark."""
    num = max(len(results.runs), 1)
    figure = Figure(figsize=(WIDTH_INCHES, 0.7 + 2.0 * num))
    panels = figure.subplots(num, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, run in zip(panels, results.runs, strict=False):
        _draw_peaks(axes, run, results)
    panels[-1].set_xlabel("client, weakest budget first")
    handles = [
        Patch(color=ACCEPTED_COLOUR, label="measured peak, within budget"),
        Patch(color=FAILED_COLOUR, label="measured peak, above budget"),
        Line2D([], [], color="k", lw=2, label="budget"),
        Line2D([], [], color="k", marker="^", lw=0, label="budget beyond the axis"),
        Line2D([], [], color="#6b7280", marker="x", lw=0, label="took no part"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=5, fontsize=8.5)
    return figure


def _draw_peaks(axes: Axes, run: MethodRun, results: Results) -> None:
    """Draw the devices of one method."""
    keys, budgets = results.client_keys, results.budgets_bytes
    training = run.training()
    peaks, took_part = peaks_by_client(training), participants(training)
    unit_name, unit_bytes = unit_of(results.config["whole_peak_bytes"])
    top = 2.2 * results.config["whole_peak_bytes"] / unit_bytes
    for x, key in enumerate(keys):
        budget = budgets[key] / unit_bytes if key in budgets else math.inf
        if key in peaks:
            peak = peaks[key] / unit_bytes
            colour = FAILED_COLOUR if peak > budget else ACCEPTED_COLOUR
            axes.bar(x, peak, color=colour, width=0.7)
        if budget <= top:
            axes.hlines(budget, x - 0.42, x + 0.42, color="k", lw=2)
        elif key in budgets:
            axes.plot(x, 0.96 * top, color="k", marker="^", ms=4)
        if key not in took_part:
            above_mark = min(budget, 0.8 * top) + 0.1 * top
            axes.plot(x, above_mark, color="#6b7280", marker="x", ms=5)
    axes.set_title(f"{run.method}: {_memory_finding(run, results)}")
    axes.set(ylim=(0, top), xlim=(-0.7, len(keys) - 0.3))
    axes.set_ylabel(f"device memory ({unit_name})")
    shown = shown_clients(keys)
    axes.set_xticks(shown, [keys[x] for x in shown])
    axes.grid(visible=False, axis="x")


def shown_clients(keys: list[str]) -> range:
    """Choose the clients whose names fit on an axis."""
    return range(0, len(keys), math.ceil(len(keys) / MAX_NAMES))


def _memory_finding(run: MethodRun, results: Results) -> str:
    """Say how many devices trained, and how many of them above their budget."""
    figures = results.figures()[run.method]
    num = figures.participants
    text = f"{num} {'device trains' if num == 1 else 'devices train'}, "
    if figures.devices_over_budget:
        return text + (
            f"{figures.devices_over_budget} of them above their budget, at worst "
            f"{figures.peak_over_budget:.1f} times"
        )
    return text + "none of them above its budget"


def unit_of(num_bytes: float) -> tuple[str, int]:
    """Choose the unit in which so many bytes are a handy number."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next((unit for unit in units if num_bytes >= unit[1]), ("B", 1))


def who_took_part(results: Results) -> Figure:
    """Draw a grid of clients by rounds, one panel per method."""
    num = max(len(results.runs), 1)
    height = 1.3 + 0.16 * min(len(results.client_keys), 2 * MAX_NAMES)
    figure = Figure(figsize=(WIDTH_INCHES, height))
    panels = figure.subplots(1, num, sharey=True, squeeze=False)[0]
    for axes, run in zip(panels, results.runs, strict=False):
        _draw_participation(axes, run, results.client_keys)
    panels[0].set_ylabel("client, weakest budget first")
    handles = [
        Patch(color=ACCEPTED_COLOUR, label="update accepted"),
        Patch(color=SAT_OUT_COLOUR, label="sat out: no route fits"),
        Patch(color=FAILED_COLOUR, label="lost, refused or failed"),
        Patch(facecolor=IDLE_COLOUR, edgecolor="#cbd0d8", label="not asked"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=9)
    return figure


def _draw_participation(axes: Axes, run: MethodRun, keys: list[str]) -> None:
    """Draw who took part in each round of one method."""
    training = run.training()
    num_rounds = max((row.round for row in training), default=1)
    grid = np.zeros((len(keys), num_rounds))
    for row in training:
        if row.client_key in keys:
            grid[keys.index(row.client_key), row.round - 1] = _outcome(row)
    axes.pcolormesh(
        np.arange(num_rounds + 1) + 0.5,
        np.arange(len(keys) + 1) - 0.5,
        grid,
        cmap=ListedColormap(
            [IDLE_COLOUR, SAT_OUT_COLOUR, ACCEPTED_COLOUR, FAILED_COLOUR]
        ),
        vmin=0,
        vmax=3,
        edgecolors="w",
        linewidth=0.8,
    )
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.set_title(
        f"{run.method}: {len(participants(training))} of {len(keys)} clients"
    )
    axes.set_xlabel("round")
    shown = shown_clients(keys)
    axes.set_yticks(shown, [keys[y] for y in shown], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(visible=False)


def _outcome(row: ClientRow) -> int:
    """Return the colour's number: nothing, sat out, accepted, or gone wrong."""
    return {NOT_SAMPLED: 0, SAT_OUT: 1, ACCEPTED: 2}.get(row.status, 3)


def bytes_per_round(results: Results) -> Figure:
    """Draw what crossed each kind of link in an average round."""
    links = ("server → device", "device → server", "device → edge", "edge → device")
    colours = ("#1f4e79", "#5b8fc4", "#b5651d", "#e3a869", "#c9ced6")
    figure = Figure(figsize=(WIDTH_INCHES, 1.7 + 0.5 * max(len(results.runs), 1)))
    axes = figure.subplots()
    totals = []
    for y, run in enumerate(results.runs):
        num_rounds = max(len(run.rounds), 1)
        parts = [
            sum(row.bytes_down for row in run.clients),
            sum(row.bytes_up for row in run.clients),
            sum(row.edge_bytes_up for row in run.clients),
            sum(row.edge_bytes_down for row in run.clients),
        ]
        total = sum(row.comm_bytes_total for row in run.rounds)
        parts.append(max(total - sum(parts), 0))
        left = 0.0
        for part, colour in zip(parts, colours, strict=True):
            axes.barh(y, part / num_rounds / 2**20, left=left, color=colour, height=0.6)
            left += part / num_rounds / 2**20
        totals.append(f"{run.method} {bytes_text(sum(parts) / num_rounds)}")
    axes.set_yticks(range(len(results.runs)), [run.method for run in results.runs])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("MiB per round, all clients together")
    axes.set_title("Traffic per round: " + ", ".join(totals))
    handles = [
        Patch(color=colour, label=label)
        for colour, label in zip(colours, (*links, "server ↔ edge"), strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=5, fontsize=9)
    return figure


def seconds_per_round(results: Results) -> Figure:
    """Draw the wall-clock time of every round but the first, which warms up."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    axes = figure.subplots()
    texts = []
    for index, run in enumerate(results.runs):
        rounds = run.rounds[1:] or run.rounds
        axes.plot(
            [row.round for row in rounds],
            [row.round_wall_clock_sec for row in rounds],
            color=colour_of(run.method, index),
            marker="o",
            ms=3.5,
            lw=1.6,
            label=run.method,
        )
        seconds = results.figures()[run.method].seconds_per_round
        if seconds is not None:
            texts.append(f"{run.method} {seconds:.2f} s")
    axes.set(xlabel="round", ylabel="wall-clock time (s)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Median time of a round here: " + ", ".join(texts))
    if results.runs:
        figure.legend(loc="outside right upper")
    return figure
