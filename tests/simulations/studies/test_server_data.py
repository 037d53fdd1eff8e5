"""The suite ``server_data``, from the run to the table."""

import pytest

from simulations.report.studies.cells import FINAL, study_figures
from simulations.report.studies.claims import CLAIMS
from simulations.report.studies.reading import read_case, read_study
from simulations.report.summary import methods_object
from simulations.studies.folder import STUDY, begin_folder
from simulations.studies.running import run_unfinished, units_of
from simulations.studies.server_data import SERVER_DATA
from simulations.studies.study import StudyOptions, chosen_cases
from tests.simulations.folders import PROVENANCE

NAMES = ("fedavg", "feddu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run two of its methods, with ten clients, for two rounds."""
    folder = tmp_path_factory.mktemp("server_data")
    few = {"num_rounds": 2, "num_clients": 10, "max_train_examples": 300}
    options = StudyOptions(
        is_small=True,
        cases=("digits",),
        methods=NAMES,
        num_seeds=1,
        changes={**few, "in_process": True},
    )
    cases = chosen_cases(SERVER_DATA, options)
    begin_folder(
        folder, STUDY, "server_data", cases=cases, is_small=True, provenance=PROVENANCE
    )
    for unit in units_of(folder, cases):
        run_unfinished(unit, PROVENANCE, lambda method, row: None)
    return folder


def test_the_object_has_all_figures_of_each_method(folder):
    methods = methods_object(study_figures(read_study(folder)))["methods"]

    assert tuple(methods) == NAMES
    assert all(None not in figures.values() for figures in methods.values())


def test_the_table_compares_with_fedavg(folder):
    claim, case = CLAIMS["server"], read_case(folder, "digits").lines
    fedavg, feddu = (
        dict(zip(claim.columns, row, strict=True)) for row in claim.rows(case)
    )

    assert (fedavg["method"], feddu["method"]) == NAMES
    assert fedavg["points against fedavg"] == "–"
    gained = case.values("feddu", FINAL)[0]
    gained -= case.values("fedavg", FINAL)[0]
    assert f"{abs(100 * gained):.1f}" in feddu["final, points"]
    assert fedavg["rounds to target (seeds that reach it)"] == "never"


def test_each_method_of_it_exists():
    for case in SERVER_DATA.cases_fn(False):
        assert case.missing == ()
        assert case.methods[0] == "fedavg"
