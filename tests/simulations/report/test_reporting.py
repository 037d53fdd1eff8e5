"""Reports: the page needs nothing but itself, and says what the journals say."""

import base64
import json
import re

import pytest
from rich.console import Console
from simulations.report.reporting import (
    TABLE_COLUMNS,
    comparison_table,
    html_page,
    write_reports,
)
from simulations.report.sections import SECTIONS

from simulations.report import plots, time_plots
from simulations.report.summary import read_results
from tests.simulations.fleets.test_clock import PROFILE
from tests.simulations.journals import (
    FEDAVG_ROWS,
    SMARTSPLIT_ROWS,
    add_clock,
    write_results,
)


@pytest.fixture
def results(tmp_path):
    rows = {"fedavg": with_steps(FEDAVG_ROWS), "smartsplit": SMARTSPLIT_ROWS}
    return read_results(add_clock(write_results(tmp_path, **rows), PROFILE))


def with_steps(rows):
    """Let every client make so many steps that a round takes it 0.18 s and latency."""
    steps = {"route": "whole", "num_steps": 10**6}
    return [{**row, **steps} if row["kind"] == "client" else row for row in rows]


def pictures(page):
    """Decode the SVG pictures of a page."""
    encoded = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page)
    return [base64.b64decode(text).decode() for text in encoded]


def outside_references(page):
    """List what a browser would load from elsewhere, in the page or its pictures."""
    wanted = r'(?:src|href|action|data)\s*=\s*["\']?(?!data:|#)([^"\'\s>]+)'
    found = []
    for text in [page, *pictures(page)]:
        found += re.findall(wanted, text)
        found += re.findall(r"url\((?!#|[\"']?data:)([^)]*)\)", text)
        found += re.findall(r"@import[^;]*", text)
    return found


def test_the_page_loads_nothing_from_anywhere(results):
    page = html_page(results)

    assert len(pictures(page)) == len(SECTIONS)
    assert outside_references(page) == []
    assert "http" not in page


@pytest.mark.parametrize(
    "planted",
    [
        '<img src="picture.png">',
        "<link href='https://example.org/style.css'>",
        "<script src=//example.org/script.js></script>",
        "<style>body { background: url(far.png) }</style>",
        "<style>@import 'far.css';</style>",
    ],
)
def test_a_reference_to_another_file_would_be_noticed(results, planted):
    assert outside_references(html_page(results) + planted) != []


def test_the_page_says_who_stayed_out_why_and_what_is_unfinished(results):
    page = html_page(results)

    assert "sat out: no route fits" in page
    assert "smartsplit (1 of 2 rounds)" in page
    assert "fedavg (" not in page
    assert "set by construction" in page


def test_the_page_shows_how_it_was_made_and_escapes_it(results):
    page = html_page(results)

    assert "python -m simulations run by-hand &lt;&amp;&gt;" in page
    assert "2026-01-02T03:04:05+00:00" in page


def test_pictures_are_the_same_each_time_they_are_drawn(results):
    for section in SECTIONS:
        plot = section(results).plot
        assert plots.svg_of(plot, results) == plots.svg_of(plot, results)


def test_titles_say_what_was_found(results):
    def titles(plot):
        return [axes.get_title(loc="left") for axes in plot(results).axes]

    with plots.mpl.rc_context(plots.STYLE):
        assert titles(plots.accuracy_over_rounds) == [
            "Accuracy: fedavg 75.0 %, smartsplit 60.0 %"
        ]
        assert titles(plots.peak_against_budget) == [
            "fedavg: 3 devices train, 2 of them above their budget, at worst 3.0 times",
            "smartsplit: 1 device trains, none of them above its budget",
        ]
        assert titles(plots.who_took_part) == [
            "fedavg: 3 of 3 clients",
            "smartsplit: 1 of 3 clients",
        ]
        assert titles(time_plots.accuracy_by_simulated_time) == [
            "Simulated time to 60.0 %: fedavg 0.50 s, smartsplit 0.00 s"
        ]


def test_labels_that_would_overlap_are_moved_apart():
    assert plots.spread([90.0, 91.0, 40.0], gap=5.0) == [86.0, 91.0, 40.0]


def test_the_table_fits_a_terminal_and_holds_the_figures(results):
    console = Console(width=TABLE_COLUMNS, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(comparison_table(results))
    text = capture.get()

    assert "…" not in text
    assert re.search(r"fedavg +75\.0 % +62\.5 % +3 of 3 +500 KiB +3\.00 ", text)
    assert re.search(r"smartsplit +60\.0 % +60\.0 % +1 of 3", text)


@pytest.mark.parametrize("rows", [{}, {"fedavg": []}, {"fedavg": FEDAVG_ROWS[:1]}])
def test_a_run_that_hardly_began_can_be_reported(tmp_path, rows):
    results = read_results(write_results(tmp_path, **rows))

    write_reports(results, tmp_path)

    assert "Unfinished" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["methods"].keys() == (
        rows.keys()
    )
