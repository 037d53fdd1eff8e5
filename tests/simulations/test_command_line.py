"""The command line: what it refuses, and that it says what to do instead."""

import inspect
import json

import pytest
from typer.testing import CliRunner

from simulations.__main__ import app, run
from simulations.experiments.marks import Mark, write_mark
from tests.simulations.journals import FEDAVG_ROWS, write_results

OPTIONS = [
    "context",
    "suite",
    "data",
    "data_dir",
    "model",
    "rounds",
    "clients",
    "train_examples",
    "seed",
    "workers",
    "methods",
    "models",
    "library",
    "sample",
    "codec",
    "cases",
    "seeds",
    "small",
    "out",
    "as_json",
    "verbose",
]


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "suite 'nope' is unknown: choose one of quickstart"),
        (
            ["quickstart", "--data", "nope"],
            "choose one of digits, digits_mixed",
        ),
        (["quickstart", "--data", "nowhere.npz"], "cannot be read"),
        (["quickstart", "--model", "nope"], "choose small, gated or torchvision:NAME"),
        (["quickstart", "--model", "torchvision:nope"], "no classification model"),
        (
            ["quickstart", "--methods", "fedavg,nope"],
            "there are only fedavg, fedprox",
        ),
        (["quickstart", "--methods", ","], "methods is empty"),
        (["quickstart", "--clients", 1], "num_clients is 1, but must be at least 2"),
        (["quickstart", "--rounds", 0], "num_rounds is 0, but must be at least 1"),
        (["quickstart", "--seed", -1], "seed is -1, but must be at least 0"),
        (["quickstart", "--workers", 0], "num_workers is 0, but must be at least 1"),
        (["quickstart", "--clients", 1000], "more examples or fewer clients"),
        (["quickstart", "--out", __file__], "name another folder with --out"),
    ],
)
def test_a_bad_option_is_explained_without_a_traceback(tmp_path, arguments, words):
    result = call("run", "--out", tmp_path / "out", *arguments)

    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert words in result.stderr
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--rounds", "many"], ["--bogus"], []])
def test_what_is_no_option_at_all_ends_in_usage(arguments):
    result = call("run", *arguments)

    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_a_report_of_nothing_is_explained(tmp_path):
    result = call("report", tmp_path)

    assert result.exit_code == 2
    assert "holds no results" in result.stderr


def test_a_report_can_be_made_again_from_the_journals(tmp_path):
    folder = write_results(tmp_path, fedavg=FEDAVG_ROWS)
    write_mark(
        folder, Mark(method="fedavg", state_sha256="a", accuracy=0.75, num_rounds=2)
    )

    result = call("report", folder, "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["methods"]["fedavg"]["accuracy"] == 0.75
    assert result.stdout.count("\n") == 1
    assert (folder / "report.html").exists()


def test_the_list_names_suites_and_methods():
    result = call("list")

    assert result.exit_code == 0
    for name in ("quickstart", "memory", "fedavg", "drop_weak", "smartsplit"):
        assert name in result.stdout


def test_no_option_is_added_by_accident():
    assert list(inspect.signature(run).parameters) == OPTIONS
