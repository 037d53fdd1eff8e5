"""Draw where a step's time goes: ``python -m simulations.benchmarks.flame``.

It reads stacks as py-spy samples them (``py-spy record --format raw``), begins at one
function, and draws a box for each call below it: as wide as its time, under its caller.
Wrappers of Python and torch are left out, and what takes too little to be seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simulations.report.style import WIDTH_INCHES, svg_of

ROOT = "RouteRunner.train_step"
LEAST_SHARE = 0.004
_ROW_INCHES, _CHARACTERS = 0.27, 150  # Of a row, and in the width of the picture
_WRAPPERS = (
    *("contextlib.py", "functools.py", "torch/nn/modules/module.py", "torch/_ops.py"),
    *("torch/_compile.py", "torch/_dynamo/eval_frame.py", "torch/utils/_contextlib.py"),
    *("torch/_jit_internal.py", "<lambda>", "<eval_with_key>", "<listcomp>"),
)
_COLOURS = {  # By what is in a frame's file; the first that fits
    "flwr_smartsplit/edge/": "#f4b183",
    "flwr_smartsplit/memory/": "#c9b3e6",
    "flwr_smartsplit/": "#9dc3e6",
    "torch/": "#d0d3d8",
}
_OTHER = "#e9e2c8"


@dataclass(slots=True)
class Call:
    """A function in its callers' calls, and how many samples were in it."""

    name: str
    file: str = ""
    samples: int = 0
    inner: dict[tuple[str, str], "Call"] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """The rows that it and its calls take."""
        return 1 + max((call.depth for call in self.inner.values()), default=0)


def read_calls(lines: Iterator[str], root: str) -> Call:
    """Add up the samples in which a function is called, from it on.

    Raises ``ValueError`` if there are none.
    """
    top = Call(root)
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = [_frame(text) for text in stack.split(";")]
        names = [name for name, _ in frames]
        if root not in names:
            continue
        call, samples = top, int(count)
        top.samples += samples
        for name, file in frames[names.index(root) + 1 :]:
            if not any(wrapper in f"{name} {file}" for wrapper in _WRAPPERS):
                call = call.inner.setdefault((name, file), Call(name, file))
                call.samples += samples
    if not top.samples:
        raise ValueError(f"no sampled stack has {root}: sample a run that calls it.")
    return _pruned(top, LEAST_SHARE * top.samples)


def _frame(text: str) -> tuple[str, str]:
    """Divide ``name (file:line)``."""
    name, _, place = text.partition(" (")
    return name, place.rpartition(":")[0]


def _pruned(call: Call, least: float) -> Call:
    call.inner = {
        key: _pruned(inner, least)
        for key, inner in sorted(call.inner.items(), key=lambda x: -x[1].samples)
        if inner.samples >= least
    }
    return call


def draw_calls(top: Call) -> Figure:
    """Draw the calls, the root above."""
    rows = top.depth
    figure = Figure(figsize=(WIDTH_INCHES, 0.4 + _ROW_INCHES * rows))
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(rows, 0))
    axes.axis("off")
    axes.set_title(
        f"{top.name}, by function: a box is as wide as its share of the time"
    )
    _draw(axes, top, (0.0, 0), top.samples)
    return figure


def _draw(axes: Any, call: Call, corner: tuple[float, int], total: int) -> None:
    (left, row), width = corner, call.samples / total
    colour = next((c for part, c in _COLOURS.items() if part in call.file), _OTHER)
    box = Rectangle((left, row), width, 1, facecolor=colour, edgecolor="white")
    axes.add_patch(box)
    label = f"{call.name.rpartition('.<locals>.')[2]} {100 * width:.0f} %"
    room = int(width * _CHARACTERS)
    if room >= len(label) or room > 3:  # noqa: PLR2004 - shorter says nothing
        text = label if room >= len(label) else label[: room - 1] + "\u2026"
        middle = (left + width / 2, row + 0.5)
        axes.annotate(text, middle, ha="center", va="center", fontsize=7, color="black")
    for inner in call.inner.values():
        _draw(axes, inner, (left, row + 1), total)
        left += inner.samples / total


def main(
    stacks: Annotated[Path, typer.Argument(help="What py-spy wrote as raw.")],
    picture: Annotated[Path, typer.Argument(help="The SVG file to write.")],
    root: Annotated[str, typer.Option(help="Where to begin.")] = ROOT,
) -> None:
    """Draw the sampled stacks below one function."""
    with stacks.open(encoding="utf-8") as lines:
        top = read_calls(iter(lines), root)
    picture.write_text(svg_of(draw_calls, top), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
