"""WHALE-FL's five devices, with the times that its authors measured on them.

``whale.csv`` is the table in the readme of github.com/BESTTOOLBOX/WHALE-FL: seconds of
training one example in one step at five widths of a network for MNIST. Transfers of its
whole model are below; at a width they take its square of them, as in the authors' code.
"""

import csv
from functools import cache
from pathlib import Path

from flwr_smartsplit.types import WHOLE
from simulations.fleets.devices import Devices, FleetDevice, Needs, Times

TABLE = Path(__file__).with_name("whale.csv")

TRANSFER_SECONDS = {
    "MacBookPro2018": 0.1544,
    "Xavier": 0.3088,
    "TX2": 0.6176,
    "Nano": 0.823466667,
    "RaspberryPi": 0.823466667,
}
"""Of the whole model, at 80, 40, 20, 15 and 15 Mbit/s."""

LADDER = {"MacBookPro2018": 1.0, "Xavier": 0.5, "TX2": 0.5}
"""Of the table, widths by speed; others have a quarter."""


def whale_devices(needs: Needs, num_clients: int, seed: int = 0) -> Devices:
    """Give the clients the five kinds in turn, without a limit of memory."""
    del needs, seed
    kinds = [*TRANSFER_SECONDS]
    return tuple(
        FleetDevice(name=kind, budget_bytes=None, times=times_of(kind))
        for kind in (kinds[index % len(kinds)] for index in range(num_clients))
    )


@cache
def times_of(kind: str) -> Times:
    """Read a device's times."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["device"] == kind]
    rates = {_name(float(row["rate"])): float(row["rate"]) for row in rows}
    each = [float(row["seconds_per_example"]) for row in rows]
    whole = TRANSFER_SECONDS[kind]
    return Times(
        example_seconds=dict(zip(rates, each, strict=True)),
        transfer_seconds={name: whole * rate**2 for name, rate in rates.items()},
    )


def _name(rate: float) -> str:
    return WHOLE.name if rate == 1 else f"width {rate:g}"
