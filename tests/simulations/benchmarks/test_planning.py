"""The planner's time and rounding, on a short chain."""

import json
from functools import cache

import pytest

from flwr_smartsplit import profile_chain
from flwr_smartsplit.cli.specs import task_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import ChainProfile
from simulations.benchmarks import planning


@cache
def squeezenet() -> ChainProfile:
    """Profile a network of 24 units."""
    task = task_of(
        "torchvision:squeezenet1_1", input_shape=(3, 32, 32), optimizer="momentum"
    )
    return profile_chain(build_chain(task), batch_size=4, task=task)


def test_rounding_costs_little_and_coarse_slots_would_be_seen(monkeypatch):
    """With few slots, plans are worse or missed."""
    cost = planning.measured(squeezenet(), 20)
    assert (cost.num_units, cost.num_missed) == (20, 0)
    assert cost.num_stages <= 20
    assert 0 <= cost.most_gap_fraction < 0.05
    assert cost.seconds > 0
    monkeypatch.setattr(planning, "SLOTS", 8)
    coarse = planning.measured(squeezenet(), 20)
    assert coarse.num_missed > 0 or coarse.most_gap_fraction > cost.most_gap_fraction


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_a_row_for_each_length(monkeypatch, capsys, as_json):
    """As numbers, or as a table."""
    monkeypatch.setattr(planning, "MODEL", "squeezenet1_1")
    monkeypatch.setattr(planning, "SIZES", (6, 12))
    planning.main(batch_size=4, as_json=as_json)
    printed = capsys.readouterr().out
    if as_json:
        assert [row["num_units"] for row in json.loads(printed)] == [6, 12]
    else:
        assert "forward's FLOPs" in printed
