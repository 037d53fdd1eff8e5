"""Journal rows as curves: functions for ``on_row``, for TensorBoard and W&B.

A round's curves come with its own row, which follows those of its clients.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr_smartsplit.types import ROW_FACTS

Row = Mapping[str, Any]
Scalars = dict[str, float]

_PHASES = {"round": "train", "evaluation_round": "evaluate"}
_OF_ROUND = {
    "accepted": "accepted",
    "selected": "selected",
    "bytes": "comm_bytes_total",
    "seconds": "round_wall_clock_sec",
    "aggregation_seconds": "server_aggregation_time_sec",
}
_COUNT = re.compile(r"/(status|route)/")
_OF_CLIENT = """loss seconds peak_bytes resident_growth_bytes bytes_down bytes_up
    edge_bytes_down edge_bytes_up""".split()


class RoundScalars:
    """Collect rows, and call ``write(round, scalars)`` for each complete round."""

    def __init__(
        self, write: Callable[[int, Scalars], None], *, per_client: bool
    ) -> None:
        self._write = write
        self._per_client = per_client
        self._rows: list[Row] = []
        self._counted: dict[str, set[str]] = {phase: set() for phase in _PHASES}

    def __call__(self, row: Row) -> None:
        """Take one row."""
        if row["kind"] == "client":
            self._rows.append(row)
        elif row["kind"] in _PHASES:
            rows, self._rows = self._rows, []
            mine = [other for other in rows if other["round"] == row["round"]]
            scalars = round_scalars(row, mine)
            # Counts of earlier rounds that this one lacks become 0.
            counted = self._counted[row["kind"]]
            counted |= {name for name in scalars if _COUNT.search(name)}
            scalars = {**dict.fromkeys(sorted(counted), 0.0), **scalars}
            if self._per_client:
                scalars |= client_scalars(mine)
            self._write(row["round"], scalars)


def round_scalars(summary: Row, rows: Sequence[Row]) -> Scalars:
    """Summarise one round's training or evaluation.

    Parameters
    ----------
    summary : Mapping[str, Any]
        The round's row.
    rows : Sequence[Mapping[str, Any]]
        Its clients' rows.

    Returns
    -------
    dict[str, float]
        ``train/...`` or ``evaluate/...``: ``accepted``, ``selected``, ``bytes``,
        ``seconds``, ``aggregation_seconds``, ``loss`` and each metric (means over the
        accepted clients' examples), ``worst_peak_fraction`` (of a budget),
        ``status/...`` and ``route/...`` (numbers of clients).
    """
    phase = _PHASES[summary["kind"]]
    scalars = {
        f"{phase}/{name}": float(summary[key])
        for name, key in _OF_ROUND.items()
        if key in summary
    }
    own = [row for row in rows if row["phase"] == phase]
    scalars |= {f"{phase}/{name}": mean for name, mean in _means(own)}
    fractions = [
        row["peak_bytes"] / row["budget_bytes"]
        for row in own
        if row.get("budget_bytes") and row.get("peak_bytes")
    ]
    if fractions:
        scalars[f"{phase}/worst_peak_fraction"] = max(fractions)
    counts = Counter(f"{row['phase']}/status/{row['status']}" for row in rows)
    counts.update(f"{phase}/route/{row['route']}" for row in own if "route" in row)
    return scalars | {name: float(number) for name, number in counts.items()}


def client_scalars(rows: Sequence[Row]) -> Scalars:
    """List what each client measured, as ``train/client/KEY/loss`` and the like."""
    return {
        f"{row['phase']}/client/{row['client_key']}/{name}": float(row[name])
        for row in rows
        for name in (*_OF_CLIENT, *_metric_names(row))
        if row.get(name) is not None
    }


def _means(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    """Average loss and metrics over the examples of accepted clients."""
    rows = [row for row in rows if row["status"] == "accepted"]
    names = (name for row in rows for name in ("loss", *_metric_names(row)))
    for name in dict.fromkeys(names):
        having = [(row[name], _num_examples(row, name)) for row in rows if name in row]
        examples = sum(count for _, count in having)
        if examples:
            yield name, sum(mean * count for mean, count in having if count) / examples


def _num_examples(row: Row, name: str) -> int:
    """Count the examples over which a row's metric is the mean."""
    count: int = row.get("metric_examples", {}).get(name, row["num_examples"])
    return count


def _metric_names(row: Row) -> list[str]:
    """Name a row's metrics from ``Task.metrics_fn``."""
    return [name for name in row if name not in ROW_FACTS]


class TensorBoardRows(RoundScalars):
    """Write each round's scalars for TensorBoard, given a journal's rows.

    Parameters
    ----------
    log_dir : str or Path
        TensorBoard's folder.
    per_client : bool
        Whether clients have curves of their own.

    Raises
    ------
    ImportError
        If TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | Path, *, per_client: bool = False) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional package
        except ImportError as error:
            raise ImportError(
                "TensorBoardRows needs tensorboard: "
                "pip install 'flwr-smartsplit[tensorboard]'."
            ) from error
        self._writer = SummaryWriter(str(log_dir))
        super().__init__(self._add, per_client=per_client)

    def close(self) -> None:
        """Close the file; each round is in it as soon as it is over."""
        self._writer.close()

    def _add(self, number: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()


class WandbRows(RoundScalars):
    """Log each round's scalars to Weights & Biases, given a journal's rows.

    Parameters
    ----------
    run : wandb.Run
        What ``wandb.init`` returned; finish it yourself.
    per_client : bool
        Whether clients have curves of their own.

    Raises
    ------
    TypeError
        If it has no ``log``.
    """

    def __init__(self, run: Any, *, per_client: bool = False) -> None:
        if not callable(getattr(run, "log", None)):
            raise TypeError(
                f"run is a {type(run).__name__}; give what wandb.init() returned."
            )
        super().__init__(
            lambda number, scalars: run.log(dict(scalars), step=number),
            per_client=per_client,
        )
