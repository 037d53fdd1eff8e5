"""The tables of phones and links, as they come with the simulations.

``python -m simulations.phones`` makes them from the measurements they sum up;
``docs/howto/fleets.md`` says whose these are.
"""

import csv
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TypeVar

PHONES, LINKS = "phones.csv", "links.csv"
FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class PhoneGroup:
    """Phones with the same memory and about the same speed.

    Parameters
    ----------
    ram_gb : float
        Memory of the phone, in 10**9 bytes.
    float_score : float
        Mean of AI Benchmark's score for float networks on the CPU; about
        proportional to speed.
    num_phones : float
        How many of the listed phones it stands for.
    """

    ram_gb: float
    float_score: float
    num_phones: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLink:
    """Mean and standard deviation of one user's link, in kb/s."""

    down_mean: float
    down_deviation: float
    up_mean: float
    up_deviation: float


Row = TypeVar("Row", PhoneGroup, MeasuredLink)


@cache
def phone_groups() -> tuple[PhoneGroup, ...]:
    """Read the table of phones."""
    return _read(FOLDER / PHONES, PhoneGroup)


@cache
def measured_links() -> tuple[MeasuredLink, ...]:
    """Read the table of links."""
    return _read(FOLDER / LINKS, MeasuredLink)


def write_table(path: Path, rows: list[Row]) -> None:
    """Write rows as CSV, with a line of names."""
    names = [field.name for field in fields(rows[0])]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([f"{getattr(row, n):g}" for n in names] for row in rows)


def _read(path: Path, row_type: type[Row]) -> tuple[Row, ...]:
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(
            row_type(**{name: float(value) for name, value in row.items()})
            for row in csv.DictReader(file)
        )
