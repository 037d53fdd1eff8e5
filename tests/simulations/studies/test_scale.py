"""The scale suite: what it counts is what is there, and runs go on where they ended."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from typer.testing import CliRunner

from simulations.__main__ import app
from simulations.experiments.data import load_images
from simulations.experiments.errors import ExperimentError
from simulations.experiments.provenance import Provenance
from simulations.studies.measurement import ROWS, Item, MeasurementOptions
from simulations.studies.scale import suite
from simulations.studies.scale.edges import (
    PAPER_BYTES,
    EdgeCase,
    measure_edge,
    needed_bytes,
    work_out_vgg19,
)
from simulations.studies.scale.reports import (
    EDGE_MEMORY,
    ROUNDS,
    TRAINING,
    scale_rows,
    summary_of,
)


def tiny_model() -> nn.Sequential:
    """Build a model that is hosted within milliseconds."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )


TINY = EdgeCase(title="tiny", model_fn=tiny_model, cut=1)
ROUND = {
    "seconds_per_round": {"plain": 0.1, "fedavg": 0.2, "smartsplit": 0.3},
    "ratio": 1.5,
    "load": 0.0,
}
TRAINED = {
    "clients": 1000,
    "clients_per_round": 50,
    "rounds": 2,
    "accuracy": [0.1, 0.5, 0.625],
    "seconds_per_round": [1.0, 2.0],
    "accepted": [50, 49],
}


FIGURES = {
    "accuracy": 0.625,
    "simulated_seconds": 3.0,
    "bytes_up": 4,
    "bytes_down": 5,
    "device_peak_bytes": 6,
}


def options(**changes) -> MeasurementOptions:
    """Ask for a small run."""
    provenance = Provenance(
        command="by hand", date="2026", versions={"torch": "1"}, hardware={}
    )
    return replace(MeasurementOptions(is_small=True, provenance=provenance), **changes)


def scale_with(items):
    return replace(suite.SCALE, items_fn=lambda _: items)


@pytest.fixture
def measured() -> list[str]:
    return []


@pytest.fixture
def quick(measured):
    """Let the suite have quick items of every kind, and count what is measured."""

    def item(part, of, measure):
        def noted(folder: Path):
            measured.append(part + of)
            return {"part": part, "of": of, **measure()}

        return Item(key=f"{part} {of}".strip(), measure=noted)

    return scale_with(
        [
            item(EDGE_MEMORY, "tiny", lambda: measure_edge(TINY, 3, seed=0)),
            item(ROUNDS, "10", lambda: ROUND),
            item(ROUNDS, "100", lambda: ROUND),
            item(TRAINING, "", lambda: {**TRAINED, "figures": FIGURES}),
        ]
    )


def test_an_edges_memory_stays_and_its_disk_grows_by_a_tail_for_each_client():
    """Within a budget for two, of which one is at its peak at a time."""
    found, need = measure_edge(TINY, 5, seed=0), needed_bytes(TINY)
    clients, memory, disk = zip(*found["points"], strict=True)
    assert clients == (1, 2, 3, 4, 5)
    assert len(set(memory)) == 1
    assert need.memory_bytes < memory[0] <= 2 * need.memory_bytes
    assert {late - early for early, late in pairwise(disk)} == {disk[0]}
    assert 0 <= disk[0] - need.disk_bytes < 1024
    assert disk[0] > 4 * 64 * 10  # The classifier's weights alone.


def test_vgg19_is_worked_out_from_one_client(monkeypatch):
    """A hundred times one tail on disk, two in memory; the paper's number beside it."""
    monkeypatch.setattr("simulations.studies.scale.edges.VGG19", TINY)
    need, found = needed_bytes(TINY), work_out_vgg19()
    assert found["is_worked_out"]
    assert found["memory_bytes"] == 2 * need.memory_bytes
    assert found["all_at_once_bytes"] == 100 * need.memory_bytes
    assert found["disk_bytes"] == 100 * need.disk_bytes
    assert found["paper_bytes"] == PAPER_BYTES


