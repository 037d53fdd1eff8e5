"""Pictures of the memory suite: how much smaller, and at what cost."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from simulations.report.style import WIDTH_INCHES
from simulations.studies.memory.cases import LARGE_SIDE
from simulations.studies.memory.curves import GREEDY, PROGRAMME, SEQUENTIAL
from simulations.studies.memory.measuring import MemoryRow

LEAST_COLOUR, USEFUL_COLOUR, CLAIM_COLOUR = "#0b67b2", "#d1700c", "#c0392b"
RULE_STYLES = {
    SEQUENTIAL: ("#6b7280", "x", ""),
    GREEDY: ("#d1700c", "s", "-"),
    PROGRAMME: ("#0b67b2", "o", "-"),
}
CLAIM = 100
"""The paper's "up to 100 times less memory"."""


def ratio_bars(rows: Sequence[MemoryRow]) -> Figure:
    """Draw how many times less each model's device holds, on a logarithmic axis."""
    groups = [
        [row for row in rows if (row.input_side == LARGE_SIDE) == is_large]
        for is_large in (False, True)
    ]
    groups = [group for group in groups if group]
    heights = [len(group) + 0.8 for group in groups] or [1.0]
    figure = Figure(figsize=(WIDTH_INCHES, 1.4 + 0.36 * sum(heights)))
    panels = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    for axes, group in zip(panels, groups, strict=False):
        _draw_ratios(axes, group)
    panels[-1].set_xlabel("times less memory than a plain step of the whole model")
    handles = [
        Patch(color=LEAST_COLOUR, label="least of all cuts"),
        Patch(color=USEFUL_COLOUR, label="least of the useful cuts"),
        Line2D([], [], color="k", marker="|", ms=11, mew=2, lw=0, label="the floor"),
        Line2D([], [], color=CLAIM_COLOUR, ls="--", label=f"{CLAIM} times"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=9)
    return figure


def _draw_ratios(axes: Axes, rows: Sequence[MemoryRow]) -> None:
    """Draw the models of one size of image, the largest ratio first."""
    ordered = sorted(rows, key=lambda row: -row.ratio)
    for y, row in enumerate(ordered):
        axes.barh(y - 0.19, row.ratio, height=0.36, color=LEAST_COLOUR)
        axes.text(row.ratio * 1.06, y - 0.19, f"{row.ratio:.0f}", va="center", size=8)
        floor = row.whole_peak_bytes / row.floor_bytes
        axes.plot(floor, y - 0.19, color="k", marker="|", ms=11, mew=2)
        if row.useful_ratio is not None:
            axes.barh(y + 0.19, row.useful_ratio, height=0.36, color=USEFUL_COLOUR)
            text = f"{row.useful_ratio:.1f}"
            axes.text(row.useful_ratio * 1.06, y + 0.19, text, va="center", size=8)
    axes.axvline(CLAIM, color=CLAIM_COLOUR, ls="--", lw=1.2, zorder=0)
    axes.set_yticks(range(len(ordered)), [row.title for row in ordered], fontsize=9)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    widest = max(max(row.ratio, CLAIM) for row in rows)
    axes.set_xlim(1, max(axes.get_xlim()[1], 1.6 * widest))  # Room for the numbers.
    axes.grid(visible=False, axis="y")
    above = sum(row.ratio >= CLAIM for row in ordered)
    best = ordered[0]
    axes.set_title(
        f"{above} of {len(ordered)} reach {CLAIM} times; most: {best.model}, "
        f"{best.ratio:.0f} times"
    )


def plan_curves_picture(rows: Sequence[MemoryRow]) -> Figure:
    """Draw what each rule adds to a forward for how small a peak, model by model."""
    shown = [row for row in rows if row.curves]
    num_rows = max(1, -(-len(shown) // 2))
    figure = Figure(figsize=(WIDTH_INCHES, 0.8 + 3.0 * num_rows))
    panels = figure.subplots(num_rows, 2, squeeze=False).ravel()
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes, row in zip(panels, shown, strict=False):
        _draw_curves(axes, row)
    handles = [
        Line2D([], [], color=colour, marker=marker, ls=line or "none", label=rule)
        for rule, (colour, marker, line) in RULE_STYLES.items()
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=9)
    return figure


def _draw_curves(axes: Axes, row: MemoryRow) -> None:
    """Draw the rules' plans at one model's useful cut."""
    # A few plans repeat the forward many times; an axis for them hides the others.
    top = 100 * _top(row)
    for rule, (colour, marker, line) in RULE_STYLES.items():  # The optimum on top.
        points = row.curves.get(rule, [])
        peaks = np.array([peak for peak, _ in points]) / 2**20
        extra = np.array([100 * fraction for _, fraction in points])
        seen = extra <= top
        axes.plot(
            peaks[seen],
            extra[seen],
            color=colour,
            marker=marker,
            ls=line,
            ms=4 if rule == PROGRAMME else 6,
            lw=1.4,
            drawstyle="steps-post",
            alpha=0.85,
            clip_on=False,
        )
    axes.set_ylim(0, 1.05 * top)
    unit = row.useful.unit if row.useful else ""
    axes.set_title(f"{row.title}, to {unit}", fontsize=10)
    axes.set_xlabel("predicted peak (MiB)")
    axes.set_ylabel("extra FLOPs (% of a forward)")


def _top(row: MemoryRow) -> float:
    """Choose the highest fraction to show: what the optimum and the greedy rule add."""
    rules = (PROGRAMME, GREEDY)
    most = [
        max((e for _, e in row.curves.get(rule, [])), default=0.0) for rule in rules
    ]
    return max(1.4 * max(most), 0.01)
