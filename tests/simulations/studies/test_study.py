"""Studies: their cases, and what the options make of them."""

import pytest

from simulations.experiments.errors import ExperimentError
from simulations.report.studies.claims import CLAIMS
from simulations.studies.accuracy import ACCURACY, METHODS
from simulations.studies.study import StudyOptions, chosen_cases
from simulations.studies.suites import STUDIES

BOTH = [(study, is_small) for study in STUDIES.values() for is_small in (True, False)]


@pytest.mark.parametrize(("study", "is_small"), BOTH)
def test_every_study_has_cases_of_its_own_name_and_known_claims(study, is_small):
    cases = study.cases_fn(is_small)

    assert len({case.name for case in cases}) == len(cases) > 0
    assert set(study.claims) <= CLAIMS.keys()
    for case in cases:
        assert case.experiment.name == study.name
        assert set(case.methods) | set(case.missing) == set(case.experiment.methods)
        assert 0 < case.target_accuracy < 1


@pytest.mark.parametrize("study", STUDIES.values())
def test_a_small_study_needs_no_download(study):
    data = {case.experiment.data for case in study.cases_fn(True)}
    assert data <= {"digits", "digits_mixed"}


def test_the_first_case_is_the_one_with_labels_of_its_own_and_five_seeds():
    for is_small in (True, False):
        first = ACCURACY.cases_fn(is_small)[0]
        assert (first.name, first.num_seeds) == ("own_labels", 5)
        assert first.experiment.methods == METHODS
        assert first.experiment.num_clients == 20


def test_a_full_study_has_all_three_data_sets():
    cases = ACCURACY.cases_fn(False)

    assert {case.experiment.data for case in cases} == {
        "digits",
        "fashion_mnist",
        "cifar10",
    }
    assert all(case.num_seeds == 5 for case in cases)


def test_options_choose_cases_and_change_every_experiment():
    options = StudyOptions(
        is_small=True,
        cases=("dirichlet_05", "own_labels"),
        methods=("fedavg",),
        num_seeds=2,
        changes={"num_rounds": 3, "num_workers": 1},
    )

    cases = chosen_cases(ACCURACY, options)

    assert [case.name for case in cases] == ["own_labels", "dirichlet_05"]
    for case in cases:
        assert case.num_seeds == 2
        assert case.methods == ("fedavg",)
        assert (case.experiment.num_rounds, case.experiment.num_workers) == (3, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cases": ("nope",)}, "--cases names 'nope', but 'accuracy' has only own_la"),
        ({"cases": ()}, "--cases names nothing"),
        ({"num_seeds": 0}, "--seeds is 0, but must be at least 1"),
        ({"changes": {"num_rounds": 0}}, "num_rounds is 0, but must be at least 1"),
    ],
)
def test_options_that_no_study_could_heed_are_explained(options, words):
    with pytest.raises(ExperimentError, match=words):
        chosen_cases(ACCURACY, StudyOptions(is_small=True, **options))
