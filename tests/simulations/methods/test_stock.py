"""Stock strategies: each trains, does what its name says, and knows no budgets."""

from functools import partial

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvgM, FedProx

from simulations.methods.fedavg import FEDAVG
from simulations.methods.stock import STOCK, stock_method
from tests.simulations.in_process import run_here


def distance(ended, reference):
    return sum(
        float(np.square(ended.after[name] - reference[name]).sum())
        for name in reference
    )


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """Two rounds of Flower's FedAvg: server momentum adds nothing in the first."""
    return run_here(FEDAVG, tmp_path_factory.mktemp("fedavg"), num_rounds=2)


@pytest.mark.parametrize("method", STOCK, ids=lambda method: method.name)
def test_everybody_trains_the_whole_model_whatever_its_budget(
    method, tmp_path, averaged
):
    ended = run_here(method, tmp_path, budgets_bytes=(1, None, None), num_rounds=2)

    rows = ended.of_kind("client")
    assert [row["status"] for row in rows] == ["accepted"] * 6
    assert {row["route"] for row in rows} == {"whole"}
    assert all(np.isfinite(array).all() for array in ended.after.values())
    assert {array.dtype for array in ended.after.values()} == {np.dtype(np.float32)}
    assert distance(ended, averaged.after) > 0
    assert "budgets ignored" in method.summary


def test_the_proximal_term_holds_clients_back(tmp_path):
    def moved(mu):
        method = stock_method("prox", partial(FedProx, proximal_mu=mu), rule="")
        ended = run_here(method, tmp_path)
        return distance(ended, ended.before), ended

    none, weak, strong = (moved(mu) for mu in (0.0, 1.0, 10.0))

    assert none[0] > weak[0] > strong[0]
    assert distance(none[1], run_here(FEDAVG, tmp_path).after) == 0


def test_a_strategy_that_adds_nothing_is_federated_averaging(tmp_path):
    method = stock_method("plain", FedAvgM, rule="")

    ended = run_here(method, tmp_path)

    assert distance(ended, run_here(FEDAVG, tmp_path).after) == 0
