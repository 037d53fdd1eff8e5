"""Run units of a study in processes of their own, some at once.

A process per unit gives its memory back, and one that is killed for lack of it ends
with a reason and not with a wait.
"""

import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from flwr_smartsplit.errors import SmartSplitError
from simulations.experiments.errors import ExperimentError
from simulations.experiments.provenance import Provenance
from simulations.experiments.runner import quiet_libraries
from simulations.studies.running import Unit, Watcher, run_one_by_one

ENDED_BY_SIGTERM = 143


def run_in_processes(
    units: Sequence[Unit],
    *,
    provenance: Provenance,
    watcher: Watcher,
    num_workers: int,
    verbose: bool = False,
) -> None:
    """Run units, each in its own process with one torch thread.

    Whatever ends this function also ends the processes.

    Parameters
    ----------
    units : Sequence[Unit]
        What to run.
    provenance : Provenance
        Stored with each unit.
    watcher : Watcher
        Told how far it is, in this process.
    num_workers : int
        Units that run at the same time.
    verbose : bool
        Whether Flower may log.

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
                watcher.on_begin(unit)
                connection, process = _started(unit, provenance, verbose)
                active[connection] = unit, process
            for ready in wait(list(active)):
                _heed(active, ready, watcher)  # type: ignore[arg-type]
    finally:
        for _, process in active.values():
            process.terminate()
            process.join()


def _heed(
    active: dict[Connection, tuple[Unit, SpawnProcess]],
    ready: Connection,
    watcher: Watcher,
) -> None:
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
        watcher.on_end(unit)
    else:
        if isinstance(message, str):
            raise ExperimentError(message)
        watcher.on_round(unit, *message)


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

    def nobody(_: Unit) -> None:
        """Nothing: the process that waits sees the begin and the end itself."""

    def on_round(_: Unit, *message: Any) -> None:
        connection.send(message)

    watcher = Watcher(on_begin=nobody, on_end=nobody, on_round=on_round)
    try:
        with quiet_libraries(verbose=verbose):
            run_one_by_one([unit], provenance=provenance, watcher=watcher)
    except (ExperimentError, SmartSplitError) as error:
        connection.send(str(error))
