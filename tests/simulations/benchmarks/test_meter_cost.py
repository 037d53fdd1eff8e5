"""The cost of metering: the right steps are metered, and the numbers are laid out."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from typer.testing import CliRunner

from flwr_smartsplit.memory.cap import CapMode, MemoryCap
from simulations.benchmarks import meter_cost
from simulations.benchmarks.meter_cost import (
    CASES,
    Case,
    Cost,
    lenet,
    measure,
    num_metered,
)

TINY = Case("tiny", lenet, num_steps=4, num_epochs=2)


@pytest.fixture(scope="module")
def cost() -> Cost:
    """Measure a few steps."""
    return measure(TINY, every=3)


def test_each_epoch_is_measured_in_each_mode(cost):
    """Times are positive; fractions are of the unmetered epoch."""
    assert (cost.model, cost.num_steps, cost.num_metered) == ("tiny", 4, 3)
    assert cost.off_seconds_per_step > 0
    assert len(cost.sampled) == len(cost.strict) == TINY.num_epochs
    assert all(fraction > -1 for fraction in cost.sampled + cost.strict)


def test_clients_take_their_steps_in_turn_and_the_order_rotates(monkeypatch):
    """No mode always comes first, and each trains every batch."""
    order = []

    def noted(task, batches, mode, every):
        for _ in batches:
            order.append(mode)
            yield 1.0

    monkeypatch.setattr(meter_cost, "epoch_steps", noted)
    seconds = meter_cost.one_epoch(TINY.task, [()] * 6, 50)
    assert seconds == dict.fromkeys(CapMode, 6.0)
    for turn in range(6):
        assert sorted(order[3 * turn : 3 * turn + 3]) == sorted(CapMode)
    assert {order[3 * turn] for turn in range(6)} == set(CapMode)


@pytest.mark.parametrize(("num_steps", "every"), [(1, 50), (7, 1), (9, 2), (130, 50)])
def test_the_formula_counts_what_a_cap_looks_at(num_steps, every):
    """Two steps, and then every so many."""
    cap = MemoryCap(None, mode="sampled", every=every)
    metered = 0
    for _ in range(num_steps):
        with cap.step(torch.zeros(1)):
            metered += bool(_get_current_dispatch_mode_stack())
    assert num_metered(num_steps, every) == metered


def test_the_expected_cost_is_stricts_share():
    """A quarter of the steps costs a quarter of the median."""
    cost = Cost("m", 100, 25, 0.1, sampled=[0.0] * 3, strict=[0.1, 0.2, 0.9])
    assert cost.expected_sampled == pytest.approx(0.05)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_a_table_or_json(monkeypatch, as_json):
    """Of the models that were asked for."""
    monkeypatch.setitem(CASES, "tiny", replace(TINY, num_epochs=1))
    app = meter_cost.typer.Typer()
    app.command()(meter_cost.main)
    arguments = ["--models", "tiny", "--every", "2", *(["--json"] if as_json else [])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    if as_json:
        (found,) = json.loads(result.stdout)
        assert found["num_metered"] == 3
        assert statistics.median(found["strict"]) > -1
    else:
        assert "3 of 4" in result.stdout


def test_an_unknown_model_is_refused_with_those_there_are():
    """The error names them."""
    app = meter_cost.typer.Typer()
    app.command()(meter_cost.main)
    result = CliRunner().invoke(app, ["--models", "lenet,nope"])
    assert result.exit_code == 2
    assert "nope is unknown" in result.stderr
    assert "lenet, resnet18" in result.stderr
