"""One crossing in many ways: bytes by formula, the bits of gates, what is judged."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from flwr_smartsplit import Raw, cut_at_gate
from flwr_smartsplit.edge.coding import packed_codes, row_codes
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.flower.serde.records import from_array_record
from simulations.experiments.clients import build_task
from simulations.experiments.errors import ExperimentError
from simulations.experiments.local_grid import LocalGrid
from simulations.experiments.runner import (
    client_app_of,
    initial_model,
    prepared_fleet,
)
from simulations.methods import METHODS
from simulations.methods.crossing import CROSSINGS
from simulations.methods.crossing.gates import (
    all_then_few,
    always_few,
    few_then_all,
)
from simulations.methods.method import Setting, split_strategy
from simulations.studies.traffic import CIFAR
from tests.simulations.in_process import EXPERIMENT, Ended

GATED = replace(EXPERIMENT, model="gated", in_process=True)
ROWS, VALUES = 32, 40 * 8 * 8
"""Examples of a client, and values of each at the gate."""


prepared = cache(prepared_fleet)


def trained(method, folder, experiment=GATED, **changes):
    """Run a method, without evaluation."""
    experiment = replace(experiment, **changes)
    fleet = prepared(replace(experiment, num_rounds=1))
    journal = folder / f"{method.name}.jsonl"
    setting = Setting(
        experiment=experiment,
        task=build_task(experiment),
        journal=journal,
        devices=fleet.devices,
        clock=fleet.clock,
    )
    model = initial_model(method.model_fn(experiment), experiment.seed)
    before = ArrayRecord(model.state_dict())
    result = method.strategy_fn(setting).start(
        grid=LocalGrid([client_app_of(experiment, fleet)] * experiment.num_clients),
        initial_arrays=before,
        num_rounds=experiment.num_rounds,
    )
    return Ended(
        before=from_array_record(before),
        after=from_array_record(result.arrays),
        rows=[json.loads(line) for line in journal.read_text().splitlines()],
    )


def crossed(ended, direction):
    """Say what crossed the cut of the first client in all rounds."""
    rows = [r for r in ended.of_kind("client") if r["client_key"] == "0"]
    return sum(row[f"edge_bytes_{direction}"] for row in rows)


def same_bits(one, other):
    return all(np.array_equal(one.after[k], other.after[k]) for k in one.after)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return trained(METHODS["raw"], tmp_path_factory.mktemp("raw"))


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("float16", 2 * VALUES + 1, 2 * VALUES + 1),
        ("integer8", VALUES + 8, VALUES + 8),
        ("integer4", VALUES / 2 + 8, VALUES / 2 + 8),
        ("top10", 256 * 4 + VALUES / 8, 256 * 4),
        ("top2", 51 * 4 + 51 * 2, 51 * 4),
    ],
)
def test_a_codec_saves_the_bytes_of_its_formula(raw, tmp_path, name, up, down):
    """All else that crosses is the same, but for what tells which codec it is."""
    found = trained(METHODS[name], tmp_path)

    for direction, row_bytes in (("up", up), ("down", down)):
        saved = crossed(raw, direction) - crossed(found, direction)
        assert saved == pytest.approx(ROWS * (4 * VALUES - row_bytes), rel=2e-3)
    assert not same_bits(found, raw)


def test_packed_changes_no_bit_and_saves_a_third_at_least(raw, tmp_path):
    found = trained(METHODS["packed"], tmp_path)

    assert same_bits(found, raw)
    assert crossed(found, "up") < 2 / 3 * crossed(raw, "up")
    assert crossed(found, "down") < 2 / 3 * crossed(raw, "down")


# --- gates ----------------------------------------------------------------------------


def without_codec(phases):
    """Make a method of phases that sends what there is as it is."""

    def strategy_fn(setting):
        more = {"between_rounds": phases(setting.experiment.num_rounds), "codec": Raw()}
        return split_strategy(setting, more=more, choose_route=cut_at_gate)

    return replace(METHODS["gates"], name="by_hand", strategy_fn=strategy_fn)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "phases", "num_rounds"),
    [
        ("gates", always_few, 1),
        ("deprune", few_then_all, 2),
        ("prune", all_then_few, 3),
    ],
)
def test_no_phase_changes_a_bit(monkeypatch, tmp_path, name, phases, num_rounds):
    """Planted: float16 for all that crosses, whatever that makes of it."""
    coded = trained(METHODS[name], tmp_path, num_rounds=num_rounds)
    plain = trained(without_codec(phases), tmp_path, num_rounds=num_rounds)
    assert same_bits(coded, plain)
    assert crossed(coded, "up") < crossed(plain, "up")
    assert crossed(coded, "down") < crossed(plain, "down")

    def coarse(codec, rows, headers, codes):
        headers.fill_(14)
        codes.copy_(rows.bfloat16().to(torch.float16).view(torch.uint8))

    monkeypatch.setattr(packed_codes, "_are_halves", lambda *args: True)
    monkeypatch.setattr(row_codes, "write_values", coarse)
    planted = trained(METHODS[name], tmp_path, num_rounds=num_rounds)
    assert not same_bits(planted, plain)


def test_few_open_channels_cross_as_float16_and_a_bit_for_each_channel(tmp_path):
    found = trained(METHODS["gates"], tmp_path)
    plain = trained(without_codec(always_few), tmp_path)

    num_steps = sum(row["num_steps"] for row in found.of_kind("client")[:1])
    row_bytes = 2 * 4 * 64 + 1
    sent = ROWS * row_bytes + num_steps * 40 / 8
    for direction in ("up", "down"):
        saved = crossed(plain, direction) - crossed(found, direction)
        assert saved == pytest.approx(ROWS * 4 * VALUES - sent, rel=1e-3)


def test_phases_are_those_of_the_paper_in_22_rounds():
    assert [(p.rounds, p.budget) for p in few_then_all(22).phases] == [
        (15, 4),
        (7, None),
    ]
    assert [(p.rounds, p.budget) for p in all_then_few(22).phases] == [
        *((14, None), (4, 16), (4, 4)),
    ]


# --- what is judged, and what is refused ----------------------------------------------


def test_accuracy_is_that_of_the_model_with_the_codec_in_it():
    inputs = torch.randn(4, 1, 8, 8)

    def built(name):
        torch.manual_seed(0)
        return METHODS[name].model_fn(GATED)().eval()

    plain, same, other = built("gates"), built("raw"), built("top2")
    for model in (same, other):
        assert list(model.state_dict()) == list(plain.state_dict())
        model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(same(inputs), plain(inputs))
        assert not torch.allclose(other(inputs), plain(inputs))


def test_a_model_without_a_gate_and_too_few_rounds_are_refused(tmp_path):
    with pytest.raises(ExperimentError, match="has none: take --model gated"):
        trained(METHODS["raw"], tmp_path, EXPERIMENT, in_process=True)
    with pytest.raises(InvalidTask, match="no gate"):
        trained(METHODS["gates"], tmp_path, EXPERIMENT, in_process=True)
    with pytest.raises(ExperimentError, match="1 --rounds are too few"):
        trained(METHODS["deprune"], tmp_path)
    with pytest.raises(ExperimentError, match="2 --rounds are too few"):
        trained(METHODS["prune"], tmp_path, num_rounds=2)


def test_the_study_compares_all_of_them():
    assert CIFAR.methods == tuple(method.name for method in CROSSINGS)
    assert set(CIFAR.methods) <= METHODS.keys()
