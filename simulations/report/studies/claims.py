"""Claims: what a report says of every case, each with a picture and one table."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from simulations.report.studies import crossing_plots, curves, fleet_plots
from simulations.report.studies.cells import (
    BOUND,
    CEILING,
    FINAL,
    NOTHING,
    OURS,
    TAIL,
    UNCODED,
    bare_percent,
    crossed_bytes,
    depth_of,
    estimate,
    gain,
    geometric_mean_ratio,
    participants_text,
    per_class,
)
from simulations.report.studies.lines import CaseLines
from simulations.report.studies.reading import CaseResults
from simulations.report.summary import bytes_text, joules_text, ratio_text, seconds_text

Cell = Callable[[CaseLines, str], str]
"""``cell(case, method)`` is one cell of a method's row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One question to every case of a study."""

    title: str  # The question
    text: str
    cells: Mapping[str, Cell]  # The table's columns
    picture: Callable[[CaseResults], Figure | None] = lambda _: None
    needs: str = FINAL  # A figure: a method that does not know it has no row

    @property
    def columns(self) -> tuple[str, ...]:
        """Heads of the table."""
        return ("method", *self.cells)

    def rows(self, case: CaseLines) -> list[tuple[str, ...]]:
        """Make the table of one case, a row for each method."""
        return [
            (method, *(cell(case, method) for cell in self.cells.values()))
            for method in case.finished
            if case.values(method, self.needs)
        ]


def of_seeds(
    figure: str,
    text: Callable[[Any], str],
    reduce: Callable[[Iterable[float]], float] = fmean,
) -> Cell:
    """Return the cell that prints a figure, reduced over the seeds that know it."""

    def cell(case: CaseLines, method: str) -> str:
        values = case.values(method, figure).values()
        return text(reduce(values)) if values else NOTHING

    return cell


def accuracy_cell(figure: str) -> Cell:
    """Return the cell that prints a share in percent, with its interval."""

    def cell(case: CaseLines, method: str) -> str:
        found = estimate(list(case.values(method, figure).values()))
        return NOTHING if found is None else f"{found.text(sign='')} %"

    return cell


def gain_cell(one: str | None, other: str | None, figure: str) -> Cell:
    """Return the cell that prints a difference; None stands for the row's method."""

    def cell(case: CaseLines, method: str) -> str:
        found = gain(case, one or method, other or method, figure)
        return NOTHING if found is None else found.text()

    return cell


def class_cell(label: int) -> Cell:
    """Return the cell that prints the accuracy of one class."""

    def cell(case: CaseLines, method: str) -> str:
        classes = per_class(case, method)
        return bare_percent(classes[label] if label < len(classes) else None)

    return cell


def reached_cell(figure: str) -> Cell:
    """Return the cell that counts the seeds which know a figure."""
    return lambda case, method: (
        f"{len(case.values(method, figure))} of {len(case.finished[method])}"
    )


def ceiling_cell(figure: str) -> Cell:
    """Return the cell that divides a figure by FedAvg's."""
    return lambda case, method: ratio_text(
        geometric_mean_ratio(case.values(method, figure), case.values(CEILING, figure))
    )


def crossed_cell(direction: str) -> Cell:
    """Return the cell that prints what a client's cut carries in a round."""
    return lambda case, method: bytes_text(crossed_bytes(case, method, direction))


def _times_less_cell(case: CaseLines, method: str) -> str:
    """Divide what crosses uncoded by what the method's cut carries."""
    most, found = (crossed_bytes(case, name) for name in (UNCODED, method))
    return ratio_text(most / found if most and found else None)


def _rounds_cell(case: CaseLines, method: str) -> str:
    values = case.values(method, "rounds_to_target").values()
    reached = reached_cell("rounds_to_target")(case, method)
    return f"{median(values):g} ({reached})" if values else "never"


def _range_cell(case: CaseLines, method: str) -> str:
    values = case.values(method, "participants").values()
    return f"{min(values):.0f} to {max(values):.0f}"


def _routes_cell(case: CaseLines, method: str) -> str:
    """List the routes of all updates, with their shares; the smallest part first."""
    counts: Counter[str] = Counter()
    for line in case.finished[method].values():
        counts.update(line.figures["routes"])
    texts = [
        f"{n} {counts[n] / counts.total():.0%}" for n in sorted(counts, key=depth_of)
    ]
    return ", ".join(texts) or NOTHING


