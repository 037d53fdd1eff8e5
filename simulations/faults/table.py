"""The table of faults: each is injected, and its run compared with undisturbed ones."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from rich.table import Table

from flwr_smartsplit.edge.tensors import array_digests
from simulations.faults.cases import CASES, ENDS, GOES_ON, Case
from simulations.faults.run import RunOptions
from simulations.faults.stage import Ended, Rules, Stage

_MOST_SHOWN = 100


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one fault."""

    fault: str
    left_out: list[str]  # Client, round and status
    seen: list[str]  # Warnings and errors in Flower's log
    reconnects: int  # How often someone waited for an edge to answer again
    edge_starts: int
    weights: str
    seconds: float
    problems: list[str]  # What should not be; empty


class References:
    """Final states of undisturbed runs, in which some clients are left out."""

    def __init__(self, folder: Path, api: str) -> None:
        self._folder = folder
        self._api = api
        self._found: dict[Any, Mapping[str, npt.NDArray[Any]]] = {}

    def state(self, absent: frozenset[tuple[str, int]]) -> Any:
        """Return the state of the run in which these clients answer nothing."""
        if absent not in self._found:
            options = RunOptions(
                folder=self._folder / f"reference-{len(self._found)}",
                api=self._api,
                absent=absent,
            )
            ended = Stage(options, Rules()).play()
            if ended.state is None:
                raise RuntimeError(f"the undisturbed run fails: {ended.log[-2000:]}")
            self._found[absent] = ended.state
        return self._found[absent]


def play(
    case: Case, references: References, folder: Path, *, api: str = "message"
) -> tuple[Row, Ended]:
    """Inject one fault, and judge what came out."""
    options = RunOptions(folder=folder, api=api, traps=case.traps, **case.options)
    ended = Stage(options, case.stage_rules(), *case.edge_words).play()
    out = [each for each in ended.left_out if each[3] != "absent"]
    absent = frozenset((key, number) for key, number, _, _ in out)
    problems = [f"left behind: {each}" for each in ended.left]
    fired = len([*folder.glob("fired.*")])
    if fired < len(case.traps):
        problems.append(f"only {fired} of {len(case.traps)} moments came")
    weights = "none: the run ends"
    if ended.state is not None:
        same = not differences(ended.state, references.state(absent))
        names = ", ".join(sorted(f"{key} in round {n}" for key, n in absent))
        what = f"the run without {names}" if absent else "the undisturbed run"
        weights = f"{'bit-equal to' if same else 'DIFFERS from'} {what}"
        problems += [] if same else [weights]
    elif case.may != ENDS:
        problems.append(f"the run ends: {ended.log[-500:]}")
    if absent and case.may == GOES_ON:
        problems.append(f"clients are left out: {out[0][3]}")
    row = Row(
        fault=case.name,
        left_out=[f"{key} {number} {status}" for key, number, status, _ in out],
        seen=ended.seen,
        reconnects=len(re.findall("Trying for", ended.log + ended.client_log)),
        edge_starts=ended.num_edge_starts,
        weights=weights,
        seconds=round(ended.seconds, 2),
        problems=problems,
    )
    return row, ended


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name the arrays that differ in any bit, or that only one has."""
    found = array_digests(one).items() ^ array_digests(other).items()
    return sorted({name for name, _ in found})


def chosen(*, small: bool, only: str) -> list[Case]:
    """Choose the cases for every day, or those with a word in their names."""
    return [c for c in CASES if only in c.name and (c.is_small or not small)]


def rows_of(
    cases: Iterable[Case], *, api: str, on_row: Callable[[Row], object]
) -> list[Row]:
    """Inject all, one after the other."""
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    references = References(folder, api)
    for index, case in enumerate(cases):
        row, _ = play(case, references, folder / str(index), api=api)
        rows.append(row)
        on_row(row)
    if not any(row.problems for row in rows):
        shutil.rmtree(folder)
    return rows


def shown(rows: list[Row]) -> Table:
    """Lay the table out, for people."""
    table = Table("fault", "left out", "in the log", "final weights", box=None)
    for name in ("asked again", "edge starts", "s"):
        table.add_column(name, justify="right")
    table.add_column("problems")
    for row in rows:
        table.add_row(
            row.fault,
            "\n".join(row.left_out) or "nobody",
            "\n".join(map(_short, row.seen)),
            row.weights,
            str(row.reconnects),
            str(row.edge_starts),
            f"{row.seconds:.1f}",
            "\n".join(row.problems) or "none",
        )
    return table


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def as_values(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Return the rows as JSON values."""
    return map(asdict, rows)
