"""Methods by width: FedAvg where nobody is weak, and who trains which channels."""

import numpy as np
import pytest
import torch

from flwr_smartsplit import Route, narrowed, predicted_peak_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import width_of
from simulations.experiments.clients import build_task
from simulations.experiments.models import digits_network
from simulations.methods.drop_weak import DROP_WEAK
from simulations.methods.widths import (
    ALLSMALL,
    FEDROLEX,
    HETEROFL_WIDTHS,
)
from tests.simulations.in_process import EXPERIMENT, run_here

BY_MEMORY = HETEROFL_WIDTHS, FEDROLEX, ALLSMALL  # The others go by time.


def budget_of(rate: float) -> int:
    """Predict what a width of the experiment's model needs."""
    task = build_task(EXPERIMENT)
    variant = width_of(build_chain(task).channels.groups, rate)
    profile = profile_of(task, batch_size=EXPERIMENT.batch_size, variant=variant)
    return predicted_peak_bytes(profile, Route.whole())


@pytest.mark.parametrize("method", BY_MEMORY, ids=lambda method: method.name)
def test_where_nobody_is_weak_it_is_federated_averaging(method, tmp_path):
    """Bit for bit; another seed is seen."""
    truth, other = (run_here(DROP_WEAK, tmp_path, seed=seed).after for seed in (0, 1))

    ended = run_here(method, tmp_path)

    assert all(np.array_equal(ended.after[name], truth[name]) for name in truth)
    assert not any(np.array_equal(ended.after[name], other[name]) for name in truth)


def test_each_device_trains_the_widest_slice_it_can_hold(tmp_path):
    budgets = (None, budget_of(0.5), budget_of(0.25), budget_of(0.125) - 1)

    ended = run_here(
        HETEROFL_WIDTHS, tmp_path, budgets_bytes=budgets, max_train_examples=128
    )

    rows = {row["client_key"]: row for row in ended.of_kind("client")}
    assert [rows[key].get("variant") for key in "012"] == [
        None,
        "width 0.5",
        "width 0.25",
    ]
    assert rows["3"]["status"] != "accepted"
    for key in "012":
        assert rows[key]["peak_bytes"] == rows[key]["predicted_peak_bytes"]
    flops = [rows[key].get("step_flops") for key in "012"]
    assert flops[0] is None  # It is the model's.
    assert flops[1] > 2 * flops[2] > 0


def test_a_fixed_slice_trains_the_first_channels_and_a_rolling_one_others(tmp_path):
    budgets, changed = (budget_of(0.5),) * 2, {}
    for method in (HETEROFL_WIDTHS, FEDROLEX):
        ended = run_here(method, tmp_path, budgets_bytes=budgets, num_rounds=2)
        weight = ended.after["conv2.weight"] != ended.before["conv2.weight"]
        changed[method.name] = weight.any(axis=(2, 3))

    fixed, rolling = changed["heterofl_widths"], changed["fedrolex"]
    assert fixed[:20, :16].all()
    assert not fixed[20:].any()
    assert not fixed[:, 16:].any()
    assert rolling[20:25].any()
    assert not rolling[25:].any()


def test_the_small_model_is_what_all_can_hold(tmp_path):
    """And the global model computes what it does."""
    budgets = (None, budget_of(0.5), budget_of(0.5) + 1)

    ended = run_here(ALLSMALL, tmp_path, budgets_bytes=budgets)

    assert {row["variant"] for row in ended.of_kind("client")} == {"width 0.5"}
    model, inputs = digits_network().eval(), torch.randn(4, 1, 8, 8)
    model.load_state_dict({n: torch.tensor(a) for n, a in ended.after.items()})
    small = narrowed(model, 0.5, inputs).eval()
    assert torch.allclose(model(inputs), small(inputs), atol=1e-6)
    assert not ended.after["conv2.weight"][20:].any()
    assert ended.after["conv2.weight"][:20, :16].all()
