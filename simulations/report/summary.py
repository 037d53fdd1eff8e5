"""Summary: the figures of a run, worked out from its journal and nothing else."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

from flwr_smartsplit import errors
from flwr_smartsplit.types import ChainProfile
from simulations.experiments.errors import ExperimentError
from simulations.experiments.rows import ACCEPTED, ClientRow, MethodRun, read_run
from simulations.fleets.clock import Clock, Spent
from simulations.fleets.devices import device_from

CONFIG = "config.json"
PROFILE = "profile.json"
"""What the model's units cost, in a results folder."""

COMPARED = (
    "accuracy",
    "simulated_seconds",
    "bytes_up",
    "bytes_down",
    "device_peak_bytes",
)
"""The figures that ``--json`` prints, of every suite."""

NUM_LAST_EVALUATIONS = 5
MEGABYTE = 10**6
MANY_SECONDS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What the rounds of one run would have taken on its fleet."""

    seconds_by_round: dict[int, float]  # Of each round's slowest client
    accuracies: tuple[tuple[float, float], ...]  # Seconds since the start, accuracy
    device_joules: float
    edge_joules: float

    @property
    def seconds(self) -> float:
        """Simulated seconds of all rounds, one after the other."""
        return sum(self.seconds_by_round.values())

    def seconds_to(self, accuracy: float) -> float | None:
        """Return the simulated seconds until a share is right; None if it never is."""
        reached = (at for at, value in self.accuracies if value >= accuracy)
        return next(reached, None)


def timeline_of(run: MethodRun, clock: Clock) -> Timeline:
    """Lay the rounds of a run along the clock."""
    spent: dict[int, list[Spent]] = {row.round: [] for row in run.rounds}
    for row in run.training():
        if row.round in spent:
            spent[row.round].append(clock.spent(row))
    seconds = {
        number: max((each.seconds for each in of_clients), default=0.0)
        for number, of_clients in sorted(spent.items())
    }
    ends = dict(zip(seconds, accumulate(seconds.values()), strict=True))
    return Timeline(
        seconds_by_round=seconds,
        accuracies=tuple(
            (ends.get(row.round, 0.0), row.accuracy)
            for row in run.evaluations
            if row.round in ends or row.round == 0
        ),
        device_joules=sum(e.device_joules for each in spent.values() for e in each),
        edge_joules=sum(e.edge_joules for each in spent.values() for e in each),
    )


def common_accuracy(runs: Iterable[MethodRun]) -> float | None:
    """Return the highest accuracy that every run reaches; None if one has none.

    A time to an accuracy can be compared where everybody gets there.
    """
    best = [
        max((row.accuracy for row in run.evaluations), default=None) for run in runs
    ]
    known = [accuracy for accuracy in best if accuracy is not None]
    return min(known) if known and len(known) == len(best) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a results folder holds: configuration, clock and one journal per method.

    Folders of older versions have no clock.
    """

    config: dict[str, Any]
    runs: tuple[MethodRun, ...]
    clock: Clock | None = None

    @property
    def client_keys(self) -> list[str]:
        """The clients, in the order of the fleet."""
        return [client["client_key"] for client in self.config["clients"]]

    @property
    def budgets_bytes(self) -> dict[str, int]:
        """The budgets of the clients that have one."""
        return {
            client["client_key"]: client["budget_bytes"]
            for client in self.config["clients"]
            if client["budget_bytes"] is not None
        }

    def figures(self) -> dict[str, "Figures"]:
        """Work out every method's figures."""
        return {
            run.method: figures_of(run, self.budgets_bytes, self.clock)
            for run in self.runs
        }

    def timelines(self) -> dict[str, Timeline]:
        """Lay every method's rounds along the clock; nothing without one."""
        if self.clock is None:
            return {}
        return {run.method: timeline_of(run, self.clock) for run in self.runs}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of one method."""

    num_rounds: int  # Rounds that were finished
    # After the last round, and the mean over the last five evaluations
    accuracy: float | None
    accuracy_last5: float | None
    per_class_accuracy: tuple[float | None, ...]  # After the last round
    participants: int  # Clients with at least one accepted update
    device_peak_bytes: int  # The most any device held while training
    peak_over_budget: float | None  # The largest share of a budget that was held
    devices_over_budget: int  # How many devices held more than their budget
    smallest_served_budget_bytes: int | None  # Of clients that kept within it
    bytes_down: int  # To devices, from the server and the edges
    bytes_up: int
    edge_bytes_down: int  # Of these, from edges: gradients, or what came back
    edge_bytes_up: int
    comm_bytes_total: int  # On any link, those between server and edges included
    # Wall-clock time: median without the first round, in which workers warm up
    seconds_per_round: float | None
    first_round_seconds: float | None
    # Means over the rounds
    round_wall_clock_sec: float | None
    server_aggregation_time_sec: float | None
    client_peak_cpu_memory_mb: float  # ``device_peak_bytes`` in millions of bytes
    simulated_seconds: float | None = None  # Of all rounds
    # The slowest selected device's: median over the rounds, and the slowest round
    simulated_seconds_per_round: float | None = None
    simulated_seconds_slowest_round: float | None = None
    simulated_device_joules: float | None = None
    simulated_edge_joules: float | None = None


def read_results(folder: Path) -> Results:
    """Read a results folder, finished or not."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ExperimentError(
            f"{str(folder)!r} holds no results: its {CONFIG} cannot be read ({error}). "
            f"Name the folder that a run was told to write to with --out."
        ) from error
    journals = [folder / f"{method}.jsonl" for method in config["methods"]]
    return Results(
        config=config,
        runs=tuple(read_run(journal) for journal in journals if journal.exists()),
        clock=_clock(folder / PROFILE, config),
    )


