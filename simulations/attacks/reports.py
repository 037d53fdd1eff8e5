"""The leakage suite's tables and pictures."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from simulations.report.pages import Section, picture_of
from simulations.report.style import OTHER_COLOURS, WIDTH_INCHES
from simulations.studies.measurement import Report, Row

ATTACKS, CHECK, MEAN = "attacks", "check", "mean image"
COLUMNS = (
    *("cut behind", "defence", "accuracy", "inversion: MSE", "PSNR", "SSIM"),
    *("hijacking: SSIM", "labels by gradient", "epsilon"),
)
_CHECK_COLUMNS = ("training", "honest edges accused", "hijackers noticed", "after")
_PLAIN_COLOUR, _GAP = "#6b7280", 0.8


def report_of(rows: Sequence[Row]) -> Report:
    """Say what the attacks found."""
    attacks = [row for row in rows if row["part"] == ATTACKS]
    checks = [row for row in rows if row["part"] == CHECK]
    mean = next((row for row in rows if row["part"] == MEAN), None)
    accused, noticed, honest, hijacking = (
        sum(row[name] for row in checks)
        for name in ("accused", "noticed", "honest", "hijacking")
    )
    base = "" if mean is None else f" The mean image has {_likeness(mean)}."
    return Report(
        headline=f"leakage: {noticed} of {hijacking} hijackers were noticed, "
        f"{accused} of {honest} honest edges accused",
        columns=COLUMNS,
        cells=[_cells(row) for row in attacks],
        caption="Pixels from 0 to 1; more SSIM is more like the original."
        f"{base} Labels are guessed from the gradients of a u-shaped route, with two "
        "known examples of each class; on a split route the edge is told them.",
        sections=_sections(attacks, checks, mean),
        problems=[f"{accused} honest edges were accused"] if accused else [],
    )


def _sections(
    attacks: list[Row], checks: Sequence[Row], mean: Row | None
) -> list[Section]:
    """Lay out the check on the device, and the pictures."""
    sections = []
    if checks:
        check = Section(
            title="A check on the device",
            text="Edges accused by SmartSplitNumPyClient(check_gradients=True).",
            columns=_CHECK_COLUMNS,
            rows=[_check_cells(row) for row in checks],
        )
        sections.append(check)
    if attacks and mean is not None:
        drawn = attacks, mean
        sections.append(
            Section(title="By cut and defence", picture=picture_of(curves, drawn))
        )
        sections.append(
            Section(
                title="Reconstructed by inversion",
                picture=picture_of(reconstructions, drawn),
            )
        )
    return sections


def _likeness(row: Row) -> str:
    inversion = row["inversion"]
    return f"MSE {inversion['mse']:.4f} and SSIM {inversion['ssim']:.2f}"


def _cells(row: Row) -> tuple[str, ...]:
    inversion, epsilon = row["inversion"], row["epsilon"]
    return (
        row["cut"],
        row["defence"],
        f"{row['accuracy']:.1%}",
        f"{inversion['mse']:.4f}",
        f"{inversion['psnr']:.1f}",
        f"{inversion['ssim']:.2f}",
        f"{row['hijacking']['ssim']:.2f}",
        f"{row['labels_by_gradient']:.1%}",
        "none" if epsilon is None else f"{epsilon:.0f}",
    )


def _check_cells(row: Row) -> tuple[str, ...]:
    after = row["noticed_after"]
    return (
        row["kind"],
        f"{row['accused']} of {row['honest']}",
        f"{row['noticed']} of {row['hijacking']}",
        "" if after is None else f"{after:g} steps",
    )


# --- pictures -------------------------------------------------------------------------

_PANELS: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("inversion: SSIM", lambda row: row["inversion"]["ssim"]),
    ("hijacking: SSIM", lambda row: row["hijacking"]["ssim"]),
    ("accuracy", lambda row: row["accuracy"]),
    ("labels by gradient", lambda row: row["labels_by_gradient"]),
)


def curves(drawn: tuple[list[Row], Row]) -> Figure:
    """Draw each attack's success, and the accuracy, by cut and defence."""
    rows, mean = drawn
    cuts, names = (list(dict.fromkeys(r[k] for r in rows)) for k in ("cut", "defence"))
    figure = Figure(figsize=(WIDTH_INCHES, 5.6))
    for axes, (title, value) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for index, name in enumerate(names):
            own = {row["cut"]: value(row) for row in rows if row["defence"] == name}
            places = [cuts.index(cut) + _GAP * index / len(names) for cut in own]
            colour = OTHER_COLOURS[index - 1] if index else _PLAIN_COLOUR
            axes.bar(
                *(places, list(own.values())),
                width=0.9 * _GAP / len(names),
                color=colour,
                label=name,
            )
        if "SSIM" in title:
            least = mean["inversion"]["ssim"]
            axes.axhline(least, color="#111827", ls=":", label="the mean image")
        middle = (_GAP - _GAP / len(names)) / 2
        axes.set_xticks([i + middle for i in range(len(cuts))], cuts)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(min(0, axes.get_ylim()[0]), 1)
        axes.set_title(title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=6, fontsize=9)
    return figure


def reconstructions(drawn: tuple[list[Row], Row]) -> Figure:
    """Show a few of the device's images, and what inversion makes of each boundary."""
    rows, mean = drawn
    cuts, names = (list(dict.fromkeys(r[k] for r in rows)) for k in ("cut", "defence"))
    figure = Figure(figsize=(WIDTH_INCHES, 0.55 * (len(names) + 1) + 0.4))
    panels = figure.subplots(len(names) + 1, len(cuts), squeeze=False)
    for place, cut in enumerate(cuts):
        shown: list[tuple[str, Any]] = [("original", mean["shown"])]
        own = {row["defence"]: row["shown"] for row in rows if row["cut"] == cut}
        shown += [(name, own.get(name)) for name in names]
        for axes, (name, images) in zip(panels[:, place], shown, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            axes.grid(visible=False)
            if images is not None:
                strip = np.concatenate([np.array(image) for image in images], axis=1)
                axes.imshow(strip, cmap="gray", vmin=0, vmax=255)
            if not place:
                axes.set_ylabel(name, rotation=0, ha="right", va="center")
        panels[0, place].set_title(f"cut behind {cut}")
    return figure
