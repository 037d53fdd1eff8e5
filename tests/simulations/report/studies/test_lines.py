"""Lines: figures of each run, and a kept file that makes the same tables."""

import json

import pytest

from simulations.experiments.errors import ExperimentError
from simulations.experiments.marks import mark_path
from simulations.report.studies.cells import study_summary
from simulations.report.studies.lines import read_lines, write_lines
from simulations.report.studies.reading import read_case, read_study, route_name
from tests.simulations.folders import mark_of, write_study


@pytest.fixture
def study(tmp_path):
    return read_study(write_study(tmp_path / "out"))


def test_a_line_holds_what_the_journal_and_the_mark_say(study):
    (line,) = [
        line
        for line in study.lines
        if (line.case, line.method, line.seed) == ("own_labels", "smartsplit", 2)
    ]

    assert line.accuracies == [0.1, 0.5, 0.915]
    assert line.figures["accuracy_last5"] == pytest.approx((0.5 + 0.915) / 2)
    assert line.figures["rounds_to_target"] == 2
    assert line.figures["routes"] == {"device[:1]": 6}
    assert line.state_sha256 == mark_of("smartsplit", 2).state_sha256
    assert line.num_clients == 3
    assert len(study.lines) == 3 * 3 + 3


def test_a_run_without_a_mark_is_told_and_not_counted(tmp_path):
    folder = write_study(tmp_path)
    mark_path(folder / "own_labels" / "seed-1", "fedavg").unlink()

    case = read_case(folder, "own_labels").lines

    assert case.unfinished() == ["own_labels, seed 1, fedavg: 2 of 2 rounds"]
    assert list(case.values("fedavg", "accuracy")) == [0, 2]
    assert list(case.values("smartsplit", "accuracy")) == [0, 1, 2]


def test_a_kept_file_makes_the_same_tables_to_five_digits(study, tmp_path):
    path = tmp_path / "results" / "accuracy_here_2026-01-02.jsonl"

    write_lines(path, study)

    read = study_summary(read_lines(path))
    assert json.dumps(flat(read)) == json.dumps(flat(study_summary(study)))
    assert path.read_text().count("\n") == 1 + len(study.lines)
    assert max(map(len, path.read_text().splitlines()[1:])) < 1800


def flat(value):
    """Round every number, since half of a rounding may lie between two means."""
    if isinstance(value, dict):
        return {name: flat(part) for name, part in value.items()}
    if isinstance(value, list):
        return [flat(part) for part in value]
    return round(value, 3) + 0.0 if isinstance(value, float) else value


@pytest.mark.parametrize(
    "text",
    ["", "{}\n", "no json\n", '{"config": {}}\n', '{"config": {"study": 1}}\n{}'],
)
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "other.jsonl"
    path.write_text(text)

    with pytest.raises(ExperimentError, match="no file of a study's lines"):
        read_lines(path)


def test_a_route_is_named_by_what_the_device_trains():
    assert route_name("device[:3] > edge[3:7] > far[7:]") == "device[:3]"
