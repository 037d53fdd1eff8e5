"""Plot a profile: memory, work and traffic over the cuts. Needs matplotlib."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from flwr_smartsplit.cli.profile_report import (
    ProfileReport,
    count_text,
    least_memory_cut,
)
from flwr_smartsplit.errors import bytes_text
from flwr_smartsplit.types import ChainProfile, UnitCost

BLUE, GREEN, GREY, PALE = "#0b67b2", "#2f7d4f", "#6b7280", "#eef2f6"
COLOURS = {
    "parameters": "#7a3e9d",
    "gradients": "#b03060",
    "optimizer state": "#d1700c",
    "saved activations": GREEN,
}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "smartsplit",
}
MAX_NAMES, MAX_LETTERS = 45, 24
WIDTH_INCHES, HEIGHT_INCHES = 10.0, 9.5


def profile_figure(report: ProfileReport) -> Figure:
    """Draw three panels over the cuts: device memory, forward FLOPs, boundary."""
    profile = report.subject.profile
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES))
    memory, work, traffic = figure.subplots(3, 1, sharex=True, height_ratios=(5, 3, 4))
    _draw_memory(memory, profile, report.budget_bytes)
    _draw_work(work, profile)
    _draw_traffic(traffic, profile)
    figure.suptitle(report.subject.heading(), x=0.01, ha="left", weight="bold")
    last = len(profile.units)
    shown = range(1, last + 1, math.ceil(last / MAX_NAMES))
    names = [unit.name for unit in profile.units]
    labels = [
        f"{short_name(names[cut - 1])}  {cut if cut < last else 'whole'}"
        for cut in shown
    ]
    traffic.set_xticks(shown, labels, rotation=90, fontsize=7.5)
    traffic.set_xlim(0.3, last + 0.7)
    traffic.set_xlabel("last unit on the device, and the cut after it")
    return figure


def _draw_memory(axes: Axes, profile: ChainProfile, budget_bytes: int | None) -> None:
    units = profile.units
    peaks = [unit.device_peak_bytes for unit in units]
    cuts = range(1, len(units) + 1)
    label = "peak of the device"
    axes.plot(cuts, peaks, color=BLUE, lw=2.6, marker="o", ms=4.5, label=label)
    axes.fill_between(cuts, peaks, color=BLUE, alpha=0.08, lw=0)
    for sizes, names in _unit_costs(units).items():
        shown = [size or math.nan for size in sizes]
        colour = COLOURS[names[0]]
        axes.plot(cuts, shown, color=colour, lw=1.5, label=" = ".join(names))
    references = [("whole model", GREY, peaks[-1]), ("budget", "k", budget_bytes)]
    for label, colour, size in references:
        if size is not None:
            axes.axhline(size, color=colour, lw=1.4, ls="--", zorder=1.5, label=label)
    _scale_bytes(axes, low=min(peaks) / 3, high=1.5 * max([*peaks, budget_bytes or 0]))
    axes.set_ylabel("device memory")
    cut = least_memory_cut(profile)
    least = f"{bytes_text(min(peaks[:-1]))} at cut {cut}, " if cut else ""
    _finish(
        axes,
        f"Memory: {least}{bytes_text(peaks[-1])} for the whole model"
        + (f", budget {bytes_text(budget_bytes)}" if budget_bytes else ""),
    )


def _draw_work(axes: Axes, profile: ChainProfile) -> None:
    flops = _totals(profile.units, lambda unit: unit.forward_flops)
    total = flops[-1] or 1
    cuts = range(1, len(flops) + 1)
    shares = [done / total for done in flops]
    axes.bar(cuts, shares, 0.8, color=BLUE, label="on the device")
    rest = [1 - share for share in shares]
    axes.bar(cuts, rest, 0.8, shares, color=PALE, label="on the edge")
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("forward FLOPs")
    axes.grid(visible=False, axis="x")
    _finish(axes, f"Work: a forward pass takes {count_text(flops[-1])}FLOP per batch")


def _draw_traffic(axes: Axes, profile: ChainProfile) -> None:
    sizes = [unit.boundary_bytes for unit in profile.units[:-1]]
    cuts = range(1, len(sizes) + 1)
    batch_bytes = profile.batch_bytes
    axes.plot(cuts, sizes, color=GREEN, lw=1.8, marker="o", ms=4.5, label="boundary")
    axes.axhline(batch_bytes, color=GREY, lw=1.4, ls="--", label="batch with targets")
    every = [*filter(None, sizes), batch_bytes]
    _scale_bytes(axes, low=min(every) / 2, high=max(every) * 2)
    axes.set_ylabel("bytes per step, each way")
    least = f", at least {bytes_text(min(sizes))}" if sizes else ""
    _finish(
        axes,
        f"Traffic: what crosses the cut{least}; a batch is {bytes_text(batch_bytes)}",
    )


def _unit_costs(units: Sequence[UnitCost]) -> dict[tuple[int, ...], list[str]]:
    """Name what the units up to each cut hold in total; equal costs share a line."""
    costs: dict[str, tuple[int, ...]] = {
        "parameters": _totals(units, lambda unit: unit.parameter_bytes),
        "gradients": _totals(units, lambda unit: unit.gradient_bytes),
        "optimizer state": _totals(units, lambda unit: unit.optimizer_state_bytes),
        "saved activations": _totals(units, lambda unit: unit.saved_bytes),
    }
    names: dict[tuple[int, ...], list[str]] = {}
    for name, sizes in costs.items():
        if any(sizes):
            names.setdefault(sizes, []).append(name)
    return names


def _totals(
    units: Sequence[UnitCost], cost: Callable[[UnitCost], int]
) -> tuple[int, ...]:
    """Add a cost up over the units before each cut."""
    return tuple(accumulate(map(cost, units)))


def _scale_bytes(axes: Axes, *, low: float, high: float) -> None:
    axes.set_yscale("log", base=2)
    axes.set_ylim(low, high)
    label_bytes(axes.yaxis, num_ticks=7)


def label_bytes(axis: Axis, *, num_ticks: int) -> None:
    """Label a logarithmic axis with powers of two as sizes."""
    axis.set_major_locator(LogLocator(base=2, numticks=num_ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda size, _: bytes_text(int(size))))


def _finish(axes: Axes, title: str) -> None:
    """Put the legend between title and panel, where no data are."""
    axes.set_title(title, pad=24.0)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=7, columnspacing=1.4
    )


def short_name(name: str) -> str:
    """Keep the end of a long name, which tells units apart."""
    return name if len(name) <= MAX_LETTERS else f"…{name[1 - MAX_LETTERS :]}"
