"""The memory suite's table, and what its page has besides."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from simulations.report.pages import Section, picture_of
from simulations.report.style import WIDTH_INCHES
from simulations.report.summary import bytes_text
from simulations.studies.measurement import Report
from simulations.studies.memory.cases import LARGE_SIDE
from simulations.studies.memory.choosing import GREEDY, PROGRAMME, SEQUENTIAL
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


COLUMNS = (
    "model, side",
    "whole\nMiB",
    "device\nMiB",
    "times\nless",
    "by\n32",
    "floor\nMiB",
    "useful\ncut at",
    "device\nMiB",
    "times\nless",
    "extra\nFLOPs",
    "step\ntime",
)
"""Heads of the table, with the line breaks that fit it into a terminal."""


def headline(rows: Sequence[MemoryRow]) -> str:
    """Sum the results up in a line."""
    if not rows:
        return "memory: nothing is measured yet"
    above = sum(row.ratio >= CLAIM for row in rows)
    return (
        f"memory: {len(rows)} cases of {len({row.model for row in rows})} models, "
        f"batch {rows[0].batch_size}; {above} reach {CLAIM} times less"
    )


def memory_rows(rows: Sequence[MemoryRow]) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row per case; ``~`` marks predictions."""
    return [
        (
            f"{row.model}, {row.input_side}",
            _mebibytes(row.whole_peak_bytes),
            _mark(row.least.is_measured) + _mebibytes(row.least.peak_bytes),
            _times(row.ratio),
            _times(row.accumulated_ratio or row.ratio),
            _mebibytes(row.floor_bytes),
            *_useful_cells(row),
        )
        for row in rows
    ]


def _useful_cells(row: MemoryRow) -> tuple[str, ...]:
    useful, ratio = row.useful, row.useful_ratio
    if useful is None or ratio is None:
        return ("no cut",) + ("–",) * 4
    time_ratio = row.step_time_ratio
    return (
        f"{100 * useful.flops_fraction:.0f} %",
        _mark(useful.is_measured) + _mebibytes(useful.peak_bytes),
        _times(ratio),
        f"{100 * useful.extra_flops_fraction:.0f} %",
        "–" if time_ratio is None else f"{time_ratio:.2f}",
    )


def _mebibytes(num_bytes: int) -> str:
    """Print bytes in MiB, with three digits that count where it is small."""
    size = num_bytes / 2**20
    return f"{size:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}"  # noqa: PLR2004


def _times(ratio: float) -> str:
    """Print a ratio; below ten, its first decimal counts."""
    return f"{ratio:.{1 if ratio < 10 else 0}f}"  # noqa: PLR2004


def _mark(is_measured: bool) -> str:
    return "" if is_measured else "~"


CAPTION = (
    "Whole: peak of a plain step. Device: measured (~ predicted) at the cut that needs "
    "least; by 32: with gradients accumulated over 32 micro-batches. Then at the "
    "useful cut: with a tenth of the forward's FLOPs before it (the share is given) "
    "and a boundary no larger than the inputs. Extra FLOPs: what its plan adds to a "
    "forward of the model. Step time: CPU time of a split step over a whole one's."
)


def report_of(rows: Sequence[MemoryRow]) -> Report:
    """Say what the cases gave."""
    return Report(
        headline=headline(rows),
        columns=COLUMNS,
        cells=memory_rows(rows),
        caption=CAPTION,
        sections=list(_sections(rows)),
    )


def _sections(rows: Sequence[MemoryRow]) -> Iterator[Section]:
    """Show ratios and curves, and list floors, plans and checks."""
    if rows:
        yield Section(
            title="How many times less a device holds",
            picture=picture_of(ratio_bars, rows),
        )
    if any(row.curves for row in rows):
        yield Section(
            title="What less memory costs",
            picture=picture_of(plan_curves_picture, rows),
            text="Plans at the useful cut, predicted. The dynamic programme is given "
            "budgets from the least that does to where everything is kept; the greedy "
            "rule the same ones, and stops where it finds no plan. "
            "checkpoint_sequential divides the stages into k segments of equal length "
            "and keeps the last, for every k. Much dearer plans are not drawn.",
        )
    yield Section(
        title="The floor",
        text="Whatever is recomputed, a device holds its batch, the first unit's "
        "parameters and optimizer state, the gradient of its output, and the gradient "
        "of its parameters, when that unit goes backward.",
        columns=("case", "floor", "the least"),
        rows=[(r.title, bytes_text(r.floor_bytes), r.floor_text) for r in rows],
        has_words=True,
    )
    yield Section(
        title="Cuts and plans",
        text="[a:b]: units a to b keep nothing and run again in backward; parts inside "
        "it run a third time.",
        columns=("case", "route", "cut", "plan"),
        rows=_plan_rows(rows),
        has_words=True,
    )
    yield Section(
        title="Predicted and measured",
        columns=("case", "what", "predicted bytes", "measured bytes", "difference"),
        rows=_check_rows(rows),
    )


def _plan_rows(rows: Sequence[MemoryRow]) -> list[tuple[str, ...]]:
    """List both routes of each case."""
    return [
        (row.title, name, f"{route.cut} ({route.unit})", route.plan)
        for row in rows
        for name, route in (("least", row.least), ("useful", row.useful))
        if route is not None
    ]


def _check_rows(rows: Sequence[MemoryRow]) -> list[tuple[str, ...]]:
    """Set predicted beside measured bytes."""
    found = []
    for row in rows:
        whole = row.whole_measured_bytes
        if whole is not None:
            found.append((row.title, "whole", row.whole_peak_bytes, whole))
        for name, route in (("least", row.least), ("useful", row.useful)):
            if route is not None and route.is_measured:
                found.append((row.title, name, route.predicted_bytes, route.peak_bytes))
    return [
        (title, name, f"{said:,}", f"{seen:,}", f"{said / seen - 1:+.2%}")
        for title, name, said, seen in found
    ]
