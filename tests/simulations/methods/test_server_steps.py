"""What the server adds: each method trains, by its own rule, on the same clients."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from simulations.experiments.data import server_loader
from simulations.experiments.errors import ExperimentError
from simulations.experiments.marks import read_marks
from simulations.experiments.partitions import Shards, WithServer
from simulations.experiments.provenance import Provenance
from simulations.experiments.runner import prepare, run_methods
from simulations.fleets.presets import half_weak
from simulations.methods import METHODS
from simulations.methods.server_steps import SERVER_STEPS
from tests.simulations.in_process import EXPERIMENT, run_here

SOME = {
    "partition": WithServer(clients=Shards(2), fraction=0.25, num_classes=5),
    "share_labels": True,
    "in_process": True,
    "fraction_train": 0.7,
    "num_rounds": 2,
    "learning_rate": 0.05,
}
"""Two of three clients, since the server has nothing to add to all."""


def run(name, folder, **changes):
    return run_here(METHODS[name], folder, **{**SOME, **changes})


def differ(one, other):
    return any(not np.array_equal(one.after[n], other.after[n]) for n in one.after)


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory):
    return run("fedavg", tmp_path_factory.mktemp("fedavg"))


def trained_by(ended):
    return [
        (row["round"], row["client_key"])
        for row in ended.of_kind("client")
        if row["status"] == "accepted"
    ]


@pytest.mark.parametrize("method", SERVER_STEPS, ids=lambda method: method.name)
def test_it_has_fedavgs_clients_and_another_model(method, fedavg, tmp_path):
    ended = run(method.name, tmp_path)

    assert trained_by(ended) == trained_by(fedavg)
    assert len(trained_by(ended)) == 4
    assert differ(ended, fedavg)
    assert all(np.isfinite(array).all() for array in ended.after.values())


def test_all_of_them_differ(tmp_path):
    made = [run(method.name, tmp_path) for method in SERVER_STEPS]

    for index, one in enumerate(made):
        assert all(differ(one, other) for other in made[index + 1 :])


def test_passes_of_clients_and_server_count(fedavg, tmp_path):
    twice = run("fedavg", tmp_path, local_epochs=2)

    steps = [
        [row["num_steps"] for row in ended.of_kind("client") if "num_steps" in row]
        for ended in (twice, fedavg)
    ]
    assert steps[0] == [2 * each for each in steps[1]]
    assert differ(run("feddu", tmp_path, local_epochs=2), run("feddu", tmp_path))


def test_without_a_share_for_the_server_it_is_said_what_to_take():
    with pytest.raises(ExperimentError, match=r"WithServer\(clients"):
        server_loader(EXPERIMENT)


@pytest.mark.slow
@pytest.mark.ray
def test_one_and_two_workers_end_at_the_same_bits(tmp_path):
    """Under Flower's engine and Ray, with split clients; here, too; not with a seed."""
    experiment = replace(
        EXPERIMENT,
        **SOME | {"in_process": False, "max_train_examples": 200},
        methods=("feddu_momentum", "feddum"),
        fleet=half_weak,
        num_clients=6,
    )
    provenance = Provenance.of_this_process([], now=datetime.now(UTC))
    changes = {
        "one": {"num_workers": 1},
        "two": {"num_workers": 2},
        "here": {"in_process": True},
        "other seed": {"in_process": True, "seed": 1},
    }
    for name, change in changes.items():
        own = replace(experiment, **change)
        prepared = prepare(own, tmp_path / name, provenance=provenance)
        run_methods(own, tmp_path / name, prepared=prepared, on_round=lambda *_: None)

    one, two, here, other = (read_marks(tmp_path / name) for name in changes)
    assert one == two == here != other
    rows = (tmp_path / "one" / "feddum.jsonl").read_text()
    assert '"route": "whole"' in rows and '"route": "device[' in rows
