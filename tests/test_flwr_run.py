"""``flwr run`` gives the bits of ``run_simulation``."""

import pytest
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import SmartSplit
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.flower.serde.records import from_array_record
from tests.flwr_cli import ROOT, Flower, flower
from tests.simulated_app import TASK, simulate
from tests.test_simulation import NUM_CLIENTS, NUM_ROUNDS

__all__ = ["flower"]

# A minute and a half, most of it the start of processes.
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_same_seeds_give_the_same_bits_under_flwr_run(flower: Flower) -> None:
    """All kinds of route over two Ray edges there; whole and simulated here."""
    out = flower.home / "digest"
    flower.flwr("list", attempts=3)
    flower.run(
        [
            "run",
            ".",
            "--stream",
            "--run-config",
            f"out='{out}'",
            "--federation-config",
            f"num-supernodes={NUM_CLIENTS} client-resources-num-cpus=1",
        ],
        ROOT / "tests" / "flwr_app",
    )
    whole = SmartSplit(
        TASK,
        seed=7,
        strategy=FedAvg(fraction_evaluate=0.0, min_available_nodes=NUM_CLIENTS),
    )
    budgets = [None] * NUM_CLIENTS
    result = simulate(whole, budgets, num_rounds=NUM_ROUNDS, num_workers=2)
    assert out.read_text() == state_digest(from_array_record(result.arrays))
