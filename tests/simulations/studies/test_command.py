"""The command line on studies: reports made again, files kept, options refused."""

import json

import pytest
from typer.testing import CliRunner

from simulations.__main__ import app
from simulations.experiments.errors import ExperimentError
from simulations.studies.command import keep_lines
from tests.simulations.folders import CASE, write_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), CASE)


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_report_is_made_again_from_the_folder(folder):
    result = call("report", folder, "--json")

    assert result.exit_code == 0
    methods = json.loads(result.stdout)["methods"]
    assert list(methods) == ["fedavg", "drop_weak", "smartsplit"]
    summary = json.loads((folder / "summary.json").read_text())
    assert methods["fedavg"]["accuracy"] == summary["methods"]["fedavg"]["accuracy"]
    assert (folder / "report.html").stat().st_size > 10_000


def test_a_kept_file_prints_the_tables_without_the_journals(folder, tmp_path):
    path = keep_lines(folder, hardware="epyc2", results=tmp_path)

    result = call("report", path)

    assert path.name == "accuracy_epyc2_2026-01-02.jsonl"
    assert result.exit_code == 0
    assert "by hand: own labels" in result.stdout
    assert "smartsplit" in result.stdout


@pytest.mark.parametrize("hardware", ["", "a/b", "two words"])
def test_a_name_that_no_file_should_have_is_refused(folder, hardware, tmp_path):
    with pytest.raises(ExperimentError, match="is part of a file's name"):
        keep_lines(folder, hardware=hardware, results=tmp_path)


def test_nothing_finished_is_nothing_to_keep(tmp_path):
    begun = write_study(tmp_path)
    for path in begun.rglob("*.finished.json"):
        path.unlink()

    with pytest.raises(ExperimentError, match="nothing to keep yet"):
        keep_lines(begun, hardware="epyc2", results=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "nope"], "--cases names 'nope'"),
        (["--seed", 1], "has cases that say this themselves: leave out --seed"),
        (["--data", "digits"], "leave out --data"),
        (["--methods", "nope"], "there are only fedavg"),
    ],
)
def test_an_option_that_a_study_cannot_heed_is_explained(tmp_path, arguments, words):
    result = call("run", "accuracy", "--small", "--out", tmp_path / "out", *arguments)

    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_study_is_refused(folder):
    result = call("run", "latency", "--small", "--out", folder)

    assert result.exit_code == 2
    assert "study is 'accuracy' there and 'latency' now" in result.stderr


def test_the_list_names_the_studies_and_what_they_cost():
    result = call("list")

    for name in ("accuracy", "latency", "ablation", "CPU-hours"):
        assert name in result.stdout
