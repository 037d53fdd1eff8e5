"""Sections: the claims of a report, each with its picture and its own small table."""

from collections.abc import Callable
from dataclasses import dataclass

from simulations.report import plots, time_plots
from simulations.report.summary import (
    Results,
    bytes_text,
    joules_text,
    percent_text,
    ratio_text,
    seconds_text,
)
from simulations.report.timeline import common_accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One claim: a picture, what to know about it, and its numbers."""

    title: str
    text: str
    plot: plots.Plot
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def accuracy(results: Results) -> Section:
    """Show how much each method learns."""
    return Section(
        title="Who learns how much",
        text="Accuracy of the global model on the test set, which the server holds. "
        "Single rounds swing; the mean of the last five is steadier.",
        plot=plots.accuracy_over_rounds,
        columns=("method", "final accuracy", "mean of last 5", "rounds"),
        rows=[
            (
                method,
                percent_text(f.accuracy),
                percent_text(f.accuracy_last5),
                str(f.num_rounds),
            )
            for method, f in results.figures().items()
        ],
    )


def classes(results: Results) -> Section:
    """Show which classes each method learns."""
    rows: list[tuple[str, ...]] = []
    for method, f in results.figures().items():
        known = [value for value in f.per_class_accuracy if value is not None]
        worst, best = min(known, default=None), max(known, default=None)
        rows.append((method, percent_text(worst), percent_text(best)))
    return Section(
        title="Which classes it learns",
        text="Where weak clients hold classes of their own, a method without them "
        "cannot learn these.",
        plot=plots.accuracy_per_class,
        columns=("method", "worst class", "best class"),
        rows=rows,
    )


def memory(results: Results) -> Section:
    """Show what devices hold against what they may."""
    return Section(
        title="What a device holds",
        text="Measured peak of all tensors that are alive on a device during training, "
        "against the budget of that device. A red bar is a device that would have run "
        "out of memory: FedAvg trains without regard to budgets. The smallest device "
        "served is the least budget of a client that trained within it.",
        plot=plots.peak_against_budget,
        columns=(
            "method",
            "largest peak",
            "worst peak / budget",
            "devices above budget",
            "smallest device served",
        ),
        rows=[
            (
                method,
                bytes_text(f.device_peak_bytes),
                ratio_text(f.peak_over_budget),
                str(f.devices_over_budget),
                _optional_bytes_text(f.smallest_served_budget_bytes),
            )
            for method, f in results.figures().items()
        ],
    )


def participation(results: Results) -> Section:
    """Show who takes part in which round."""
    num_clients = len(results.client_keys)
    return Section(
        title="Who takes part",
        text="Every client in every round.",
        plot=plots.who_took_part,
        columns=("method", "clients with an accepted update"),
        rows=[
            (method, f"{f.participants} of {num_clients}")
            for method, f in results.figures().items()
        ],
    )


def traffic(results: Results) -> Section:
    """Show what crosses the network."""
    return Section(
        title="What crosses the network",
        text="Tensors and plans, without protocol headers; the table counts the whole "
        "run. Splitting trades device memory for traffic between device and edge.",
        plot=plots.bytes_per_round,
        columns=("method", "devices received", "devices sent", "all links"),
        rows=[
            (
                method,
                bytes_text(f.bytes_down),
                bytes_text(f.bytes_up),
                bytes_text(f.comm_bytes_total),
            )
            for method, f in results.figures().items()
        ],
    )


def simulated_time(results: Results) -> Section:
    """Show how long the fleet would take, and on what energy."""
    target = common_accuracy(results.runs)
    timelines = results.timelines()
    return Section(
        title="How long the fleet would take",
        text="Simulated: measured bytes and counted operations over the fleet's speeds "
        "and links, whatever this machine is. A round lasts as long as its slowest "
        "client; the server takes no time. The dotted line is the best accuracy that "
        "all methods reach. Energy is what devices and edges take above idle.",
        plot=time_plots.accuracy_by_simulated_time,
        columns=(
            "method",
            "median round",
            "slowest round",
            "whole run",
            f"to {percent_text(target)}",
            "devices",
            "edges",
        ),
        rows=[
            (
                method,
                seconds_text(f.simulated_seconds_per_round),
                seconds_text(f.simulated_seconds_slowest_round),
                seconds_text(f.simulated_seconds),
                seconds_text(
                    timelines[method].seconds_to(target)
                    if method in timelines and target is not None
                    else None
                ),
                joules_text(f.simulated_device_joules),
                joules_text(f.simulated_edge_joules),
            )
            for method, f in results.figures().items()
        ],
    )


def duration(results: Results) -> Section:
    """Show how long rounds take on this machine."""
    return Section(
        title="How long a round takes here",
        text="Wall-clock time of the simulation on this machine, where devices and "
        "edge share the processor; not that of a real fleet. In the first round "
        "edges start and workers warm up: the mean has it, picture and median do not. "
        "Flower looks for replies every tenth of a second, hence the steps.",
        plot=plots.seconds_per_round,
        columns=("method", "median", "first round", "mean", "of which merging"),
        rows=[
            (
                method,
                seconds_text(f.seconds_per_round),
                seconds_text(f.first_round_seconds),
                seconds_text(f.round_wall_clock_sec),
                seconds_text(f.server_aggregation_time_sec),
            )
            for method, f in results.figures().items()
        ],
    )


def _optional_bytes_text(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else bytes_text(num_bytes)


SECTIONS: tuple[Callable[[Results], Section], ...] = (
    accuracy,
    classes,
    memory,
    participation,
    traffic,
    simulated_time,
    duration,
)
"""The claims in reading order."""
