"""Sampling: the same clients whatever the method, the run and its node ids."""

from simulations.methods.drop_weak import DROP_WEAK
from simulations.methods.fedavg import FEDAVG
from simulations.methods.heterofl import HETEROFL
from tests.simulations.in_process import run_here

SIX = (None,) * 6


def asked(method, folder, seed=0):
    ended = run_here(
        method,
        folder,
        budgets_bytes=SIX,
        fraction_train=0.5,
        num_rounds=2,
        max_train_examples=48,
        seed=seed,
    )
    rows = ended.of_kind("client")
    assert len(rows) == 12
    return [
        (row["round"], row["client_key"])
        for row in sorted(rows, key=lambda row: (row["round"], row["client_key"]))
        if row["status"] != "not_sampled"
    ]


def test_all_methods_ask_the_same_clients(tmp_path):
    """``DROP_WEAK`` is the package's strategy, with its own sampling."""
    truth = asked(DROP_WEAK, tmp_path)

    assert len(truth) == 6
    assert truth[:3] != truth[3:]
    assert asked(FEDAVG, tmp_path) == truth
    assert asked(HETEROFL, tmp_path) == truth
    assert asked(FEDAVG, tmp_path, seed=1) != truth
