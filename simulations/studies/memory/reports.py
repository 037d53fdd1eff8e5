"""The memory suite's table, and what its page has besides."""

from collections.abc import Iterator, Sequence

from simulations.report.pages import Section, picture_of
from simulations.report.summary import bytes_text
from simulations.studies.measurement import Report
from simulations.studies.memory.measuring import MemoryRow
from simulations.studies.memory.pictures import CLAIM, plan_curves_picture, ratio_bars

COLUMNS = (
    "model, side",
    "whole\nMiB",
    "device\nMiB",
    "times\nless",
    "floor\nMiB",
    "useful\ncut at",
    "device\nMiB",
    "times\nless",
    "extra\nFLOPs",
    "step\ntime",
)
"""Heads of the table, with the line breaks that fit it into a terminal."""


def headline(rows: Sequence[MemoryRow]) -> str:
    """Sum the results up in a line."""
    if not rows:
        return "memory: nothing is measured yet"
    above = sum(row.ratio >= CLAIM for row in rows)
    return (
        f"memory: {len(rows)} cases of {len({row.model for row in rows})} models, "
        f"batch {rows[0].batch_size}; {above} reach {CLAIM} times less"
    )


def memory_rows(rows: Sequence[MemoryRow]) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row per case; ``~`` marks predictions."""
    return [
        (
            f"{row.model}, {row.input_side}",
            _mebibytes(row.whole_peak_bytes),
            _mark(row.least.is_measured) + _mebibytes(row.least.peak_bytes),
            _times(row.ratio),
            _mebibytes(row.floor_bytes),
            *_useful_cells(row),
        )
        for row in rows
    ]


def _useful_cells(row: MemoryRow) -> tuple[str, ...]:
    useful, ratio = row.useful, row.useful_ratio
    if useful is None or ratio is None:
        return ("no cut",) + ("–",) * 4
    time_ratio = row.step_time_ratio
    return (
        f"{100 * useful.flops_fraction:.0f} %",
        _mark(useful.is_measured) + _mebibytes(useful.peak_bytes),
        _times(ratio),
        f"{100 * useful.extra_flops_fraction:.0f} %",
        "–" if time_ratio is None else f"{time_ratio:.2f}",
    )


def _mebibytes(num_bytes: int) -> str:
    """Print bytes in MiB, with three digits that count where it is small.

    Examples
    --------
    >>> _mebibytes(2_603_520), _mebibytes(2**30)
    ('2.48', '1,024')
    """
    size = num_bytes / 2**20
    return f"{size:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}"  # noqa: PLR2004


def _times(ratio: float) -> str:
    """Print a ratio; below ten, its first decimal counts."""
    return f"{ratio:.{1 if ratio < 10 else 0}f}"  # noqa: PLR2004


def _mark(is_measured: bool) -> str:
    return "" if is_measured else "~"


CAPTION = (
    "Whole: peak of a plain step. Device: measured (~ predicted) at the cut that needs "
    "least, then at the useful one: with a tenth of the forward's FLOPs before it (the "
    "share is given) and a boundary no larger than the inputs. Extra FLOPs: what its "
    "plan adds to a forward of the model. Step time: CPU time of a split step over "
    "that of a whole one."
)


def report_of(rows: Sequence[MemoryRow]) -> Report:
    """Say what the cases gave."""
    return Report(
        headline=headline(rows),
        columns=COLUMNS,
        cells=memory_rows(rows),
        caption=CAPTION,
        sections=list(_sections(rows)),
    )


def _sections(rows: Sequence[MemoryRow]) -> Iterator[Section]:
    """Show ratios and curves, and list floors, plans and checks."""
    if rows:
        yield Section(
            title="How many times less a device holds",
            picture=picture_of(ratio_bars, rows),
        )
    if any(row.curves for row in rows):
        yield Section(
            title="What less memory costs",
            picture=picture_of(plan_curves_picture, rows),
            text="Plans at the useful cut, predicted. The dynamic programme is given "
            "budgets from the least that does to where everything is kept; the greedy "
            "rule the same ones, and stops where it finds no plan. "
            "checkpoint_sequential divides the stages into k segments of equal length "
            "and keeps the last, for every k. Much dearer plans are not drawn.",
        )
    yield Section(
        title="The floor",
        text="Whatever is recomputed, a device holds its batch, the first unit's "
        "parameters and optimizer state, the gradient of its output, and the gradient "
        "of its parameters, when that unit goes backward.",
        columns=("case", "floor", "the least"),
        rows=[(r.title, bytes_text(r.floor_bytes), r.floor_text) for r in rows],
        has_words=True,
    )
    yield Section(
        title="Cuts and plans",
        text="[a:b]: units a to b keep nothing and run again in backward; parts inside "
        "it run a third time.",
        columns=("case", "route", "cut", "plan"),
        rows=_plan_rows(rows),
        has_words=True,
    )
    yield Section(
        title="Predicted and measured",
        columns=("case", "what", "predicted bytes", "measured bytes", "difference"),
        rows=_check_rows(rows),
    )


def _plan_rows(rows: Sequence[MemoryRow]) -> list[tuple[str, ...]]:
    """List both routes of each case."""
    return [
        (row.title, name, f"{route.cut} ({route.unit})", route.plan)
        for row in rows
        for name, route in (("least", row.least), ("useful", row.useful))
        if route is not None
    ]


def _check_rows(rows: Sequence[MemoryRow]) -> list[tuple[str, ...]]:
    """Set predicted beside measured bytes."""
    found = []
    for row in rows:
        whole = row.whole_measured_bytes
        if whole is not None:
            found.append((row.title, "whole", row.whole_peak_bytes, whole))
        for name, route in (("least", row.least), ("useful", row.useful)):
            if route is not None and route.is_measured:
                found.append((row.title, name, route.predicted_bytes, route.peak_bytes))
    return [
        (title, name, f"{said:,}", f"{seen:,}", f"{said / seen - 1:+.2%}")
        for title, name, said, seen in found
    ]
