"""Pictures of what is learned: curves, differences with intervals, classes.

All but ``accuracy_per_class`` are drawn from lines alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from simulations.report.studies.cells import (
    BOUND,
    OURS,
    TAIL,
    Estimate,
    mean_of,
    paired_difference,
)
from simulations.report.studies.lines import CaseLines, Line
from simulations.report.studies.reading import CaseResults
from simulations.report.style import WIDTH_INCHES, colour_of, spread
from simulations.report.summary import percent_text

LABEL_GAP = 4.6
PANELS_IN_A_ROW = 4
MIN_DIFFERENCES = 2  # A single one is read more easily in its table.


def accuracy_over_rounds(case: CaseResults) -> Figure | None:
    """Draw the mean over seeds after every round, with the seeds' extremes."""
    curves = {
        method: _table(lines.values(), lambda line: line.accuracies)
        for method, lines in case.lines.finished.items()
    }
    if not curves:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 4.6))
    axes = figure.subplots()
    for index, (method, values) in enumerate(curves.items()):
        rounds = np.arange(values.shape[1])
        _draw_band(axes, rounds, values, colour=colour_of(method, index))
    ends = {method: float(values[:, -1].mean()) for method, values in curves.items()}
    _label_ends(axes, ends)
    axes.set(xlabel="round", ylabel="accuracy on the test set (%)")
    axes.set_xlim(0, max(values.shape[1] for values in curves.values()) - 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(_ranking(case.lines))
    return figure


def accuracy_over_time(case: CaseResults) -> Figure | None:
    """Draw accuracy by simulated seconds: each round's means over the seeds."""
    figure = Figure(figsize=(WIDTH_INCHES, 4.6))
    axes = figure.subplots()
    ends, latest = {}, []
    for index, (method, lines) in enumerate(case.lines.finished.items()):
        known = [line for line in lines.values() if line.slowest_seconds]
        if not known:
            continue
        accuracies = _table(known, lambda line: line.accuracies)
        seconds = _table(known, _elapsed)[:, : accuracies.shape[1]].mean(axis=0) / 100
        mean = accuracies[:, : len(seconds)].mean(axis=0)
        colour = colour_of(method, index)
        axes.plot(seconds, mean, color=colour, lw=1.8, marker="o", ms=2.5)
        ends[method] = float(mean[-1])
        latest.append(float(seconds[-1]))
    if not ends:
        return None
    _label_ends(axes, ends)
    target = 100 * case.lines.target_accuracy
    axes.axhline(target, color="#9aa1ac", lw=1, ls="--")
    axes.set(xlabel="simulated seconds", ylabel="accuracy on the test set (%)")
    if max(latest) > 8 * min(latest) > 0:
        axes.set_xscale("log", nonpositive="mask")  # The start, at 0 s, has no place.
        axes.set_xlabel("simulated seconds, each step ten times as long")
    axes.set_title(f"Accuracy by simulated time; dashed: the target of {target:.0f} %")
    return figure


def _elapsed(line: Line) -> Sequence[float]:
    """Return the seconds at the end of each round, from 0 on."""
    return list(accumulate(line.slowest_seconds, initial=0.0))


def gains(case: CaseResults) -> Figure | None:
    """Draw the differences to our method, and to what is usually done."""
    lines = case.lines
    sides = [
        (f"{OURS} minus the method", over_ours),
        (f"the method minus {BOUND}", lambda method: (method, BOUND)),
    ]
    drawn = [side for side in sides if _gains_of(lines, side[1])]
    if not drawn:
        return None
    height = 1.3 + 0.34 * len(lines.finished)
    figure = Figure(figsize=(WIDTH_INCHES, height))
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (title, pair) in zip(panels, drawn, strict=True):
        _draw_gains(axes, lines, pair)
        axes.set_title(title)
        axes.set_xlabel("points of the mean of the last 5")
    return figure


def gains_of_all_cases(cases: Sequence[CaseLines]) -> Figure | None:
    """Draw the differences to our method, a panel for each case; none for just one."""
    drawn = [case for case in cases if _gains_of(case, over_ours)]
    if sum(len(_gains_of(case, over_ours)) for case in drawn) < MIN_DIFFERENCES:
        return None
    columns = min(PANELS_IN_A_ROW, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    most = max(len(case.finished) for case in drawn)
    figure = Figure(figsize=(WIDTH_INCHES, rows * (1.2 + 0.3 * most)))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, (axes, case) in enumerate(zip(panels, drawn, strict=False)):
        _draw_gains(axes, case, over_ours)
        axes.set_title(case.name.replace("_", " "), fontsize=10)
        if index % columns:
            axes.tick_params(labelleft=[*case.finished] != [*drawn[index - 1].finished])
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    figure.supxlabel(
        f"{OURS} minus the method, points of the mean of the last 5", fontsize=10
    )
    return figure


Pair = Callable[[str], tuple[str, str]]
"""``pair(method)`` names the two methods whose difference is drawn in its row."""


def over_ours(method: str) -> tuple[str, str]:
    """Pair our method with another, but not with the bound, which is far off.

    Examples
    --------
    >>> over_ours("oort"), over_ours("drop_weak")
    (('smartsplit', 'oort'), ('smartsplit', 'smartsplit'))
    """
    return OURS, OURS if method == BOUND else method


def _gains_of(case: CaseLines, pair: Pair) -> dict[str, Estimate]:
    pairs = {method: pair(method) for method in case.finished}
    found = {
        method: paired_difference(case.values(one, TAIL), case.values(other, TAIL))
        for method, (one, other) in pairs.items()
        if one != other
    }
    return {method: known for method, known in found.items() if known}


def _draw_gains(axes: Axes, case: CaseLines, pair: Pair) -> None:
    """Draw each seed as a small dot, the mean with its interval over them."""
    found = _gains_of(case, pair)
    for y, method in enumerate(found):
        one, other = (case.values(name, TAIL) for name in pair(method))
        colour = colour_of(method, list(case.finished).index(method))
        seeds = [100 * (one[seed] - other[seed]) for seed in one if seed in other]
        axes.plot(seeds, [y] * len(seeds), "o", color="#9aa1ac", ms=3, zorder=2)
        mean, half = 100 * found[method].mean, found[method].half_width
        if half is not None:
            axes.hlines(y, mean - 100 * half, mean + 100 * half, color=colour, lw=2.5)
        axes.plot(mean, y, "o", color=colour, ms=7, zorder=3)
    axes.axvline(0, color="k", lw=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _table(
    lines: Iterable[Line], values_of: Callable[[Line], Sequence[float]]
) -> NDArray[np.float64]:
    """Return percentages, seeds by rounds, cut to the shortest."""
    rows = [values_of(line) for line in lines]
    shortest = min(map(len, rows))
    return 100 * np.array([row[:shortest] for row in rows], dtype=np.float64)


def _draw_band(
    axes: Axes, xs: NDArray[np.int64], values: NDArray[np.float64], *, colour: str
) -> None:
    axes.plot(xs, values.mean(axis=0), color=colour, lw=1.8)
    if len(values) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(xs, low, high, color=colour, alpha=0.12, lw=0)


def _label_ends(axes: Axes, ends: dict[str, float]) -> None:
    """Write each method's name and last value beside the picture, none on another."""
    heights = spread(list(ends.values()), gap=LABEL_GAP)
    lowest = min([0.0, *heights])
    axes.set_ylim(lowest - 2, 102)
    for index, (method, height) in enumerate(zip(ends, heights, strict=True)):
        axes.annotate(
            f"{method} {ends[method]:.1f} %",
            (1.01, height),
            xycoords=("axes fraction", "data"),
            color=colour_of(method, index),
            va="center",
            weight="bold",
            fontsize=9,
        )


def _ranking(case: CaseLines) -> str:
    """Name the best three methods by the mean of their last five evaluations."""
    means = {method: mean_of(case, method, TAIL) for method in case.finished}
    known = sorted(
        (method for method in means if means[method] is not None),
        key=lambda method: -(means[method] or 0.0),
    )
    best = ", ".join(f"{method} {percent_text(means[method])}" for method in known[:3])
    return f"Best by the mean of the last 5: {best}"
