"""A long run: 20 clients, and an edge that is restarted every so many rounds.

After each round, the edge's process and that of strategy and clients are asked what
they hold. None of it may grow.
"""

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import matplotlib.pyplot as plt
import psutil
from flwr.serverapp.strategy import FedAdam
from matplotlib.figure import Figure

from flwr_smartsplit import Checkpoints, Planning, SmartSplit
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from simulations.experiments.local_grid import LocalGrid
from simulations.faults import moments, run, task
from simulations.faults.moments import Here, Signal
from simulations.faults.run import RunOptions, edge_of
from simulations.faults.stage import Edge, Rules, Stage
from simulations.report.style import svg_of

EVERY = 20
SAMPLES, PICTURE = "soak.jsonl", "soak.svg"
_WHOLE_EVERY = 4  # One client in so many trains the whole model
_MOST_GROWTH = {"rss_mib": 16.0, "files": 4.0, "threads": 4.0, "disk_kib": 4.0}
_KIB_A_ROUND = 1.0  # Of metrics, which a checkpoint keeps for Flower's result
_NONE_LEFT = ("sessions", "reserved_bytes")


@dataclass(frozen=True, kw_only=True)
class SoakOptions(RunOptions):
    """A run of many rounds and clients."""

    num_clients: int = 20


def serve(options: SoakOptions) -> None:
    """Be strategy and clients, and write down a sample after each round."""
    folder, path = options.folder, options.folder / SAMPLES
    here = Here(folder, moments.STRATEGY)
    edge = Edge(folder, metrics=options.metrics)
    run.log_to(folder / "strategy.log")
    apps = [
        task.app_of(i, f"c{i:02}", is_split=i % _WHOLE_EVERY > 0)
        for i in range(options.num_clients)
    ]

    def sample(row: Mapping[str, Any]) -> None:
        if row["kind"] != "round":
            return
        number = row["round"]
        taken = {"round": number, "accepted": row["accepted"], **_sample(edge, folder)}
        with path.open("a") as file:
            file.write(json.dumps(taken) + "\n")
        if number % EVERY == 0 and number < options.num_rounds:
            kill = number // EVERY % 2
            Signal(moments.EDGE, SIGKILL if kill else SIGTERM)(folder)

    strategy = SmartSplit(
        task.TASK,
        (edge_of(options, here),),
        strategy=FedAdam(fraction_evaluate=0.0, min_available_nodes=len(apps)),
        planning=Planning(
            choose_route=task.route_of, client_seconds=task.given_seconds
        ),
        verify=False,
        journal=None,
        on_row=(sample,),
        checkpoints=Checkpoints(folder / "run"),
    )
    initial = to_array_record(task.initial_state())
    grid = LocalGrid(apps)
    result = strategy.start(grid, initial, num_rounds=options.num_rounds)
    run.write_final(folder, from_array_record(result.arrays))


def _sample(edge: Edge, folder: Path) -> dict[str, float]:
    """Say what both processes hold."""
    pids = {"edge": moments.pid_of(folder, moments.EDGE), "strategy": os.getpid()}
    found: dict[str, float] = {}
    for name, pid in pids.items():
        process = psutil.Process(pid)
        found[f"{name} rss_mib"] = process.memory_info().rss / 2**20
        found[f"{name} files"] = process.num_fds()
        found[f"{name} threads"] = process.num_threads()
    found["edge disk_kib"] = _kib_of(edge.spill)
    found["strategy disk_kib"] = _kib_of(folder / "run")
    present = edge.present()
    return found | {f"edge {name}": present.get(name, -1.0) for name in _PRESENT}


_PRESENT = ("sessions", "streams", "runs", "reserved_bytes")


def _kib_of(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1024


def soak(
    folder: Path, *, num_rounds: int, num_clients: int
) -> tuple[list[dict[str, float]], list[str]]:
    """Run it; return the samples, and what is wrong with them."""
    options = SoakOptions(
        folder=folder,
        num_rounds=num_rounds,
        num_clients=num_clients,
    )
    rules = Rules(lease_seconds=600.0, most_seconds=10.0 * num_rounds)
    ended = Stage(options, rules, target=serve).play()
    lines = (folder / SAMPLES).read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    problems = [*ended.left, *problems_of(samples)]
    if len(samples) < num_rounds:
        problems.append(f"{len(samples)} rounds of {num_rounds}: {ended.log[-500:]}")
    bad = [s["round"] for s in samples if s["accepted"] < num_clients]
    problems += [f"not all clients are merged in rounds {bad}"] if bad else []
    (folder / PICTURE).write_text(svg_of(drawn, samples))
    return samples, problems


def problems_of(samples: Sequence[Mapping[str, float]]) -> list[str]:
    """Name what grows from the second life of the edge to the last, or is left."""
    first, last = samples[EVERY : 2 * EVERY], samples[-EVERY:]
    problems = []
    for name in samples[0] if len(samples) > 2 * EVERY else ():
        most = _MOST_GROWTH.get(name.partition(" ")[2])
        if name == "strategy disk_kib":
            most = _KIB_A_ROUND * len(samples)
        before, after = (
            statistics.median(each[name] for each in some) for some in (first, last)
        )
        if most is not None and after - before > most:
            problems.append(f"{name} grows from {before:g} to {after:g}")
    for name in _NONE_LEFT:
        left = [s["round"] for s in samples if s[f"edge {name}"] > 0]
        problems += [f"{name} at the edge after rounds {left}"] if left else []
    return problems


def summary(samples: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, ...]]:
    """Return each thing's median in the second life, in the last, and its maximum."""
    for name in samples[0]:
        if name in {"round", "accepted"}:
            continue
        values = [each[name] for each in samples]
        parts = (values[EVERY : 2 * EVERY] or values, values[-EVERY:])
        medians = (f"{statistics.median(part):.1f}" for part in parts)
        yield name, *medians, f"{max(values):.1f}"


def drawn(samples: Sequence[Mapping[str, float]]) -> Figure:
    """Draw everything over the rounds; dotted lines are restarts of the edge."""
    figure, axes = plt.subplots(3, 2, figsize=(9.0, 7.0), sharex=True)
    rounds = [each["round"] for each in samples]
    panels = {
        "resident memory, MiB": ("rss_mib",),
        "open files": ("files",),
        "threads": ("threads",),
        "on disk, KiB": ("disk_kib",),
        "sessions at the edge after the round": ("sessions",),
        "streams and runs at the edge after the round": ("streams", "runs"),
    }
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for place in ("edge", "strategy"):
            for name in names:
                if (key := f"{place} {name}") in samples[0]:
                    values = [each[key] for each in samples]
                    label = place if len(names) == 1 else name
                    axis.plot(rounds, values, label=label)
        for number in rounds[EVERY - 1 :: EVERY]:
            axis.axvline(number, color="#9ca3af", linestyle=":", linewidth=0.8)
        axis.set_title(title)
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        axis.legend(loc="lower right")
    for axis in axes[-1]:
        axis.set_xlabel("round")
    return figure
