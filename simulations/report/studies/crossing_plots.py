"""The picture of what crosses a cut: accuracy over bytes."""

from matplotlib.figure import Figure

from simulations.report.studies.cells import TAIL, crossed_bytes, mean_of
from simulations.report.studies.reading import CaseResults
from simulations.report.style import WIDTH_INCHES, colour_of, spread

KILO = 1000
_LABEL_SHARE = 0.045  # Of the height, between two labels
_LABEL_WIDTH = 1.6  # Times as many bytes: what a label covers


def accuracy_over_bytes(case: CaseResults) -> Figure | None:
    """Draw each method's accuracy over what a client's cut carries in a round."""
    lines = case.lines
    found = {
        method: (each / KILO, values)
        for method in lines.finished
        if (each := crossed_bytes(lines, method))
        and (values := [100 * v for v in lines.values(method, TAIL).values()])
    }
    if not found:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 4.6))
    axes = figure.subplots()
    means = {method: sum(v) / len(v) for method, (_, v) in found.items()}
    heights = _label_heights({method: x for method, (x, _) in found.items()}, means)
    for index, (method, (kilobytes, values)) in enumerate(found.items()):
        colour, mean = colour_of(method, index), means[method]
        axes.vlines(kilobytes, min(values), max(values), color=colour, lw=2, alpha=0.4)
        axes.plot(kilobytes, mean, "o", color=colour, ms=7)
        axes.annotate(
            method,
            (kilobytes, heights[method]),
            xytext=(7, -3),
            textcoords="offset points",
            color=colour,
            weight="bold",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_xlim(right=1.8 * max(kilobytes for kilobytes, _ in found.values()))
    axes.set(
        xlabel="kB across the cut, both ways, a client and round, each step ten times "
        "as much",
        ylabel="mean of the last 5 evaluations (%)",
    )
    best = max(found, key=lambda method: mean_of(lines, method, TAIL) or 0.0)
    axes.set_title(f"Best by the mean of the last 5: {best}; bars: worst to best seed")
    return figure


def _label_heights(
    kilobytes: dict[str, float], means: dict[str, float]
) -> dict[str, float]:
    """Move the labels of points apart that have about as many bytes."""
    gap = _LABEL_SHARE * (max(means.values()) - min(means.values()))
    heights: dict[str, float] = {}
    group: list[str] = []
    for method in sorted(kilobytes, key=lambda name: kilobytes[name]):
        if group and kilobytes[method] > _LABEL_WIDTH * kilobytes[group[-1]]:
            group = []
        group.append(method)
        placed = spread([means[name] for name in group], gap=gap)
        heights |= dict(zip(group, placed, strict=True))
    return heights
