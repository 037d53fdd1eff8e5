"""HeteroFL: FedAvg at full width, and classes that stay with who has them."""

from dataclasses import replace

import numpy as np

from simulations.experiments.partitions import OwnLabels
from simulations.methods.drop_weak import DROP_WEAK
from simulations.methods.heterofl import (
    CLASSIFIER,
    HETEROFL,
    local_labels,
    width_submodels,
)
from tests.simulations.in_process import EXPERIMENT, run_here


def test_at_full_width_a_round_has_the_bits_of_federated_averaging(tmp_path):
    """Dropping weak devices where none is weak is the truth; another seed is seen."""
    truth, other = (run_here(DROP_WEAK, tmp_path, seed=seed).after for seed in (0, 1))

    ended = run_here(HETEROFL, tmp_path)

    assert {row["route"] for row in ended.of_kind("client")} == {"width 1"}
    assert all(np.array_equal(ended.after[name], truth[name]) for name in truth)
    assert not any(np.array_equal(ended.after[name], other[name]) for name in truth)


def test_narrow_clients_train_the_first_channels_only(tmp_path):
    budget_bytes = width_submodels(EXPERIMENT)[1].peak_bytes

    ended = run_here(HETEROFL, tmp_path, budgets_bytes=(budget_bytes,) * 2)

    changed = ended.after["conv2.weight"] != ended.before["conv2.weight"]
    assert changed[:20, :16].any(axis=(2, 3)).all()
    assert not changed[20:].any()
    assert not changed[:, 16:].any()


def test_rows_of_the_classifier_come_from_clients_with_the_class(tmp_path):
    """Own labels: classes that nobody has an example of here keep their rows."""
    experiment = replace(EXPERIMENT, partition=OwnLabels(num_own=5), num_clients=2)
    weak_labels, strong_labels = local_labels(experiment)
    submodels = width_submodels(experiment)

    ended = run_here(
        HETEROFL,
        tmp_path,
        budgets_bytes=(submodels[-1].peak_bytes - 1, None),
        partition=experiment.partition,
    )

    assert set(weak_labels) - set(strong_labels) == {0, 1, 2, 3, 4}
    for name in CLASSIFIER:
        same = ended.after[name] == ended.before[name]
        kept = {row for row in range(10) if same[row].all()}
        assert kept == {0, 1, 2, 3, 4}
