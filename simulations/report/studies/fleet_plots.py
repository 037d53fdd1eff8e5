"""Pictures of the fleet: who trained what, within which memory, at which cost."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from simulations.experiments.rows import ACCEPTED, MethodRun
from simulations.report.studies.cells import depth_of, participants_text
from simulations.report.studies.reading import CaseResults, route_name
from simulations.report.style import (
    ACCEPTED_COLOUR,
    FAILED_COLOUR,
    WIDTH_INCHES,
    shown_clients,
)
from simulations.report.summary import peaks_by_client

COLUMNS = 5
MOST_ROWS = 45
"""Clients beyond which a map grows no taller."""

LINK_COLOURS = ("#1f4e79", "#5b8fc4", "#b5651d", "#e3a869", "#c9ced6")
LINKS = (
    *("server → device", "device → server", "device → edge", "edge → device"),
    "server ↔ edge",
)
WHOLE_COLOUR = "#6b7280"


def who_took_part(case: CaseResults) -> Figure | None:
    """Draw clients by rounds, the darker the more seeds accepted the update."""
    methods = [method for method in case.lines.finished if case.runs(method)]
    if not methods:
        return None
    keys = case.seeds[0].results.client_keys
    figure, panels = _small_multiples(
        len(methods), height=1.0 + 0.045 * min(len(keys), MOST_ROWS)
    )
    for axes, method in zip(panels, methods, strict=False):
        axes.imshow(
            _participation(case, method, keys),
            aspect="auto",
            interpolation="nearest",
            cmap="Blues",
            vmin=0,
            vmax=1.15,
            extent=(0.5, case.lines.num_rounds + 0.5, len(keys) - 0.5, -0.5),
        )
        axes.set_title(
            f"{method}\n{participants_text(case.lines, method)}", fontsize=9.5
        )
        shown = shown_clients(keys)[::2]
        axes.set_yticks(shown, [keys[y] for y in shown], fontsize=7.5)
        _round_axis(axes)
    figure.supxlabel("round", fontsize=10)
    figure.supylabel("client, weakest budget first", fontsize=10)
    return figure


def _participation(
    case: CaseResults, method: str, keys: Sequence[str]
) -> NDArray[np.float64]:
    """Return the share of seeds that accepted each client's update in each round."""
    place = {key: index for index, key in enumerate(keys)}
    grid = np.zeros((len(keys), case.lines.num_rounds))
    runs = case.runs(method)
    for _, run in runs:
        for row in run.training():
            if row.status == ACCEPTED and row.client_key in place:
                grid[place[row.client_key], row.round - 1] += 1 / len(runs)
    return grid


def routes_over_rounds(case: CaseResults) -> Figure | None:
    """Draw what share of the fleet trained which part of the model, round by round."""
    counts = {
        method: [_routes_of(run) for _, run in case.runs(method)]
        for method in case.lines.finished
    }
    used = {
        method: {name for rounds in found for each in rounds.values() for name in each}
        for method, found in counts.items()
    }
    methods = [method for method, names in used.items() if len(names) > 1]
    if not methods:
        return None
    names = sorted({name for method in methods for name in used[method]}, key=depth_of)
    colours = dict(zip(names, _route_colours(names), strict=True))
    figure, panels = _small_multiples(len(methods), height=2.4)
    num_clients = len(case.seeds[0].results.client_keys)
    for axes, method in zip(panels, methods, strict=False):
        _draw_routes(axes, counts[method], colours, num_clients)
        axes.set_xlim(0.5, case.lines.num_rounds + 0.5)
        axes.set_title(method, fontsize=9.5)
        axes.set_xlabel("round", fontsize=9)
        _round_axis(axes)
    panels[0].set_ylabel("share of the fleet (%)", fontsize=9)
    _legend(figure, colours, ncols=4)
    return figure


def _routes_of(run: MethodRun) -> dict[int, Counter[str]]:
    """Count the routes of accepted updates, by round."""
    found: dict[int, Counter[str]] = {}
    for row in run.training():
        if row.status == ACCEPTED:
            found.setdefault(row.round, Counter())[route_name(row.route)] += 1
    return found


def _route_colours(names: Sequence[str]) -> list[str]:
    """Give each kind of part a ramp of blues; the whole model is grey."""
    light, dark = np.array([0.80, 0.89, 0.97]), np.array([0.03, 0.27, 0.52])
    colours = {"whole": WHOLE_COLOUR}
    for _, group in groupby(names, key=lambda name: depth_of(name)[:2]):
        kind = list(group)
        for name, t in zip(kind, np.linspace(0.0, 1.0, len(kind)), strict=True):
            mixed = (light + (dark - light) * t).tolist()
            colours.setdefault(
                name, "#" + "".join(f"{round(255 * c):02x}" for c in mixed)
            )
    return [colours[name] for name in names]