CLAIMS: dict[str, Claim] = {
    "accuracy": Claim(
        title="Who learns how much",
        text="Share of the test set, which the server holds: mean over the seeds, the "
        "band goes from the worst to the best seed. Single rounds swing; the mean of "
        "the last five evaluations is steadier. ± is half of the 95 % t interval.",
        picture=curves.accuracy_over_rounds,
        cells={
            "final accuracy": accuracy_cell(FINAL),
            "mean of last 5": accuracy_cell(TAIL),
            "rounds to target (seeds that reach it)": _rounds_cell,
            "seeds": lambda case, method: str(len(case.finished[method])),
        },
    ),
    "gains": Claim(
        title="What the difference is, seed by seed",
        text="Differences in points, seed by seed, ± half of the 95 % t interval. An "
        "interval that crosses zero shows nothing. "
        "Methods share data, clients and first model of a seed, so pairs are compared. "
        "On the left drop_weak is left out, since it would squeeze the others. "
        "The distance to fedavg is what remains to the bound that ignores memory.",
        picture=curves.gains,
        cells={
            f"{OURS} gains over it, final": gain_cell(OURS, None, FINAL),
            f"{OURS} gains over it, last 5": gain_cell(OURS, None, TAIL),
            f"it gains over {BOUND}, final": gain_cell(None, BOUND, FINAL),
            f"it gains over {BOUND}, last 5": gain_cell(None, BOUND, TAIL),
            f"minus {CEILING}, last 5": gain_cell(None, CEILING, TAIL),
        },
    ),
    "classes": Claim(
        title="Which classes it learns",
        text="Accuracy of each class in percent after the last round, mean over the "
        "seeds. Where weak clients hold classes of their own, a method without them "
        "cannot learn these.",
        cells={str(label): class_cell(label) for label in range(10)},
    ),
    "participation": Claim(
        title="Who takes part",
        text="Clients in the order of the fleet, the weakest first. The darker, the "
        "more seeds in which the update was accepted in that round.",
        picture=fleet_plots.who_took_part,
        cells={
            "clients with an accepted update, mean": participants_text,
            "seed by seed": _range_cell,
        },
    ),
    "routes": Claim(
        title="What the devices train",
        text="Shares of the fleet by what a client trained in a round, mean over the "
        "seeds; white: no update. Methods that have but one answer are not drawn.",
        picture=fleet_plots.routes_over_rounds,
        cells={"routes that were used, with their share of all updates": _routes_cell},
    ),
    "memory": Claim(
        title="What a device holds",
        text="Measured peak of a device's tensors over its budget, a dot for each "
        "client, the worst of all seeds and rounds. Right of the line the device would "
        "have run out of memory: some methods ignore budgets. The smallest device "
        "served is the least budget of a client that trained within it.",
        picture=fleet_plots.peaks_over_budgets,
        cells={
            "largest peak": of_seeds("device_peak_bytes", bytes_text, max),
            "worst peak / budget": of_seeds("peak_over_budget", ratio_text, max),
            "above budget": of_seeds("devices_over_budget", "{:.0f}".format, max),
            "smallest device served": of_seeds(
                "smallest_served_budget_bytes", bytes_text, min
            ),
        },
    ),
    "traffic": Claim(
        title="What crosses the network",
        text="Tensors and plans, without protocol headers, mean over the seeds; the "
        "table counts the whole run.",
        picture=fleet_plots.bytes_per_round,
        cells={
            "devices received": of_seeds("bytes_down", bytes_text),
            "devices sent": of_seeds("bytes_up", bytes_text),
            "all links": of_seeds("comm_bytes_total", bytes_text),
        },
    ),
    "time": Claim(
        title="How long it takes on the devices",
        text="Simulated seconds, from measured bytes and counted operations with the "
        "fleet's speeds and links; not wall-clock. A round lasts as long as its "
        "slowest client. Ratios to fedavg are geometric means over the seeds that both "
        "have; time to the target counts only seeds that reach it.",
        picture=curves.accuracy_over_time,
        cells={
            "slowest of a round, median": of_seeds(
                "simulated_seconds_per_round", seconds_text
            ),
            "at worst": of_seeds("simulated_seconds_slowest_round", seconds_text, max),
            "median / fedavg": ceiling_cell("simulated_seconds_per_round"),
            "to the target, median": of_seeds(
                "simulated_seconds_to_target", seconds_text, median
            ),
            "seeds that reach it": reached_cell("simulated_seconds_to_target"),
            "to the target / fedavg": ceiling_cell("simulated_seconds_to_target"),
        },
        needs="simulated_seconds_per_round",
    ),
    "crossing": Claim(
        title="What crosses the cut, and what that costs",
        text="Bytes between device and edge, of an average client and round, without "
        "what passes between devices and server. Accuracy is that of the model that "
        "was trained, with the codec in it.",
        picture=crossing_plots.accuracy_over_bytes,
        cells={
            "mean of last 5": accuracy_cell(TAIL),
            f"points against {UNCODED}": gain_cell(None, UNCODED, TAIL),
            "up": crossed_cell("edge_bytes_up"),
            "down": crossed_cell("edge_bytes_down"),
            f"times less than {UNCODED}": _times_less_cell,
            "a round takes": of_seeds("simulated_seconds_per_round", seconds_text),
            "largest peak": of_seeds("device_peak_bytes", bytes_text, max),
        },
        needs="edge_bytes_up",
    ),
    "server": Claim(
        title="What the server adds",
        text="Points and rounds against fedavg, which leaves the server's data unused. "
        "Of the rounds to the target, the ratio is the geometric mean over the seeds "
        "that both reach. Simulated seconds do not count what the server trains.",
        cells={
            "mean of last 5": accuracy_cell(TAIL),
            f"points against {CEILING}": gain_cell(None, CEILING, TAIL),
            "final, points": gain_cell(None, CEILING, FINAL),
            "rounds to target (seeds that reach it)": _rounds_cell,
            f"rounds / {CEILING}": ceiling_cell("rounds_to_target"),
            "a round takes here": of_seeds("seconds_per_round", seconds_text),
        },
    ),
    "energy": Claim(
        title="What energy it takes",
        text="Simulated joules above idle of a whole run, all devices together, mean "
        "over the seeds.",
        cells={
            "devices": of_seeds("simulated_device_joules", joules_text),
            "edges": of_seeds("simulated_edge_joules", joules_text),
        },
        needs="simulated_device_joules",
    ),
    "duration": Claim(
        title="How long a round takes here",
        text="Wall-clock time of the simulation on this machine, where devices and "
        "edge share the processor; not that of a real fleet. In the first round "
        "edges start and workers warm up: the mean has it, the median does not. "
        "Flower looks for replies every tenth of a second.",
        cells={
            "median": of_seeds("seconds_per_round", seconds_text),
            "first round": of_seeds("first_round_seconds", seconds_text),
            "mean": of_seeds("round_wall_clock_sec", seconds_text),
            "of which merging": of_seeds("server_aggregation_time_sec", seconds_text),
        },
    ),
}
"""Every claim by its name."""

