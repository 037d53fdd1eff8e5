"""Tables and JSON of a study, against numbers worked out by hand."""

import json

import pytest
from rich.console import Console

from simulations.experiments.marks import mark_path
from simulations.report.studies.cells import headline, notes, study_summary
from simulations.report.studies.claims import CLAIMS
from simulations.report.studies.lines import CaseLines
from simulations.report.studies.page import case_table
from simulations.report.studies.reading import read_study
from tests.simulations.folders import CASE, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return read_study(write_study(tmp_path_factory.mktemp("study")))


@pytest.fixture(scope="module")
def case(study) -> CaseLines:
    return study.cases()[0]


def test_accuracies_are_means_over_seeds_with_their_interval(case):
    """Finals of fedavg: 90, 92, 94; deviation 2, t of two degrees 4.303."""
    half_width = 4.303 * 2 / 3**0.5

    assert CLAIMS["accuracy"].rows(case)[0] == (
        "fedavg",
        f"92.0 ± {half_width:.1f} %",
        f"71.0 ± {half_width / 2:.1f} %",
        "2 (3 of 3)",
        "3",
    )


def test_a_target_that_is_never_reached_is_said_so(case):
    assert CLAIMS["accuracy"].rows(case)[1][3] == "never"


def test_gains_are_taken_seed_by_seed(case):
    """Every seed adds the same to all methods, so that pairs do not spread."""
    rows = {row[0]: row[1:] for row in CLAIMS["gains"].rows(case)}

    assert rows["drop_weak"][:2] == ("+37.5 ± 0.0", "+18.8 ± 0.0")
    assert rows["smartsplit"][:2] == ("–", "–")
    assert rows["smartsplit"][2] == "+37.5 ± 0.0"
    assert rows["smartsplit"][4] == "-1.2 ± 0.0"


def test_the_other_claims_have_the_numbers_of_the_journals(case):
    assert CLAIMS["classes"].rows(case)[0][:4] == ("fedavg", "92.0", "46.0", "–")
    assert CLAIMS["participation"].rows(case)[0] == ("fedavg", "3 of 3", "3 to 3")
    assert CLAIMS["routes"].rows(case)[2] == ("smartsplit", "device[:1] 100%")
    assert CLAIMS["memory"].rows(case)[0] == (
        *("fedavg", "0.977 KiB", "10.00", "1", "400 KiB"),
    )
    assert CLAIMS["traffic"].rows(case)[0] == ("fedavg", "6 MiB", "0 B", "8 MiB")


def test_the_json_has_the_first_case_on_top_and_every_seed(study):
    summary = json.loads(json.dumps(study_summary(study), allow_nan=False))

    ours = summary["methods"]["smartsplit"]
    assert ours["accuracy"] == pytest.approx(0.895)
    assert ours["accuracy_by_seed"] == pytest.approx([0.875, 0.895, 0.915])
    assert ours["this_minus_drop_weak_accuracy"]["mean"] == pytest.approx(0.375)
    assert ours["smartsplit_minus_this_accuracy"] is None
    assert summary["cases"]["own_labels"]["methods"] == summary["methods"]
    assert summary["cases"]["own_labels"]["missing_methods"] == ["not_written"]
    second = summary["cases"]["second"]["methods"]["fedavg"]
    assert second["this_minus_drop_weak_accuracy"]["half_width_95"] is None


def test_a_reader_is_told_what_is_missing_unfinished_or_a_single_draw(tmp_path):
    folder = write_study(tmp_path)
    mark_path(folder / "own_labels" / "seed-1", "fedavg").unlink()
    (folder / "second" / "seed-0" / "config.json").unlink()

    own, second = read_study(folder).cases()

    assert notes(own) == [
        "own_labels: not there yet: not_written",
        "unfinished, not counted: own_labels, seed 1, fedavg: 2 of 2 rounds",
    ]
    assert "second: 3 runs have not begun" in notes(second)
    assert any("one seed is one draw" in note for note in notes(second))
    assert headline(read_study(folder)) == (
        "accuracy (small): 2 cases, 8 of 12 runs finished"
    )


def test_the_table_fits_a_terminal(case, study):
    console = Console(width=80)
    with console.capture() as capture:
        console.print(case_table(case, study.config))

    assert "…" not in capture.get()
    assert CASE.title in capture.get()


def test_a_case_of_which_nothing_has_finished_makes_empty_tables(tmp_path):
    folder = write_study(tmp_path)
    for path in folder.rglob("*.finished.json"):
        path.unlink()

    study = read_study(folder)

    assert study_summary(study)["methods"] == {}
    assert len(notes(study.cases()[0])) == 1 + 9
