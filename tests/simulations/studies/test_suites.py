"""Every suite prints one object of methods, the same for all."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simulations.__main__ import app
from simulations.experiments.marks import Mark, write_mark
from simulations.report.summary import COMPARED, methods_object
from simulations.studies.suites import MEASUREMENTS, STUDIES, SUITES
from tests.simulations.folders import write_study
from tests.simulations.journals import FEDAVG_ROWS, write_results

RESULTS = Path(__file__).parents[3] / "simulations" / "results"
SUITE_NAMES = [*SUITES, *STUDIES, *MEASUREMENTS]


def printed(path):
    result = CliRunner().invoke(app, ["report", str(path), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def kept_rows(suite):
    """Read the rows kept of a measurement; the first line may be its origin."""
    (path,) = RESULTS.glob(f"{suite}_*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "config" not in line]


def object_of(suite, folder):
    """Make the object of a suite from results that are kept, or written by hand."""
    if suite in SUITES:
        mark = Mark(method="fedavg", state_sha256="a", accuracy=0.75, num_rounds=2)
        write_mark(write_results(folder, fedavg=FEDAVG_ROWS), mark)
        return printed(folder)
    if suite in STUDIES:
        kept = max(RESULTS.glob(f"{suite}_*.jsonl"), default=None)
        return printed(kept or write_study(folder))
    by_hand = {
        "scale": [
            {"key": "training", "figures": {"accuracy": 0.5}},
            {"key": "planning"},
        ],
        "leakage": [{"key": "relu1, none", "part": "attacks", "accuracy": 0.5}],
    }
    rows = by_hand.get(suite) or kept_rows(suite)
    return methods_object(MEASUREMENTS[suite].figures_fn(rows))


@pytest.mark.parametrize("suite", SUITE_NAMES)
def test_a_suite_prints_one_object_of_methods_and_nothing_else(suite, tmp_path):
    found = object_of(suite, tmp_path)

    assert list(found) == ["methods"]
    assert found["methods"]
    for figures in found["methods"].values():
        assert list(figures) == list(COMPARED)
        assert all(v is None or isinstance(v, int | float) for v in figures.values())


def test_what_is_compared_is_named_once_and_has_its_figures(tmp_path):
    assert object_of("quickstart", tmp_path)["methods"] == {
        "fedavg": {
            "accuracy": 0.75,
            "simulated_seconds": None,
            "bytes_up": 100,
            "bytes_down": 60,
            "device_peak_bytes": 500 * 1024,
        }
    }
    accuracy = object_of("accuracy", tmp_path)["methods"]
    assert {"fedavg", "drop_weak", "smartsplit", "heterofl"} <= set(accuracy)
    assert accuracy["smartsplit"]["simulated_seconds"] > 0
    assert any("/smartsplit" in name for name in accuracy)
    memory = object_of("memory", tmp_path)["methods"]
    whole, least = (
        memory[f"resnet18, 32 px: {name}"]["device_peak_bytes"]
        for name in ("whole", "least")
    )
    assert whole > 50 * least
    assert object_of("scale", tmp_path)["methods"]["training"]["accuracy"] == 0.5
