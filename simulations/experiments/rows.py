"""What a journal holds, row by row: all a report knows of a run.

The package's ``Journal`` writes one JSON line per event the moment it happens, so an
interrupted run leaves a journal that can be read up to its last whole line.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

ACCEPTED = "accepted"
NOT_SAMPLED = "not_sampled"
SAT_OUT = "sat_out"
LOST = "lost"
TRAIN = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRow:
    """What happened to one client in one round.

    ``step_flops`` is for methods that train other models than the task's: the
    floating-point operations of a training step on the device. Where it is a variant
    of the task's, along a route, ``edge_step_flops`` are those at edges.
    """

    round: int
    client_key: str
    phase: str = TRAIN
    status: str = ACCEPTED
    cause: str = ""
    route: str = ""
    recompute: str = "none"
    codecs: tuple[str, ...] = ()  # one per cut; empty for raw at all of them
    num_steps: int = 0
    step_flops: float | None = None
    edge_step_flops: float = 0.0
    variant: str = ""
    moves: tuple[dict[str, Any], ...] = ()
    replans: tuple[dict[str, Any], ...] = ()
    budget_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    peak_bytes: int = 0
    num_examples: int = 0
    loss: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    edge_bytes_up: int = 0
    edge_bytes_down: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """What one round took; ``comm_bytes_total`` counts every link there is."""

    round: int
    selected: int = 0
    accepted: int = 0
    round_wall_clock_sec: float = 0.0
    server_aggregation_time_sec: float = 0.0
    comm_bytes_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """How good the global model is after a round; round 0 is the start."""

    round: int
    accuracy: float
    loss: float
    per_class_accuracy: tuple[float | None, ...]


Row = TypeVar("Row", ClientRow, RoundRow, EvaluationRow)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRun:
    """The journal of one method, sorted by kind."""

    method: str
    clients: tuple[ClientRow, ...] = ()
    rounds: tuple[RoundRow, ...] = ()
    evaluations: tuple[EvaluationRow, ...] = ()

    @classmethod
    def from_rows(cls, method: str, rows: list[dict[str, Any]]) -> Self:
        """Sort rows by their ``kind``; other kinds are for other readers."""
        return cls(
            method=method,
            clients=tuple(_row(ClientRow, r) for r in rows if r["kind"] == "client"),
            rounds=tuple(_row(RoundRow, r) for r in rows if r["kind"] == "round"),
            evaluations=tuple(
                _row(EvaluationRow, r) for r in rows if r["kind"] == "evaluation"
            ),
        )

    def training(self) -> tuple[ClientRow, ...]:
        """Return the rows of training, without those of federated evaluation."""
        return tuple(row for row in self.clients if row.phase == TRAIN)


def read_run(path: Path) -> MethodRun:
    """Read a journal; a last line that was cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1] if line]
    return MethodRun.from_rows(path.stem, rows)


def _row(row_type: type[Row], values: dict[str, Any]) -> Row:
    """Take the fields that a kind of row has; null is the same as not there."""
    known = {field.name for field in fields(row_type)}
    taken: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in known and value is not None
    }
    return row_type(**taken)
