"""Plot the options: device memory against extra work, a line per route."""

import math
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from flwr_smartsplit.cli.plan_report import FrontReport
from flwr_smartsplit.cli.profile_plot import label_bytes, short_name
from flwr_smartsplit.errors import bytes_text
from flwr_smartsplit.types import Route, RouteOption

WIDTH_INCHES, HEIGHT_INCHES = 10.0, 5.2
MAX_ROUTES = 14
COLOURS = "viridis"
MARGIN, FAR = 1.25, 8


def plan_figure(report: FrontReport) -> Figure:
    """Draw extra work over device memory: a stair per route, and the budget."""
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES))
    axes = figure.subplots()
    by_route: dict[Route, list[RouteOption]] = {}
    for option in report.options:
        by_route.setdefault(option.route, []).append(option)
    size = len(report.subject.profile.units)
    routes = sorted(by_route, key=lambda route: route.cuts or (size,))
    named = set(routes[:: math.ceil(len(routes) / MAX_ROUTES)])
    palette = mpl.colormaps[COLOURS]
    for index, route in enumerate(routes):
        colour = palette(0.92 * index / max(1, len(routes) - 1))
        label = _label(report, route) if route in named else None
        _draw_route(axes, by_route[route], colour=colour, label=label)
    _draw_budget(axes, report)
    _scale(axes, report)
    figure.suptitle(report.subject.heading(), x=0.01, ha="left", weight="bold")
    axes.set_title("Memory against work, a line per cut; filled: nothing recomputed")
    axes.set_xlabel("peak of the device")
    axes.set_ylabel("extra FLOPs, of the whole model's forward")
    figure.legend(
        loc="outside right upper", title="last unit on the device, cut · boundary"
    )
    return figure


def extra_share(option: RouteOption) -> float:
    """Give extra FLOPs as a fraction of the whole model's forward."""
    return option.work.extra_fraction * option.work.device_fraction


def _draw_route(
    axes: Axes,
    options: list[RouteOption],
    *,
    colour: tuple[float, float, float, float],
    label: str | None,
) -> None:
    """Draw a route's options; what needs less memory serves until the next one."""
    style: dict[str, Any] = {"color": colour, "marker": "o", "ms": 5.5}
    axes.plot(
        *_points(options),
        lw=1.8,
        markerfacecolor="white",
        drawstyle="steps-post",
        label=label,
        clip_on=False,
        **style,
    )
    plain = [option for option in options if option.recompute.is_empty]
    axes.plot(*_points(plain), ls="none", clip_on=False, zorder=4, **style)


def _points(options: list[RouteOption]) -> tuple[list[int], list[float]]:
    return [each.peak_bytes for each in options], list(map(extra_share, options))


def _draw_budget(axes: Axes, report: FrontReport) -> None:
    """Draw the budget, and a ring around what to take."""
    if report.budget_bytes is None:
        return
    text = f"budget, {bytes_text(report.budget_bytes)}"
    axes.axvline(report.budget_bytes, color="k", lw=1.4, ls="--", label=text)
    best = report.recommended
    if best is not None:
        axes.plot(
            *_points([best]),
            color="k",
            ls="none",
            marker="o",
            ms=12,
            mew=1.6,
            fillstyle="none",
            label="recommended",
            clip_on=False,
            zorder=5,
        )


def _scale(axes: Axes, report: FrontReport) -> None:
    """Scale memory by logarithm, in readable sizes; extra work from 0."""
    sizes = [option.peak_bytes for option in report.options]
    low, high = min(sizes) / MARGIN, max(sizes) * MARGIN
    budget_bytes = report.budget_bytes
    # A budget far from all options would press them together.
    if budget_bytes is not None and low / FAR < budget_bytes < high * FAR:
        low, high = min(low, budget_bytes / MARGIN), max(high, budget_bytes * MARGIN)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    label_bytes(axes.xaxis, num_ticks=9)
    most = max(map(extra_share, report.options))
    axes.set_ylim(0, 1.08 * most or 0.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _label(report: FrontReport, route: Route) -> str:
    if not route.cuts:
        return "whole model"
    name = short_name(report.subject.last_unit(route))
    size = report.subject.profile.units[route.cuts[0] - 1].boundary_bytes
    return f"{name}, {route.cuts[0]} · {bytes_text(size)}"
