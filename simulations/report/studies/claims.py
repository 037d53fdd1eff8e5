"""Claims: what a report says of every case, each with a picture and one table."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from simulations.report.studies import curves, fleet_plots, tables
from simulations.report.studies.lines import CaseLines
from simulations.report.studies.reading import CaseResults


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One question to every case of a study.

    Parameters
    ----------
    title : str
        The question.
    text : str
        What to know about the numbers.
    picture : Callable[[CaseResults], Figure or None]
        Draws the answer; None if the journals do not know it.
    columns : tuple[str, ...]
        Heads of the table; the first is the method's.
    rows : Callable[[CaseLines], list[tuple[str, ...]]]
        Its cells; none where the answer is not known.
    """

    title: str
    text: str
    picture: Callable[[CaseResults], Figure | None]
    columns: tuple[str, ...]
    rows: Callable[[CaseLines], tables.Rows]


POINTS = "points, seed by seed, ± half of the 95 % t interval"

CLAIMS: dict[str, Claim] = {
    "accuracy": Claim(
        title="Who learns how much",
        text="Share of the test set, which the server holds: mean over the seeds, the "
        "band goes from the worst to the best seed. Single rounds swing; the mean of "
        "the last five evaluations is steadier. ± is half of the 95 % t interval.",
        picture=curves.accuracy_over_rounds,
        columns=(
            "method",
            "final accuracy",
            "mean of last 5",
            "rounds to target (seeds that reach it)",
            "seeds",
        ),
        rows=tables.accuracy_rows,
    ),
    "gains": Claim(
        title="What the difference is, seed by seed",
        text=f"Differences in {POINTS}. An interval that crosses zero shows nothing. "
        "Methods share data, clients and first model of a seed, so pairs are compared. "
        "On the left drop_weak is left out, since it would squeeze the others. "
        "The distance to fedavg is what remains to the bound that ignores memory.",
        picture=curves.gains,
        columns=(
            "method",
            "smartsplit gains over it, final",
            "last 5",
            "it gains over drop_weak, final",
            "last 5",
            "minus fedavg, last 5",
        ),
        rows=tables.gain_rows,
    ),
    "classes": Claim(
        title="Which classes it learns",
        text="Accuracy of each class in percent after the last round, mean over the "
        "seeds. Where weak clients hold classes of their own, a method without them "
        "cannot learn these.",
        picture=curves.accuracy_per_class,
        columns=("method", *map(str, range(10))),
        rows=tables.class_rows,
    ),
    "participation": Claim(
        title="Who takes part",
        text="Clients in the order of the fleet, the weakest first. The darker, the "
        "more seeds in which the update was accepted in that round.",
        picture=fleet_plots.who_took_part,
        columns=("method", "clients with an accepted update, mean", "seed by seed"),
        rows=tables.participation_rows,
    ),
    "routes": Claim(
        title="What the devices train",
        text="Shares of the fleet by what a client trained in a round, mean over the "
        "seeds; white: no update. Methods that have but one answer are not drawn.",
        picture=fleet_plots.routes_over_rounds,
        columns=("method", "routes that were used, with their share of all updates"),
        rows=tables.route_rows,
    ),
    "memory": Claim(
        title="What a device holds",
        text="Measured peak of a device's tensors over its budget, a dot for each "
        "client, the worst of all seeds and rounds. Right of the line the device would "
        "have run out of memory: some methods ignore budgets.",
        picture=fleet_plots.peaks_over_budgets,
        columns=("method", "largest peak", "worst peak / budget", "above budget"),
        rows=tables.memory_rows,
    ),
    "traffic": Claim(
        title="What crosses the network",
        text="Tensors and plans, without protocol headers, mean over the seeds; the "
        "table counts the whole run.",
        picture=fleet_plots.bytes_per_round,
        columns=("method", "devices received", "devices sent", "all links"),
        rows=tables.traffic_rows,
    ),
    "time": Claim(
        title="How long it takes on the devices",
        text="Simulated seconds, from measured bytes and counted operations with the "
        "fleet's speeds and links; not wall-clock. A round lasts as long as its "
        "slowest client. Ratios to fedavg are geometric means over the seeds that both "
        "have; time to the target counts only seeds that reach it.",
        picture=curves.accuracy_over_time,
        columns=(
            "method",
            "slowest of a round, median",
            "at worst",
            "median / fedavg",
            "to the target, median",
            "seeds that reach it",
            "to the target / fedavg",
        ),
        rows=tables.time_rows,
    ),
    "energy": Claim(
        title="What energy it takes",
        text="Simulated joules above idle of a whole run, all devices together, mean "
        "over the seeds.",
        picture=fleet_plots.joules,
        columns=("method", "devices", "edges"),
        rows=tables.energy_rows,
    ),
}
"""Every claim by its name."""
