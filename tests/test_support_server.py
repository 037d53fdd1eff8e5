"""What the server does after the merge: one test for each row of docs/support.md."""

from dataclasses import replace

import pytest

from flwr_smartsplit import Momentum
from flwr_smartsplit.errors import InvalidTask
from tests.flower.apps import run, smart_split
from tests.flower.test_server_steps import FOUR, clients, run_message, run_old, server
from tests.tasks import TASK, differences


def test_data_of_the_server() -> None:
    """FedDU and momentum: mixed routes give whole routes' bits, under both APIs."""
    steps = Momentum(), server()
    whole = run(clients(), smart_split((), server_steps=steps, **FOUR)).state
    assert differences(run_message(Momentum(), server()), whole) == []
    assert differences(run_old(Momentum(), server()), whole) == []
    assert differences(run_message(server()), whole) != []


def test_data_of_the_server_beside_layers_kept_local() -> None:
    """Refused before anything is sent."""
    task = replace(TASK, is_local=lambda name: name.startswith("1."))
    strategy = smart_split((), task=task, server_steps=(server(),))
    with pytest.raises(InvalidTask, match="is_local keeps some of its state"):
        run(clients(task=task), strategy)
    assert strategy.round_plans == []
