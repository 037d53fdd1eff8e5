"""Plots over simulated time: what the fleet would have taken, not this machine."""

from matplotlib.figure import Figure

from simulations.report.plots import WIDTH_INCHES, colour_of
from simulations.report.summary import Results, percent_text, seconds_text
from simulations.report.timeline import common_accuracy


def accuracy_by_simulated_time(results: Results) -> Figure:
    """Draw each method's accuracy over the simulated seconds since the start."""
    figure = Figure(figsize=(WIDTH_INCHES, 4.2))
    axes = figure.subplots()
    for index, (method, timeline) in enumerate(results.timelines().items()):
        axes.plot(
            [seconds for seconds, _ in timeline.accuracies],
            [100 * accuracy for _, accuracy in timeline.accuracies],
            color=colour_of(method, index),
            marker="o",
            ms=3.5,
            lw=1.8,
            label=method,
        )
    target = common_accuracy(results.runs)
    if target is not None:
        axes.axhline(100 * target, color="#6b7280", lw=1, ls=":")
    axes.set(
        xlabel="simulated time (s)",
        ylabel="accuracy on the test set (%)",
        ylim=(0, 102),
    )
    axes.set_xlim(left=0)
    axes.set_title(_finding(results, target))
    if results.timelines():
        figure.legend(loc="outside right upper")
    return figure


def _finding(results: Results, target: float | None) -> str:
    """Say how long each method takes to the accuracy that all of them reach."""
    timelines = results.timelines()
    if not timelines or target is None:
        return "no simulated times in these results"
    times = {
        method: timeline.seconds_to(target) for method, timeline in timelines.items()
    }
    return f"Simulated time to {percent_text(target)}: " + ", ".join(
        f"{method} {seconds_text(seconds)}" for method, seconds in times.items()
    )
