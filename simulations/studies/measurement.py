"""Measurement: a suite that measures cases one after the other, without rounds."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from simulations.experiments.errors import ExperimentError
from simulations.report.summary import CONFIG

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
    return str(read_config(folder).get(MEASUREMENT, ""))


def read_config(folder: Path) -> dict[str, Any]:
    """Read what a results folder says of its origin; empty if it has nothing."""
    try:
        read = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return read if isinstance(read, dict) else {}


def finished_lines(path: Path) -> list[str]:
    """Read the lines of a file; a last one that an interrupt cut short is none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [line for line in lines if line]


def begin_folder(folder: Path, config: dict[str, Any], *, rows: str) -> None:
    """Start a results folder, or go on with one: half a line of rows is cut off.

    Parameters
    ----------
    folder : Path
        The results folder.
    config : dict[str, Any]
        Written there, unless it has one.
    rows : str
        The name of the file of rows.

    Raises
    ------
    ExperimentError
        If it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not read_config(folder):
            text = json.dumps(config, indent=2) + "\n"
            (folder / CONFIG).write_text(text, encoding="utf-8")
        path = folder / rows
        if path.exists():
            whole = "".join(line + "\n" for line in finished_lines(path))
            path.write_text(whole, encoding="utf-8")
    except OSError as error:
        raise ExperimentError(
            f"results cannot be written to {str(folder)!r} ({error}): name another "
            "folder with --out."
        ) from error


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show how far a measurement is."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        yield progress


class Measurement(Protocol):
    """A module with these two functions is a measurement."""

    __doc__: str | None

    def run(self, folder: Path, options: MeasurementOptions) -> bool:
        """Measure what the folder does not have yet; return False if interrupted."""

    def show(self, folder: Path, *, as_json: bool) -> None:
        """Write the reports of a results folder, and print what was found."""
