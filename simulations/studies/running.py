"""Run a study: the seeds of all cases, without what has finished before.

Each seed of a case is a unit of work that depends on no other, so several run at once
and the result is the same. A process per unit gives its memory back, and one that is
killed for lack of it ends with a reason and not with a wait.
"""

import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from flwr_smartsplit.errors import SmartSplitError
from simulations.experiments.errors import ExperimentError
from simulations.experiments.experiment import Experiment
from simulations.experiments.marks import read_marks
from simulations.experiments.provenance import Provenance
from simulations.experiments.rows import EvaluationRow
from simulations.experiments.runner import (
    OnRound,
    prepare,
    quiet_libraries,
    run_methods,
)
from simulations.methods import METHODS
from simulations.studies.study import Case, seed_folder

ENDED_BY_SIGTERM = 143


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One seed of a case: what is run, with its seed, and its results folder."""

    case: str
    experiment: Experiment
    out: Path

    @property
    def label(self) -> str:
        """Name it for people."""
        return f"{self.case}, seed {self.experiment.seed}"

    def unfinished(self) -> tuple[str, ...]:
        """Name the methods that have left no mark."""
        marks = read_marks(self.out)
        return tuple(name for name in self.experiment.methods if name not in marks)


@dataclass(frozen=True, slots=True)
class Event:
    """A unit has begun; or a method of it has a new accuracy; or it has ended."""

    unit: Unit
    method: str = ""
    row: EvaluationRow | None = None
    is_end: bool = False


def units_of(folder: Path, cases: Sequence[Case]) -> list[Unit]:
    """List the seeds of all cases in their order, finished or not."""
    return [
        Unit(
            case=case.name,
            experiment=case.experiment_of(seed),
            out=seed_folder(folder, case.name, seed),
        )
        for case in cases
        for seed in range(case.num_seeds)
    ]


def run_unfinished(unit: Unit, provenance: Provenance, on_round: OnRound) -> None:
    """Run the methods of a unit that have left no mark in its folder.

    One that was cut short goes on from its newest checkpoint, if it has any.
    """
    finished, wanted = read_marks(unit.out), unit.unfinished()
    if not wanted:
        return
    both = tuple(name for name in METHODS if name in {*wanted, *finished})
    prepared = prepare(
        replace(unit.experiment, methods=both),
        unit.out,
        provenance=provenance,
        kept=finished,
        resumes=True,
    )
    run_methods(
        replace(unit.experiment, methods=wanted),
        unit.out,
        prepared=prepared,
        on_round=on_round,
    )


def run_in_processes(
    units: Sequence[Unit],
    *,
    provenance: Provenance,
    num_workers: int,
    verbose: bool = False,
) -> Iterator[Event]:
    """Run units, each in its own process with one torch thread.

    Whatever ends this function also ends the processes.

    Raises
    ------
    ExperimentError
        If a unit cannot be run, or its process ends before it has.
    """
    waiting = deque(units)
    active: dict[Connection, tuple[Unit, SpawnProcess]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < num_workers:
                unit = waiting.popleft()
                yield Event(unit)
                connection, process = _started(unit, provenance, verbose)
                active[connection] = unit, process
            for ready in wait(list(active)):
                yield _event(active, ready)  # type: ignore[arg-type]
    finally:
        for _, process in active.values():
            process.terminate()
            process.join()


def _event(
    active: dict[Connection, tuple[Unit, SpawnProcess]], ready: Connection
) -> Event:
    """Take one message of a process, or learn that it has ended."""
    unit, process = active[ready]
    try:
        message = ready.recv()
    except EOFError:
        process.join()
        if process.exitcode:
            raise ExperimentError(
                f"{unit.label} ended with exit code {process.exitcode} and the log "
                "above says why (-9: killed, most often for lack of memory; fewer "
                "--workers take less). The same command goes on with what is left."
            ) from None
        del active[ready]
        return Event(unit, is_end=True)
    if isinstance(message, str):
        raise ExperimentError(message)
    return Event(unit, *message)


def _started(
    unit: Unit, provenance: Provenance, verbose: bool
) -> tuple[Connection, SpawnProcess]:
    """Start a unit's process; return where it says how far it is."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(theirs, unit, provenance, verbose), daemon=True
    )
    with _deaf_to_interrupts():
        process.start()
    theirs.close()
    return ours, process


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let a process that is started here inherit that it ignores Ctrl-C.

    A terminal sends it to all processes; the first one ends the others.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(
    connection: Connection, unit: Unit, provenance: Provenance, verbose: bool
) -> None:
    """Run a unit in this process, and report to the one that started it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED_BY_SIGTERM))
    torch.set_num_threads(1)
    try:
        with quiet_libraries(verbose=verbose):
            run_unfinished(unit, provenance, lambda *told: connection.send(told))
    except (ExperimentError, SmartSplitError) as error:
        connection.send(str(error))
