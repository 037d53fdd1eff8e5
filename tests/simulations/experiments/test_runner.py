"""The runner: what it measures, what it writes down, and what it keeps quiet."""

import json
import logging
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch

from flwr_smartsplit.types import ChainProfile
from simulations.experiments.experiment import Experiment
from simulations.experiments.models import digits_network
from simulations.experiments.partitions import OwnLabels
from simulations.experiments.provenance import Provenance
from simulations.experiments.runner import (
    evaluation_row,
    initial_model,
    journal_path,
    prepare,
    quiet_libraries,
)
from simulations.fleets.devices import device_from
from simulations.fleets.presets import half_weak

DIGITS = Experiment(
    name="test",
    methods=("smartsplit",),
    fleet=half_weak,
    partition=OwnLabels(),
    num_clients=4,
)
PROVENANCE = Provenance.of_this_process(
    ["run", "a b"], now=datetime(2026, 1, 2, tzinfo=UTC)
)


def test_an_evaluation_is_what_one_works_out_by_hand():
    """Right, right, wrong, right; no example of the last class."""
    first = (torch.tensor([[9.0, 0, 0], [0, 9.0, 0]]), torch.tensor([0, 1]))
    second = (torch.tensor([[9.0, 0, 0], [0, 9.0, 0]]), torch.tensor([1, 1]))

    row = evaluation_row(3, [first, second], num_classes=3)

    assert row.round == 3
    assert row.accuracy == 0.75
    assert row.per_class_accuracy == (1.0, 2 / 3, None)
    rest = torch.log(1 + 2 * torch.exp(torch.tensor(-9.0))).item()
    assert row.loss == pytest.approx((4 * rest + 9.0) / 4)


def test_all_methods_start_from_the_model_the_seed_gives():
    torch.manual_seed(123)
    one = initial_model(digits_network, 5).state_dict()
    other = initial_model(digits_network, 5).state_dict()
    different = initial_model(digits_network, 6).state_dict()

    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], different["conv1.weight"])


def test_a_new_run_removes_the_journals_of_the_last_and_nothing_else(tmp_path):
    journal_path(tmp_path, "fedavg").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")

    prepare(DIGITS, tmp_path, provenance=PROVENANCE)

    assert not journal_path(tmp_path, "fedavg").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_configuration_says_everything_a_run_depends_on(tmp_path):
    prepared = prepare(DIGITS, tmp_path, provenance=PROVENANCE)

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["command"] == "python -m simulations run 'a b'"
    assert config["date"] == "2026-01-02T00:00:00+00:00"
    assert config["experiment"]["fleet"] == "half_weak"
    assert config["experiment"]["partition"] == "OwnLabels(num_own=5)"
    assert config["experiment"]["learning_rate"] == DIGITS.learning_rate
    assert [c["budget_bytes"] for c in config["clients"]] == [
        device.budget_bytes for device in prepared.devices
    ]
    assert [c["is_weak"] for c in config["clients"]] == [True, True, False, False]
    assert sum(c["num_examples"] for c in config["clients"]) == 1437
    assert config["experiment"].keys() == vars_of(DIGITS)
    assert tuple(device_from(c["device"]) for c in config["clients"]) == (
        prepared.devices
    )
    written = ChainProfile.from_json((tmp_path / "profile.json").read_text())
    assert written == prepared.clock.profile


def vars_of(experiment):
    return set(experiment.__dataclass_fields__)


def test_only_one_of_flowers_warnings_is_dropped(caplog):
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    levels = [handler.level for handler in logger.handlers]
    with quiet_libraries(verbose=True):
        logger.warning("DEPRECATED: The `run_simulation` function is deprecated")
        logger.warning("something else")
    logger.warning("The `run_simulation` function is deprecated, said again")

    assert {record.getMessage() for record in caplog.records} == {
        "something else",
        "The `run_simulation` function is deprecated, said again",
    }
    assert [handler.level for handler in logger.handlers] == levels
    logger.removeHandler(caplog.handler)


def test_an_experiment_can_be_a_cache_key_in_any_process():
    assert hash(replace(DIGITS)) == hash(DIGITS)
    assert replace(DIGITS) == DIGITS
    assert replace(DIGITS, seed=1) != DIGITS
