"""NestedRounds: who trains which submodel, under its cap, and who sits out."""

from dataclasses import replace

import numpy as np
import pytest

from simulations.methods import nested
from simulations.methods.heterofl import HETEROFL, width_submodels
from simulations.methods.method import Method
from simulations.methods.nested import (
    Ladder,
    NestedRounds,
    Submodel,
    largest_that_fits,
)
from simulations.methods.sampled import SampledRounds
from tests.simulations.in_process import EXPERIMENT, grid_of, run_here

LARGE = Submodel(name="large", config={}, shapes={}, peak_bytes=100, step_flops=8)
SMALL = Submodel(name="small", config={}, shapes={}, peak_bytes=10, step_flops=1)


@pytest.mark.parametrize(
    ("budget_bytes", "submodel"),
    [(None, LARGE), (100, LARGE), (99, SMALL), (10, SMALL), (9, None), (0, None)],
)
def test_a_client_gets_the_largest_variant_that_fits(budget_bytes, submodel):
    assert largest_that_fits((LARGE, SMALL), budget_bytes) is submodel


@pytest.mark.parametrize("method", [HETEROFL])
def test_a_reply_that_is_not_finite_spoils_nothing(tmp_path, monkeypatch, method):
    """As SmartSplit refuses it: else a comparison would hang on one client's luck."""
    read = nested.reply_from_content

    def spoilt(content):
        reply = read(content)
        if reply.client_key != "0":
            return reply
        return replace(reply, state={k: a * np.nan for k, a in reply.state.items()})

    monkeypatch.setattr(nested, "reply_from_content", spoilt)

    ended = run_here(
        method, tmp_path, budgets_bytes=(None, None), max_train_examples=160
    )

    statuses = {row["client_key"]: row["status"] for row in ended.of_kind("client")}
    assert statuses == {"0": "refused", "1": "accepted"}
    assert all(np.isfinite(array).all() for array in ended.after.values())


@pytest.fixture(scope="module")
def submodels():
    """The four widths of the digits' network."""
    return width_submodels(EXPERIMENT)


def test_everybody_keeps_within_its_budget_and_holds_what_was_predicted(
    tmp_path, submodels
):
    budgets = [submodel.peak_bytes for submodel in submodels]

    ended = run_here(
        HETEROFL,
        tmp_path,
        budgets_bytes=(*budgets, budgets[-1] - 1),
        max_train_examples=160,
    )

    *trained, out = sorted(ended.of_kind("client"), key=lambda row: row["client_key"])
    assert [row["route"] for row in trained] == [
        "width 1",
        "width 0.5",
        "width 0.25",
        "width 0.125",
    ]
    assert [row["peak_bytes"] for row in trained] == budgets
    assert [row["predicted_peak_bytes"] for row in trained] == budgets
    assert {row["status"] for row in trained} == {"accepted"}
    assert out["status"] == "sat_out"
    assert "no submodel fits: the smallest (width 0.125) needs" in out["cause"]
    (total,) = ended.of_kind("round")
    assert (total["selected"], total["accepted"]) == (4, 4)
    assert total["comm_bytes_total"] == sum(
        row["bytes_down"] + row["bytes_up"] for row in trained
    )


def test_a_variant_that_needs_more_than_predicted_is_stopped_and_not_merged(
    tmp_path, submodels
):
    """A planted error: the ladder says that full width needs next to nothing."""
    wrong = (replace(submodels[0], peak_bytes=1),)
    ladder = Ladder(method="heterofl", submodels=wrong)
    method = Method(
        name="wrong",
        summary="",
        strategy_fn=lambda setting: SampledRounds(
            NestedRounds(ladder, seed=setting.experiment.seed), setting
        ),
    )
    budget_bytes = submodels[0].peak_bytes - 1

    ended = run_here(method, tmp_path, budgets_bytes=(budget_bytes, budget_bytes))

    rows = ended.of_kind("client")
    assert {row["status"] for row in rows} == {"out_of_memory"}
    assert all(str(budget_bytes)[:2] in row["cause"] for row in rows)
    assert all(np.array_equal(ended.after[n], a) for n, a in ended.before.items())


def test_a_lost_client_is_named_and_the_others_are_merged(tmp_path):
    experiment = replace(EXPERIMENT, num_clients=2)
    grid = grid_of(experiment, (None, None))
    grid.alter(0, lambda content: content.pop("arrays"), nth=1)

    ended = run_here(HETEROFL, tmp_path, budgets_bytes=(None, None), grid=grid)

    first, second = ended.of_kind("client")
    assert (first["client_key"], second["status"]) == ("0", "accepted")
    assert first["status"] != "accepted"
    assert first["cause"]
    assert not np.array_equal(ended.after["conv1.weight"], ended.before["conv1.weight"])
