"""The page of a study: a chapter per case, pictures that can be drawn of anything."""

import pytest
from simulations.report.plots import svg_of

from simulations.report.studies.claims import CLAIMS
from simulations.report.studies.curves import gains_of_all_cases
from simulations.report.studies.page import html_page
from simulations.report.studies.reading import read_case, read_study
from simulations.studies.suites import STUDIES
from tests.simulations.folders import CASE, write_study

WITHOUT_CLOCK = {"time", "energy"}
"""Claims of which folders written by hand, which have no clock, know nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), CASE)


def test_the_page_has_a_chapter_per_case_and_says_how_it_was_made(folder):
    page = html_page(folder, read_study(folder))

    assert page.count('<h2 class="case">') == 1
    assert "by hand: own labels" in page
    assert "not there yet: not_written" in page
    assert "own_labels: learning_rate" in page
    assert page.count("<h3>") == (len(STUDIES["accuracy"].claims) - len(WITHOUT_CLOCK))


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_is_drawn_where_it_is_known_and_left_out_where_not(folder, name):
    case = read_case(folder, "own_labels")
    claim = CLAIMS[name]

    picture = svg_of(claim.picture, case)

    if name in WITHOUT_CLOCK:
        assert (picture, claim.rows(case.lines)) == ("", [])
    else:
        assert all(len(row) <= len(claim.columns) for row in claim.rows(case.lines))
    if name not in {*WITHOUT_CLOCK, "routes"}:  # Here nobody has a choice of routes.
        assert "<svg" in picture


def test_a_study_that_hardly_began_has_a_page(folder, tmp_path):
    """What an interrupt in the first round leaves."""
    begun = write_study(tmp_path)
    for path in begun.rglob("*.finished.json"):
        path.unlink()

    page = html_page(begun, read_study(begun))

    assert "unfinished, not counted" in page
    assert "<h3>" not in page


def test_the_overview_needs_a_method_to_compare_with(folder):
    cases = read_study(folder).cases()

    assert "<svg" in svg_of(gains_of_all_cases, cases)
    assert svg_of(gains_of_all_cases, []) == ""
