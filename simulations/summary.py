"""Summary: the figures of a run, worked out from its journal and nothing else."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from simulations.errors import ExperimentError
from simulations.rows import ACCEPTED, ClientRow, MethodRun, read_run

CONFIG = "config.json"
PROFILE = "profile.json"
"""What the model's units cost, in a results folder."""

NUM_LAST_EVALUATIONS = 5
MEGABYTE = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a results folder holds: the configuration and one journal per method."""

    config: dict[str, Any]
    runs: tuple[MethodRun, ...]

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
        return {run.method: figures_of(run, self.budgets_bytes) for run in self.runs}

    def summary(self) -> dict[str, Any]:
        """Return the figures as JSON values; a number that is not finite is null."""
        num_clients = len(self.client_keys)
        return {
            "methods": {
                method: {**_finite(asdict(figures)), "num_clients": num_clients}
                for method, figures in self.figures().items()
            }
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of one method.

    Parameters
    ----------
    num_rounds : int
        Rounds that were finished.
    accuracy, accuracy_last5 : float or None
        Share of the test set that is right after the last round, and the mean over
        the last five evaluations; None before the first round's end.
    per_class_accuracy : tuple[float or None, ...]
        After the last round.
    participants : int
        Clients with at least one accepted update.
    device_peak_bytes : int
        The most any device held while training.
    peak_over_budget : float or None
        The largest share of its budget that any device held; above 1, it would have
        run out of memory. FedAvg ignores the budgets and is measured against them.
    devices_over_budget : int
        How many devices held more than their budget.
    smallest_served_budget_bytes : int or None
        The least budget of a client that took part and kept within it.
    bytes_down, bytes_up : int
        What the devices received and sent in all, from the server and the edges.
    comm_bytes_total : int
        What crossed any link, those between server and edges included.
    seconds_per_round : float or None
        Median over the rounds without the first, in which workers and edges warm up.
    first_round_seconds : float or None
        Time of the first round.
    round_wall_clock_sec, server_aggregation_time_sec : float or None
        Means over the rounds.
    client_peak_cpu_memory_mb : float
        ``device_peak_bytes`` in megabytes of a million bytes.
    """

    num_rounds: int
    accuracy: float | None
    accuracy_last5: float | None
    per_class_accuracy: tuple[float | None, ...]
    participants: int
    device_peak_bytes: int
    peak_over_budget: float | None
    devices_over_budget: int
    smallest_served_budget_bytes: int | None
    bytes_down: int
    bytes_up: int
    comm_bytes_total: int
    seconds_per_round: float | None
    first_round_seconds: float | None
    round_wall_clock_sec: float | None
    server_aggregation_time_sec: float | None
    client_peak_cpu_memory_mb: float


def read_results(folder: Path) -> Results:
    """Read a results folder, finished or not.

    Raises
    ------
    ExperimentError
        If it is none.
    """
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
    )


def figures_of(run: MethodRun, budgets_bytes: Mapping[str, int]) -> Figures:
    """Work out the figures of one method.

    Parameters
    ----------
    run : MethodRun
        Its journal.
    budgets_bytes : Mapping[str, int]
        The budget of every client that has one.
    """
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
        comm_bytes_total=sum(row.comm_bytes_total for row in run.rounds),
        seconds_per_round=median(wall_clock[1:] or wall_clock) if wall_clock else None,
        first_round_seconds=wall_clock[0] if wall_clock else None,
        round_wall_clock_sec=_mean(wall_clock),
        server_aggregation_time_sec=_mean(
            [row.server_aggregation_time_sec for row in run.rounds]
        ),
        client_peak_cpu_memory_mb=device_peak_bytes / MEGABYTE,
    )


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


def bytes_text(num_bytes: float) -> str:
    """Print bytes in the binary unit that suits them.

    Examples
    --------
    >>> bytes_text(1_328_896), bytes_text(500), bytes_text(300 * 2**30)
    ('1.27 MiB', '500 B', '300 GiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{0 if num_bytes >= 100 * size else 2}f} {unit}"
    return f"{num_bytes:.0f} B"


def percent_text(fraction: float | None) -> str:
    """Print a share in percent, or a dash where there is none.

    Examples
    --------
    >>> percent_text(0.9611), percent_text(None)
    ('96.1 %', '–')
    """
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def seconds_text(seconds: float | None) -> str:
    """Print seconds, or a dash where there are none."""
    return "–" if seconds is None else f"{seconds:.2f} s"


def ratio_text(ratio: float | None) -> str:
    """Print a ratio, or a dash where there is none."""
    return "–" if ratio is None else f"{ratio:.2f}"


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace numbers JSON does not know by null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