def _draw_routes(
    axes: Axes,
    seeds: Sequence[dict[int, Counter[str]]],
    colours: dict[str, str],
    num_clients: int,
) -> None:
    """Stack the shares of one method's routes as bars without gaps."""
    numbers = sorted({number for rounds in seeds for number in rounds})
    left = np.zeros(len(numbers))
    for name, colour in colours.items():
        counts = (
            sum(rounds.get(number, Counter())[name] for rounds in seeds)
            for number in numbers
        )
        shares = np.fromiter(counts, np.float64)
        heights = 100 * shares / len(seeds) / num_clients
        axes.bar(numbers, heights, bottom=left, color=colour, width=1.0, lw=0)
        left += heights
    axes.set_ylim(bottom=0)


def peaks_over_budgets(case: CaseResults) -> Figure | None:
    """Draw a dot for each client: its worst peak over its budget."""
    shares = {method: _worst_shares(case, method) for method in case.lines.finished}
    shares = {method: found for method, found in shares.items() if found}
    if not shares:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 1.3 + 0.32 * len(shares)))
    axes = figure.subplots()
    for y, found in enumerate(shares.values()):
        heights = y + 0.5 * (np.arange(len(found)) / max(len(found) - 1, 1) - 0.5)
        colours = [FAILED_COLOUR if s > 1 else ACCEPTED_COLOUR for s in found]
        axes.scatter(found, heights, c=colours, s=12, lw=0)
        above = sum(share > 1 for share in found)
        text = f"{above} of {len(found)} above" if above else "all within"
        axes.annotate(
            text,
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            color=FAILED_COLOUR if above else ACCEPTED_COLOUR,
        )
    axes.axvline(1, color="k", lw=1.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("measured peak / budget of the device")
    axes.set_title("Peaks over budgets, a dot for each client that trained")
    return figure


def _worst_shares(case: CaseResults, method: str) -> list[float]:
    """Return each client's largest peak over its budget, in the order of the fleet."""
    worst: dict[str, float] = {}
    for seed, run in case.runs(method):
        budgets = seed.results.budgets_bytes
        for key, peak in peaks_by_client(run.training()).items():
            if key in budgets:
                worst[key] = max(peak / budgets[key], worst.get(key, 0.0))
    keys = case.seeds[0].results.client_keys
    return [worst[key] for key in keys if key in worst]


def bytes_per_round(case: CaseResults) -> Figure | None:
    """Draw what crossed each kind of link in an average round."""
    parts = {
        method: np.mean([_link_bytes(run) for _, run in case.runs(method)], axis=0)
        for method in case.lines.finished
    }
    if not parts:
        return None
    figure, axes = _bars(len(parts))
    _stack(axes, {m: values / 2**20 for m, values in parts.items()}, LINK_COLOURS)
    axes.set_xlabel("MiB per round, all clients together")
    axes.set_title("Traffic of an average round, by link")
    _legend(figure, dict(zip(LINKS, LINK_COLOURS, strict=True)), ncols=5)
    return figure


def _link_bytes(run: MethodRun) -> list[float]:
    """Return the bytes of each link in an average round."""
    rows, num_rounds = run.clients, max(len(run.rounds), 1)
    parts = [
        sum(row.bytes_down for row in rows),
        sum(row.bytes_up for row in rows),
        sum(row.edge_bytes_up for row in rows),
        sum(row.edge_bytes_down for row in rows),
    ]
    total = sum(row.comm_bytes_total for row in run.rounds)
    parts.append(max(total - sum(parts), 0))
    return [part / num_rounds for part in parts]


def _legend(figure: Figure, colours: dict[str, str], *, ncols: int) -> None:
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=ncols, fontsize=9)


def _bars(num: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, 1.6 + 0.34 * num))
    axes = figure.subplots()
    axes.grid(visible=False, axis="y")
    return figure, axes


def _stack(
    axes: Axes, parts: dict[str, NDArray[np.float64]], colours: Sequence[str]
) -> None:
    """Draw a bar of parts for each method, with its sum at the end."""
    for y, values in enumerate(parts.values()):
        left = 0.0
        for value, colour in zip(values, colours, strict=True):
            axes.barh(y, value, left=left, color=colour, height=0.65)
            left += float(value)
        axes.annotate(
            f" {sum_text(left)}", (left, y), va="center", fontsize=9, color="#374151"
        )
    axes.set_yticks(range(len(parts)), list(parts))
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.margins(x=0.08)


def sum_text(number: float) -> str:
    """Print a number with three digits that count, and no power of ten."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"  # noqa: PLR2004


def _small_multiples(num: int, *, height: float) -> tuple[Figure, Sequence[Axes]]:
    """Make panels with shared axes, five in a row."""
    columns = min(COLUMNS, num)
    rows = math.ceil(num / columns)
    figure = Figure(figsize=(WIDTH_INCHES, 0.7 + rows * height))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.ravel())
    for axes in panels[num:]:
        axes.set_visible(False)
    return figure, panels[:num]


def _round_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.tick_params(labelsize=8)
    axes.grid(visible=False)
