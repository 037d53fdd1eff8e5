"""The style of all pictures: colours, sizes, and figures as the text of an SVG file."""

import io
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = {
    "fedavg": "#6b7280",
    "drop_weak": "#d1700c",
    "smartsplit": "#0b67b2",
    "splitfed": "#2f9e8f",
    "oort": "#b03060",
    "random": "#a3862a",
    "heterofl": "#7a3e9d",
    "depthfl": "#2f7d4f",
    "fedprox": "#a0a7b3",
    "fedadam": "#c9a27e",
}
OTHER_COLOURS = (
    *("#7a3e9d", "#2f7d4f", "#b03060", "#2f9e8f", "#a3862a", "#8c564b"),
    *("#3b5bdb", "#e0559f", "#7cb518", "#343a40", "#c2410c", "#38bdf8"),
)
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 10.0,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "font.size": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "simulations",
}
WIDTH_INCHES = 9.0
MAX_NAMES = 30
ACCEPTED_COLOUR, FAILED_COLOUR = "#3a86c8", "#c0392b"
Drawn = TypeVar("Drawn")


def svg_of(plot: Callable[[Drawn], Figure | None], drawn: Drawn) -> str:
    """Draw a plot and return it as the text of an SVG file; empty if it is None."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = plot(drawn)
        if figure is not None:
            figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def colour_of(method: str, index: int) -> str:
    """Give a method the colour it has in every plot."""
    return COLOURS.get(method, OTHER_COLOURS[index % len(OTHER_COLOURS)])


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Move labels apart that would lie on each other, the highest first."""
    order = sorted(range(len(heights)), key=lambda index: -heights[index])
    placed = list(heights)
    for above, below in pairwise(order):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed


def shown_clients(keys: list[str]) -> range:
    """Choose the clients whose names fit on an axis."""
    return range(0, len(keys), math.ceil(len(keys) / MAX_NAMES))