def _clock(profile: Path, config: dict[str, Any]) -> Clock | None:
    """Build the clock of a results folder; older ones have none."""
    if not profile.exists():
        return None
    return Clock(
        profile=ChainProfile.from_json(profile.read_text(encoding="utf-8")),
        devices=tuple(device_from(client["device"]) for client in config["clients"]),
    )


def figures_of(
    run: MethodRun, budgets_bytes: Mapping[str, int], clock: Clock | None = None
) -> Figures:
    """Work out the figures of one method."""
    trained = [row for row in run.evaluations if row.round > 0]
    last = trained[-1] if trained else None
    training = run.training()
    peaks = peaks_by_client(training)
    shares = {
        key: peak / budgets_bytes[key]
        for key, peak in peaks.items()
        if key in budgets_bytes
    }
    took_part = participants(training)
    served = [budgets_bytes[k] for k in took_part if shares.get(k, math.inf) <= 1.0]
    wall_clock = [row.round_wall_clock_sec for row in run.rounds]
    device_peak_bytes = max(peaks.values(), default=0)
    return Figures(
        num_rounds=len(run.rounds),
        accuracy=last.accuracy if last else None,
        accuracy_last5=_mean([row.accuracy for row in trained[-NUM_LAST_EVALUATIONS:]]),
        per_class_accuracy=last.per_class_accuracy if last else (),
        participants=len(took_part),
        device_peak_bytes=device_peak_bytes,
        peak_over_budget=max(shares.values(), default=None),
        devices_over_budget=sum(share > 1.0 for share in shares.values()),
        smallest_served_budget_bytes=min(served, default=None),
        bytes_down=sum(row.bytes_down + row.edge_bytes_down for row in run.clients),
        bytes_up=sum(row.bytes_up + row.edge_bytes_up for row in run.clients),
        edge_bytes_down=sum(row.edge_bytes_down for row in run.clients),
        edge_bytes_up=sum(row.edge_bytes_up for row in run.clients),
        comm_bytes_total=sum(row.comm_bytes_total for row in run.rounds),
        seconds_per_round=median(wall_clock[1:] or wall_clock) if wall_clock else None,
        first_round_seconds=wall_clock[0] if wall_clock else None,
        round_wall_clock_sec=_mean(wall_clock),
        server_aggregation_time_sec=_mean(
            [row.server_aggregation_time_sec for row in run.rounds]
        ),
        client_peak_cpu_memory_mb=device_peak_bytes / MEGABYTE,
        **_simulated(run, clock),
    )


