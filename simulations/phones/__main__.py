"""Make the tables again from the measurements: ``python -m simulations.phones DIR``.

``DIR`` holds ``raw_ai_benchmark_list.json`` and ``speed_distri.json`` of the FLASH
project. Of the phones only groups are kept, none by its name.
"""

import json
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer

from simulations.phones.tables import (
    FOLDER,
    LINKS,
    PHONES,
    MeasuredLink,
    PhoneGroup,
    write_table,
)

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
                ram_gb=ram_gb,
                float_score=round(fmean(part), 1),
                num_phones=len(part),
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
