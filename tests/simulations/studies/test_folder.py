"""The folder of a study: what may be added to it, and what is refused."""

import json
from dataclasses import replace

import pytest

from simulations.experiments.errors import ExperimentError
from simulations.studies.folder import (
    STUDY,
    begin_folder,
    differences,
    read_config,
)
from tests.simulations.folders import CASE, PROVENANCE, SECOND


def start(folder, *cases, is_small=True, provenance=PROVENANCE):
    begin_folder(
        folder,
        STUDY,
        "accuracy",
        cases=cases,
        is_small=is_small,
        provenance=provenance,
    )
    return read_config(folder)


def changed(**fields):
    return replace(CASE, experiment=replace(CASE.experiment, **fields))


def test_the_configuration_names_study_settings_and_what_is_missing(tmp_path):
    config = start(tmp_path, CASE)

    assert config["study"] == "accuracy"
    case = config["cases"]["own_labels"]
    assert case["settings"]["fleet"] == "half_weak"
    assert case["methods"] == ["fedavg", "drop_weak", "smartsplit"]
    assert case["missing"] == ["not_written"]
    assert case["seeds"] == [0, 1, 2]


def test_cases_methods_and_seeds_can_be_added(tmp_path):
    start(tmp_path, replace(changed(methods=("fedavg",)), num_seeds=1))

    config = start(tmp_path, changed(methods=("smartsplit",)), SECOND)

    assert list(config["cases"]) == ["own_labels", "second"]
    assert config["cases"]["own_labels"]["methods"] == ["fedavg", "smartsplit"]
    assert config["cases"]["own_labels"]["seeds"] == [0, 1, 2]


def test_what_changes_no_weights_may_differ(tmp_path):
    start(tmp_path, CASE)

    start(tmp_path, changed(num_workers=1, data_dir=tmp_path))


@pytest.mark.parametrize(
    ("case", "is_small", "words"),
    [
        (
            changed(num_rounds=3),
            True,
            "own_labels.settings.num_rounds is 2 there and 3",
        ),
        (changed(learning_rate=0.5), True, "learning_rate is 0.03 there and 0.5 now"),
        (CASE, False, "is_small is True there and False now"),
        (replace(CASE, target_accuracy=0.7), True, "target_accuracy is 0.6 there"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(
    tmp_path, case, is_small, words
):
    before = start(tmp_path, CASE)

    with pytest.raises(ExperimentError, match=words):
        start(tmp_path, case, is_small=is_small)

    assert read_config(tmp_path) == before


def test_other_versions_are_refused(tmp_path):
    start(tmp_path, CASE)
    other = replace(PROVENANCE, versions={**PROVENANCE.versions, "torch": "0.1"})

    with pytest.raises(ExperimentError, match=r"versions\.torch is .* and '0\.1' now"):
        start(tmp_path, CASE, provenance=other)


def test_the_results_of_another_suite_are_left_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"experiment": {}}))

    with pytest.raises(ExperimentError, match="results of another suite"):
        start(tmp_path, CASE)


def test_a_file_in_the_way_is_explained(tmp_path):
    (tmp_path / "taken").touch()

    with pytest.raises(ExperimentError, match="name another folder with --out"):
        start(tmp_path / "taken", CASE)


def test_differences_name_what_only_one_side_has():
    assert differences({"a": 1}, {"b": 2}) == [
        "a is 1 there and None now",
        "b is None there and 2 now",
    ]
