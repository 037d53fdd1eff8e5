"""Pages: every suite's HTML report, each a file that needs no other and no network."""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from simulations.report.style import svg_of

REPORT, SUMMARY = "report.html", "summary.json"
"""What a report writes into a results folder."""

Drawn = TypeVar("Drawn")
Rows = Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page; what it does not have is left out."""

    title: str = ""
    text: str = ""
    picture: str = ""  # An address that holds a picture
    columns: Sequence[str] = ()
    rows: Rows = ()
    has_words: bool = False  # Whether the table's cells are words, and not numbers
    notes: Sequence[str] = ()  # What a reader must not overlook
    is_chapter: bool = False  # Whether the sections that follow belong to it


def html_page(
    title: str,
    headline: str,
    sections: Iterable[Section],
    *,
    limits: str,
    settings: Rows,
) -> str:
    """Make a page.

    ``limits`` names the file of ``limits/`` that says what the numbers do not show;
    ``settings`` says how they were made.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        headline=headline,
        sections=list(sections),
        limits=limits,
        settings=settings,
    )


def picture_of(draw: Callable[[Drawn], Figure | None], drawn: Drawn) -> str:
    """Draw a picture and return an address that holds it; empty if there is none."""
    svg = svg_of(draw, drawn)
    encoded = base64.b64encode(svg.encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}" if svg else ""


def settings_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Flatten where a result comes from into names and values."""
    versions: Mapping[str, str] = config.get("versions", {})
    return [
        *((name, str(config[name])) for name in ("command", "date") if name in config),
        *((f"version of {name}", text) for name, text in versions.items()),
        *config.get("hardware", {}).items(),
    ]


TERMINAL_COLUMNS = 110
"""What a table needs at least; a narrower terminal would lose its columns."""


def terminal() -> Console:
    """Open the terminal, wide enough for a table."""
    console = Console()
    console.width = max(console.width, TERMINAL_COLUMNS)
    return console


def terminal_table(
    columns: Sequence[str], rows: Rows, *, title: str | None = None, caption: str = ""
) -> Table:
    """Lay a table out for a terminal, the first column to the left."""
    table = Table(
        title=title,
        caption=caption,
        caption_justify="left",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for index, name in enumerate(columns):
        table.add_column(
            name,
            justify="right" if index else "left",
            no_wrap=bool(index),
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    return table