TERMINAL: dict[str, Cell] = {
    "final\n%": of_seeds(FINAL, bare_percent),
    "last 5\n%": of_seeds(TAIL, bare_percent),
    f"{OURS}\ngains on it": gain_cell(OURS, None, TAIL),
    f"it gains on\n{BOUND}": gain_cell(None, BOUND, TAIL),
    "took\npart": lambda case, method: participants_text(case, method).partition(" ")[
        0
    ],
    "peak /\nbudget": of_seeds("peak_over_budget", ratio_text, max),
    "devices\nreceived": of_seeds("bytes_down", bytes_text),
    "slowest\ndevice": of_seeds("simulated_seconds_per_round", seconds_text),
}
"""The terminal's columns, with the line breaks that make them narrow."""

TERMINAL_SINGLE: dict[str, Cell] = {
    "accuracy": of_seeds(FINAL, bare_percent),
    "mean of\nlast 5": of_seeds(TAIL, bare_percent),
    "took\npart": participants_text,
    "largest\npeak": of_seeds("device_peak_bytes", bytes_text, max),
    "peak /\nbudget": of_seeds("peak_over_budget", ratio_text, max),
    "devices\nreceived": of_seeds("bytes_down", bytes_text),
    "devices\nsent": of_seeds("bytes_up", bytes_text),
    "simulated\n/ round": of_seeds("simulated_seconds_per_round", seconds_text),
    "wall-clock\n/ round": of_seeds("seconds_per_round", seconds_text),
}
"""The same for a single experiment under Flower's engine."""
