"""The ledger of a step: what its items are, where the loss is a stage of its own."""

from dataclasses import replace
from random import Random

from flwr_smartsplit.plan.checkpointing.step_memory import items_of
from flwr_smartsplit.types import Rerun
from tests.plan.stage_chains import random_stages


def test_a_rerun_that_ends_before_the_loss_leaves_the_loss_alone() -> None:
    """The loss has no units, so it begins and ends where the last unit ends."""
    first, second, last = random_stages(Random(0), 3)
    first, second = (replace(each, can_rerun=True) for each in (first, second))
    loss = replace(last, start=2, stop=2, can_rerun=False)
    found = items_of((first, second, loss), (Rerun(0, 2),))
    assert found == ((0, 1, ((0, 0, None), (1, 1, None))), (2, 2, None))
    whole = items_of((first, second), (Rerun(0, 2),))
    assert whole == found[:1]
