"""The picture of what crosses a cut: accuracy over bytes."""

from matplotlib.figure import Figure

from simulations.report.studies.cells import TAIL, crossed_bytes, mean_of
from simulations.report.studies.reading import CaseResults
from simulations.report.style import WIDTH_INCHES, colour_of

KILO = 1000


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
    for index, (method, (kilobytes, values)) in enumerate(found.items()):
        colour = colour_of(method, index)
        mean = sum(values) / len(values)
        axes.vlines(kilobytes, min(values), max(values), color=colour, lw=2, alpha=0.4)
        axes.plot(kilobytes, mean, "o", color=colour, ms=7)
        axes.annotate(
            method,
            (kilobytes, mean),
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
