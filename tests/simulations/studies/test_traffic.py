"""The suite ``traffic``, from the run to the table and the picture."""

from dataclasses import replace

import pytest

from simulations.report.studies.cells import study_figures
from simulations.report.studies.claims import CLAIMS
from simulations.report.studies.reading import read_case, read_study
from simulations.report.style import svg_of
from simulations.report.summary import methods_object
from simulations.studies.folder import STUDY, begin_folder
from simulations.studies.running import run_unfinished, units_of
from simulations.studies.study import StudyOptions, chosen_cases
from simulations.studies.traffic import TRAFFIC
from tests.simulations.folders import PROVENANCE

NAMES = ("raw", "integer8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run two of its methods, with two clients, for a round."""
    folder = tmp_path_factory.mktemp("traffic")
    few = {"num_rounds": 1, "num_clients": 2, "max_train_examples": 64}
    options = StudyOptions(
        is_small=True, methods=NAMES, num_seeds=1, changes={**few, "in_process": True}
    )
    cases = chosen_cases(TRAFFIC, options)
    begin_folder(
        folder, STUDY, "traffic", cases=cases, is_small=True, provenance=PROVENANCE
    )
    for unit in units_of(folder, cases):
        run_unfinished(unit, PROVENANCE, lambda method, row: None)
    return folder


@pytest.fixture(scope="module")
def case(folder):
    return read_case(folder, "digits")


def test_the_object_has_all_figures_of_each_method(folder):
    methods = methods_object(study_figures(read_study(folder)))["methods"]

    assert tuple(methods) == NAMES
    assert all(None not in figures.values() for figures in methods.values())
    assert methods["integer8"]["bytes_up"] < methods["raw"]["bytes_up"] / 2


def test_the_table_has_bytes_each_way_and_how_many_times_less(case):
    """2 steps of 16 examples: 2,560 values of each, of 4 bytes, or 1 and 8 a row."""
    claim = CLAIMS["crossing"]
    raw, integer = (
        dict(zip(claim.columns, row, strict=True)) for row in claim.rows(case.lines)
    )

    assert (raw["method"], integer["method"]) == NAMES
    assert raw["times less than raw"] == "1.00"
    assert float(integer["times less than raw"]) == pytest.approx(3.98, abs=0.03)
    assert raw["points against raw"] == "–"
    assert float(raw["up"].removesuffix(" KiB")) == pytest.approx(320, abs=2)
    assert float(integer["down"].removesuffix(" KiB")) == pytest.approx(80.25, abs=2)
    assert raw["a round takes"].endswith(" s") and raw["largest peak"].endswith("B")


def test_less_that_crosses_takes_less_time(case):
    seconds = [
        case.lines.values(name, "simulated_seconds_per_round")[0] for name in NAMES
    ]
    assert seconds[1] < seconds[0]


def test_the_picture_names_each_method_and_is_left_out_of_nothing(case):
    picture = CLAIMS["crossing"].picture

    drawn = svg_of(picture, case)
    assert all(f"<!-- {name} -->" in drawn for name in NAMES)
    empty = replace(case, lines=replace(case.lines, lines=()))
    assert svg_of(picture, empty) == ""