def test_a_run_goes_on_where_an_earlier_one_stopped(tmp_path, quick, measured, capsys):
    """Half a line is measured again; the summary has every part by its name."""
    assert quick.run(tmp_path, options())
    assert len(measured) == 4
    rows = tmp_path / ROWS
    lines = rows.read_text("utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]) + lines[-1][:9], "utf-8")
    assert quick.run(tmp_path, options())
    assert measured[4:] == [TRAINING]
    quick.show(tmp_path, as_json=True)
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert methods[TRAINING] == FIGURES
    assert set(methods[f"{ROUNDS} 10"].values()) == {None}
    kept = json.loads((tmp_path / "summary.json").read_text("utf-8"))["rows"]
    summary = summary_of(kept)
    assert list(summary) == [EDGE_MEMORY, ROUNDS, TRAINING]
    assert list(summary[ROUNDS]) == ["10", "100"]
    assert summary[TRAINING] == {**TRAINED, "figures": FIGURES}
    assert (tmp_path / "report.html").read_text("utf-8").count("<img") == 1
    quick.show(tmp_path, as_json=False)
    assert "62.5 % after 2 rounds of 50, 1.5 s each" in capsys.readouterr().out


def test_an_interrupt_is_no_traceback(tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    broken = scale_with([Item(key=ROUNDS, measure=interrupted)])
    assert not broken.run(tmp_path, options())
    broken.show(tmp_path, as_json=True)


def test_a_folder_of_other_results_is_left_alone(tmp_path, quick, measured):
    quick.run(tmp_path, options())
    other = replace(options().provenance, versions={"torch": "2"})
    for changes in ({"is_small": False}, {"provenance": other}):
        with pytest.raises(ExperimentError, match="begun with another configuration"):
            quick.run(tmp_path, options(**changes))
    assert len(measured) == 4


def test_models_cannot_be_chosen():
    result = CliRunner().invoke(app, ["run", "scale", "--models", "vgg19"])
    assert result.exit_code == 2
    assert "leave out --models" in result.stderr


def test_the_small_suite_leaves_out_what_is_long():
    """Nothing is measured here, only listed."""
    small, full = (
        [item.key for item in suite.items(options(is_small=is_small))]
        for is_small in (True, False)
    )
    assert small == [
        "planning",
        "edge_memory small network",
        "edge_memory ResNet-18",
        "vgg19",
        "rounds 10",
        "rounds 100",
    ]
    assert set(full) - set(small) == {"rounds 1000", "training"}


def test_what_is_worked_out_says_so():
    rows = scale_rows({"vgg19": work_out_vgg19_by_hand()})
    ((what, clients, found),) = rows
    assert (what, clients) == ("edge, VGG-19", "100")
    assert found.startswith("worked out: memory 3.0 GB (all at once 150 GB;")
    assert found.endswith("the paper 80 GB), disk 56 GB")


def work_out_vgg19_by_hand():
    """Make numbers of VGG-19's size."""
    return {
        "clients": 100,
        "memory_bytes": 3_000_000_000,
        "all_at_once_bytes": 150_000_000_000,
        "paper_bytes": PAPER_BYTES,
        "disk_bytes": 56_000_000_000,
    }


def test_the_training_asks_fifty_of_a_thousand():
    experiment = suite.thousand_clients(3)
    asked = experiment.num_clients * experiment.fraction_train
    assert (experiment.num_clients, asked, experiment.seed) == (1000, 50, 3)


def test_each_digit_is_there_three_times_for_training(tmp_path):
    """As it is, and a pixel to either side; the test set is as it was."""
    plain = load_images(suite.thousand_clients(0))
    with np.load(suite._with_shifted_digits(tmp_path)) as found:
        same, left, right = np.split(found["x_train"], 3)
        assert np.array_equal(same, plain.x_train)
        assert np.array_equal(right[:, :, :-1], plain.x_train[:, :, 1:])
        assert np.array_equal(left[:, :, 1:], plain.x_train[:, :, :-1])
        assert not right[:, :, -1].any() and not left[:, :, 0].any()
        assert np.array_equal(found["y_train"][len(same) :][:9], plain.y_train[:9])
        assert np.array_equal(found["x_test"], plain.x_test)
