"""The tables of measured phones and links, and what makes them.

``python -m simulations.fleets.phone_tables DIR`` makes them from
``raw_ai_benchmark_list.json`` and ``speed_distri.json`` of the FLASH project, in DIR.
Of the phones only groups are kept, none by its name. ``docs/howto/fleets.md`` names the
sources.
"""

import csv
import json
from dataclasses import dataclass, fields
from functools import cache
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, TypeVar

import numpy as np
import typer

PHONES, LINKS = "phones.csv", "links.csv"
FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class PhoneGroup:
    """Phones with the same memory and about the same speed."""

    ram_gb: float  # Memory of the phone, in 10**9 bytes
    float_score: float  # Of AI Benchmark, on the CPU; about proportional to speed
    num_phones: float  # How many of the listed phones it stands for


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


# --- making the tables ----------------------------------------------------------------

RAW_PHONES, RAW_LINKS = "raw_ai_benchmark_list.json", "speed_distri.json"
MAX_GROUPS = 4
"""Groups of about the same size for each amount of memory, by speed."""

MIN_PHONES = 4
"""Phones in a group, if there are so many with that much memory."""


def phone_groups_of(listed: list[dict[str, str]]) -> list[PhoneGroup]:
    """Sum up listed phones by memory, and by quantiles of speed.

    Examples
    --------
    >>> listed = [{"RAM": "2GB", "CPU_F_AI_Score": str(n)} for n in range(1, 9)]
    >>> [(group.float_score, group.num_phones) for group in phone_groups_of(listed)]
    [(2.5, 4), (6.5, 4)]
    """
    phones = sorted(
        (float(phone["RAM"].removesuffix("GB")), float(phone["CPU_F_AI_Score"]))
        for phone in listed
    )
    groups = []
    for ram_gb, same in groupby(phones, key=lambda phone: phone[0]):
        scores = [score for _, score in same]
        num_groups = min(MAX_GROUPS, max(1, len(scores) // MIN_PHONES))
        groups += [
            PhoneGroup(
                ram_gb=ram_gb, float_score=round(fmean(part), 1), num_phones=len(part)
            )
            for part in np.array_split(np.array(scores), num_groups)
        ]
    return groups


def links_of(measured: dict[str, dict[str, Any]]) -> list[MeasuredLink]:
    """Take the numbers of the links, the slowest first, and leave the names out."""
    links = [
        MeasuredLink(
            down_mean=round(link["down_u"], 1),
            down_deviation=round(link["down_sigma"], 1),
            up_mean=round(link["up_u"], 1),
            up_deviation=round(link["up_sigma"], 1),
        )
        for link in measured.values()
    ]
    return sorted(links, key=lambda link: link.down_mean)


def main(
    folder: Annotated[Path, typer.Argument(help="Where FLASH's two JSON files are.")],
    out: Annotated[Path, typer.Option(help="Where the tables go.")] = FOLDER,
) -> None:
    """Make phones.csv and links.csv from what FLASH collected."""
    listed = json.loads((folder / RAW_PHONES).read_text(encoding="utf-8"))
    measured = json.loads((folder / RAW_LINKS).read_text(encoding="utf-8"))
    write_table(out / PHONES, phone_groups_of(listed))
    write_table(out / LINKS, links_of(measured))
    typer.echo(f"{out / PHONES}: {len(listed)} phones; {out / LINKS}: {len(measured)}.")


if __name__ == "__main__":
    typer.run(main)
