"""Measurement: a suite that measures cases one after the other, without rounds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from simulations.summary import CONFIG

MEASUREMENT = "measurement"
"""The key under which a results folder's configuration names its measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementOptions:
    """What the command line asks of a measurement.

    Parameters
    ----------
    models : tuple[str, ...] or None
        Some of its models; all if None.
    is_small : bool
        Whether a quick look is enough.
    seed : int
        Root of all chance.
    provenance : Mapping[str, Any]
        Which program on which machine; stored with the results.
    """

    models: tuple[str, ...] | None
    is_small: bool
    seed: int
    provenance: Mapping[str, Any]


def measurement_in(folder: Path) -> str:
    """Name the measurement that a results folder is of; empty if it is of none."""
    try:
        read = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return ""
    return str(read.get(MEASUREMENT, "")) if isinstance(read, dict) else ""


class Measurement(Protocol):
    """A module with these two functions is a measurement."""

    __doc__: str | None

    def run(self, folder: Path, options: MeasurementOptions) -> bool:
        """Measure what the folder does not have yet; return False if interrupted."""

    def show(self, folder: Path, *, as_json: bool) -> None:
        """Write the reports of a results folder, and print what was found."""
