"""DepthFL: who trains which blocks, and what the global model answers."""

import numpy as np
import torch

from simulations.methods.depthfl import DEPTHFL, depth_submodels, ensemble
from tests.simulations.in_process import EXPERIMENT, run_here


def test_blocks_that_nobody_can_hold_stay_as_they_are(tmp_path):
    """One client holds a block, one holds two, one holds none."""
    _, two, one = (submodel.peak_bytes for submodel in depth_submodels(EXPERIMENT))

    ended = run_here(DEPTHFL, tmp_path, budgets_bytes=(one - 1, one, two))

    rows = sorted(ended.of_kind("client"), key=lambda row: row["client_key"])
    assert [row["status"] for row in rows] == ["sat_out", "accepted", "accepted"]
    assert [row.get("route") for row in rows] == [None, "depth 1", "depth 2"]
    assert all(row["peak_bytes"] == row["budget_bytes"] for row in rows[1:])
    moved = {
        name
        for name, before in ended.before.items()
        if not np.array_equal(ended.after[name], before)
    }
    assert moved == {name for name in ended.before if ".2." not in name}


def test_a_block_is_the_mean_of_those_who_own_it(tmp_path):
    """Alone, each client's update is known; together they count by their examples."""
    _, two, one = (submodel.peak_bytes for submodel in depth_submodels(EXPERIMENT))
    pairs = ((one, 1), (1, two), (one, two))

    shallow, deep, both = (
        run_here(DEPTHFL, tmp_path, budgets_bytes=budgets) for budgets in pairs
    )

    first, second = "blocks.0.conv1.weight", "blocks.1.conv2.weight"
    mean = (shallow.after[first].astype(float) + deep.after[first]) / 2
    assert np.array_equal(both.after[first], mean.astype(np.float32))
    assert np.array_equal(both.after[second], deep.after[second])
    assert np.array_equal(shallow.after[second], shallow.before[second])


def test_the_global_model_answers_with_the_mean_of_its_classifiers():
    scores = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])

    assert ensemble(scores).tolist() == [[2.0, 1.0]]