def _simulated(run: MethodRun, clock: Clock | None) -> dict[str, float]:
    """Work out the figures that need a clock, if there are a clock and a round."""
    if clock is None or not run.rounds:
        return {}
    timeline = timeline_of(run, clock)
    by_round = timeline.seconds_by_round.values()
    return {
        "simulated_seconds": timeline.seconds,
        "simulated_seconds_per_round": median(by_round),
        "simulated_seconds_slowest_round": max(by_round),
        "simulated_device_joules": timeline.device_joules,
        "simulated_edge_joules": timeline.edge_joules,
    }


def peaks_by_client(training: tuple[ClientRow, ...]) -> dict[str, int]:
    """Return the most that each client's device held, where it was measured."""
    peaks: dict[str, int] = {}
    for row in training:
        if row.peak_bytes > 0:
            peaks[row.client_key] = max(row.peak_bytes, peaks.get(row.client_key, 0))
    return peaks


def participants(training: tuple[ClientRow, ...]) -> set[str]:
    """Name the clients with at least one accepted update."""
    return {row.client_key for row in training if row.status == ACCEPTED}


def reasons_to_stay_out(run: MethodRun) -> dict[str, str]:
    """Say of every client without an accepted update why, in its latest words."""
    training = run.training()
    took_part = participants(training)
    return {
        row.client_key: f"{row.status.replace('_', ' ')}: {row.cause or 'no reason'}"
        for row in training
        if row.client_key not in took_part
    }


def methods_object(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Make the one object that every suite prints with ``--json``.

    Parameters
    ----------
    figures : Mapping[str, Mapping[str, Any]]
        What is known of each method, codec or variant that is compared. What is not
        known, and a number that is not finite, becomes null.

    Examples
    --------
    >>> methods_object({"fedavg": {"accuracy": 0.5, "loss": 1.0}})["methods"]["fedavg"]
    {'accuracy': 0.5, 'simulated_seconds': None, 'bytes_up': None, 'bytes_down': None, \
'device_peak_bytes': None}
    """
    return {
        "methods": {
            name: {figure: _printed(figure, values.get(figure)) for figure in COMPARED}
            for name, values in figures.items()
        }
    }


def _printed(figure: str, value: float | None) -> float | None:
    value = finite(value)
    return round(value) if value is not None and "bytes" in figure else value


def finite(value: float | None) -> float | None:
    """Replace a number that JSON does not know by None."""
    return value if value is not None and math.isfinite(value) else None


def bytes_text(num_bytes: float | None) -> str:
    """Print bytes in the unit that suits them, or a dash where there are none."""
    return "–" if num_bytes is None else errors.bytes_text(round(num_bytes))


def percent_text(fraction: float | None) -> str:
    """Print a share in percent, or a dash where there is none.

    Examples
    --------
    >>> percent_text(0.9611), percent_text(None)
    ('96.1 %', '–')
    """
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def seconds_text(seconds: float | None) -> str:
    """Print seconds, or a dash where there are none.

    Examples
    --------
    >>> seconds_text(0.5), seconds_text(12345.6), seconds_text(None)
    ('0.50 s', '12346 s', '–')
    """
    if seconds is None:
        return "–"
    return f"{seconds:.{0 if seconds >= MANY_SECONDS else 2}f} s"


def joules_text(joules: float | None) -> str:
    """Print joules, or a dash where there are none.

    Examples
    --------
    >>> joules_text(12.345), joules_text(123456), joules_text(None)
    ('12.3 J', '123 kJ', '–')
    """
    if joules is None:
        return "–"
    return f"{joules / 1000:.3g} kJ" if joules >= 1000 else f"{joules:.3g} J"  # noqa: PLR2004


def ratio_text(ratio: float | None) -> str:
    """Print a ratio, or a dash where there is none."""
    return "–" if ratio is None else f"{ratio:.2f}"


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None
