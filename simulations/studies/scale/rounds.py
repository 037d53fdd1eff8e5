"""Seconds per round of SmartSplit and of Flower's FedAvg, in turns, in one run."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from simulations.benchmarks.round_overhead import (
    FEDAVG,
    PLAIN_FEDAVG,
    SMARTSPLIT,
    Setting,
)
from simulations.benchmarks.round_overhead import simulate as simulate_rounds
from simulations.experiments.runner import quiet_libraries

NUM_ROUNDS, NUM_HIDDEN, NUM_WORKERS = 3, 8, 2
WAYS = {PLAIN_FEDAVG: "plain", FEDAVG: "fedavg", SMARTSPLIT: "smartsplit"}


def measure_rounds(num_clients: int) -> dict[str, Any]:
    """Time steady rounds in which all clients do next to nothing.

    Parameters
    ----------
    num_clients : int
        How many take part in every round.

    Returns
    -------
    dict[str, Any]
        The median of each way, and SmartSplit's over FedAvg's with the same clients.
    """
    with TemporaryDirectory() as folder, quiet_libraries(verbose=False):
        setting = Setting(
            num_clients=num_clients,
            num_rounds=NUM_ROUNDS,
            num_workers=NUM_WORKERS,
            num_hidden=NUM_HIDDEN,
            apis=("message",),
            has_split=False,
            folder=Path(folder) / str(num_clients),
        )
        (found,) = simulate_rounds(setting, on_round=lambda: None)
    return {
        "seconds_per_round": {name: found.median(way) for way, name in WAYS.items()},
        "ratio": found.ratio(),
        "load": found.load,
    }
