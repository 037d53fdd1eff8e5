"""The memory suite: how small a device's part of a step gets, model by model."""

from functools import partial
from pathlib import Path
from typing import Any

from simulations.studies.measurement import Item, Measurement, MeasurementOptions
from simulations.studies.memory.cases import MemoryCase, memory_cases
from simulations.studies.memory.measuring import MemoryRow, measure_case
from simulations.studies.memory.reports import report_of

PROFILES = "profiles"


def items(options: MeasurementOptions) -> list[Item]:
    """List the models and sizes of images to measure."""
    cases = memory_cases(options.models, is_small=options.is_small, seed=options.seed)
    return [Item(key=case.key, measure=partial(_measure, case)) for case in cases]


def _measure(case: MemoryCase, folder: Path) -> dict[str, Any]:
    return measure_case(case, cache_dir=folder / PROFILES).values()


def figures(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the peaks of each model: whole, at the least cut, at the useful one."""
    found = {}
    for row in map(MemoryRow.from_values, rows):
        peaks = {"whole": row.whole_peak_bytes, "least": row.least.peak_bytes}
        if row.useful is not None:
            peaks["useful"] = row.useful.peak_bytes
        for count, figures in row.accumulated.items():
            peaks[f"least, accumulated by {count}"] = figures.peak_bytes
        for name, peak in peaks.items():
            found[f"{row.title}: {name}"] = {"device_peak_bytes": peak}
    return found


MEMORY = Measurement(
    name="memory",
    summary="How small the device's part of a step gets, against the whole step.",
    items_fn=items,
    report_fn=lambda rows: report_of([MemoryRow.from_values(row) for row in rows]),
    figures_fn=figures,
)
