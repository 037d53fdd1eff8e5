"""The page of a study: a chapter per case, pictures that can be drawn of anything."""

import base64
import json
import re

import pytest
from rich.console import Console

from simulations.experiments.marks import Mark, write_mark
from simulations.report.studies.claims import CLAIMS
from simulations.report.studies.curves import gains_of_all_cases
from simulations.report.studies.page import case_table, study_page
from simulations.report.studies.reading import read_case, read_study
from simulations.report.style import spread, svg_of
from simulations.studies.command import print_study
from simulations.studies.suites import SINGLE_CLAIMS, STUDIES
from tests.simulations.fleets.test_clock import PROFILE
from tests.simulations.folders import CASE, write_study
from tests.simulations.journals import (
    FEDAVG_ROWS,
    SMARTSPLIT_ROWS,
    add_clock,
    write_results,
)

WITHOUT_CLOCK = {"time", "energy"}
"""Claims of which folders written by hand, which have no clock, know nothing."""


def html_page(folder, study):
    return study_page(folder, study, STUDIES["accuracy"].claims)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), CASE)


def test_the_page_has_a_chapter_per_case_and_says_how_it_was_made(folder):
    page = html_page(folder, read_study(folder))

    assert page.count('<h2 class="case">') == 1
    assert "by hand: own labels" in page
    assert "not there yet: not_written" in page
    assert "own_labels: learning_rate" in page
    shown = [name for name in CLAIMS if f"<h2>{CLAIMS[name].title}</h2>" in page]
    assert shown == [
        name for name in STUDIES["accuracy"].claims if name not in WITHOUT_CLOCK
    ]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_is_drawn_where_it_is_known_and_left_out_where_not(folder, name):
    case = read_case(folder, "own_labels")
    claim = CLAIMS[name]

    picture = svg_of(claim.picture, case)

    if name in WITHOUT_CLOCK:
        assert (picture, claim.rows(case.lines)) == ("", [])
    else:
        assert all(len(row) <= len(claim.columns) for row in claim.rows(case.lines))
    if name in {"accuracy", "gains", "participation", "memory", "traffic"}:
        assert "<svg" in picture


def test_a_study_that_hardly_began_has_a_page(folder, tmp_path):
    """What an interrupt in the first round leaves."""
    begun = write_study(tmp_path)
    for path in begun.rglob("*.finished.json"):
        path.unlink()

    page = html_page(begun, read_study(begun))

    assert "unfinished, not counted" in page
    assert CLAIMS["accuracy"].title not in page


def test_the_overview_needs_several_differences(folder):
    cases = list(read_study(folder).cases())

    assert "<svg" in svg_of(gains_of_all_cases, cases * 2)
    assert svg_of(gains_of_all_cases, cases) == ""
    assert svg_of(gains_of_all_cases, []) == ""


# --- a single experiment, as a study of one case --------------------------------------


@pytest.fixture
def single(tmp_path):
    """Two methods that have finished, and one that was cut short."""
    rows = {"fedavg": with_steps(FEDAVG_ROWS), "smartsplit": SMARTSPLIT_ROWS}
    folder = add_clock(write_results(tmp_path, **rows), PROFILE)
    mark = Mark(method="fedavg", state_sha256="a", accuracy=0.75, num_rounds=2)
    write_mark(folder, mark)
    return folder


def with_steps(rows):
    """Let every client make so many steps that a round takes it 0.18 s and latency."""
    steps = {"route": "whole", "num_steps": 10**6}
    return [{**row, **steps} if row["kind"] == "client" else row for row in rows]


def single_page(folder):
    return study_page(folder, read_study(folder), SINGLE_CLAIMS)


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


def test_the_page_loads_nothing_from_anywhere(single):
    page = single_page(single)

    assert len(pictures(page)) == 5
    assert outside_references(page) == []
    assert "http" not in page


@pytest.mark.every(3)
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
def test_a_reference_to_another_file_would_be_noticed(single, planted):
    assert outside_references(single_page(single) + planted) != []


def test_the_page_says_who_stayed_out_why_and_what_is_unfinished(single):
    page = single_page(single)

    assert "sat out: no route fits" in page
    assert "smartsplit: 1 of 2 rounds" in page
    assert "fedavg: 2 of 2 rounds" not in page
    assert "set by construction" in page.replace("\n", " ")


def test_the_page_shows_how_it_was_made_and_escapes_it(single):
    page = single_page(single)

    assert "python -m simulations run by-hand &lt;&amp;&gt;" in page
    assert "2026-01-02T03:04:05+00:00" in page


def test_pictures_are_the_same_each_time_they_are_drawn(single):
    case = read_case(single, "by hand")
    for name in SINGLE_CLAIMS:
        picture = CLAIMS[name].picture
        assert svg_of(picture, case) == svg_of(picture, case)


def test_labels_that_would_overlap_are_moved_apart():
    assert spread([90.0, 91.0, 40.0], gap=5.0) == [86.0, 91.0, 40.0]


def test_the_table_of_a_single_experiment_fits_a_terminal_and_holds_the_figures(single):
    study = read_study(single)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(case_table(study.cases()[0], study.config))

    assert "…" not in capture.get()
    assert re.search(r"fedavg +75\.0 +62\.5 +3 of 3 +500 KiB +3\.00 ", capture.get())


@pytest.mark.parametrize("rows", [{}, {"fedavg": []}, {"fedavg": FEDAVG_ROWS[:1]}])
def test_a_run_that_hardly_began_can_be_reported(tmp_path, rows):
    folder = write_results(tmp_path, **rows)

    assert "by hand" in single_page(folder)
    assert json.loads((folder / "config.json").read_text())


def test_a_narrow_terminal_keeps_the_methods_names(single, capsys, monkeypatch):
    """They were lost in 80 columns, where the numbers alone need more."""
    monkeypatch.setenv("COLUMNS", "80")
    study = read_study(single)
    print_study(study, as_json=False)
    shown = capsys.readouterr().out
    assert all(f"\n{method} " in shown for method in study.cases()[0].finished)
