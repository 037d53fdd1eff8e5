"""Clients for whom nothing fits accumulate gradients, where the user allows it."""

from dataclasses import replace
from typing import Any

import pytest

from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.types import Route
from tests.flower.apps import Run, message_app, run, smart_split
from tests.tasks import BATCH_SIZE, TASK, differences, tiny_chain

CUTS = [Route.whole(), *map(Route.split, range(1, len(tiny_chain())))]
NUM_CLIENTS = 3


def least_bytes(accumulate: int) -> int:
    """Say what the smallest route needs in so many micro-batches."""
    task = replace(TASK, accumulate=accumulate)
    profile = profile_of(task, batch_size=BATCH_SIZE)
    return min(predicted_peak_bytes(profile, route) for route in CUTS)


def tight_run(**changes: Any) -> Run:
    """Run clients whose budgets are too small for a step of the whole batch."""
    assert least_bytes(2) < least_bytes(1)
    apps = [message_app(index, least_bytes(2)) for index in range(NUM_CLIENTS)]
    return run(apps, smart_split(recompute=False, **changes))


def test_without_permission_they_sit_out() -> None:
    """The batch, and what BatchNorm sees of it, is the user's."""
    rows: list[Any] = []
    with pytest.raises(SmartSplitError, match=f"{NUM_CLIENTS} x no route fits"):
        tight_run(on_row=[rows.append])
    skipped = [row["status"] for row in rows if row["kind"] == "client"]
    assert skipped == ["sat_out"] * 2 * NUM_CLIENTS


def test_with_permission_they_equal_a_task_that_accumulates() -> None:
    """The same bits as whole models trained in two micro-batches, within the budget."""
    rows: list[Any] = []
    made = tight_run(max_accumulate=4, on_row=[rows.append])
    assert made.kinds() == []
    written = [row["accumulate"] for row in rows if row["kind"] == "client"]
    assert written == [2] * 2 * NUM_CLIENTS
    chosen = made.strategy.round_plans[0].assignments
    assert [each.option.accumulate for each in chosen] == [2] * NUM_CLIENTS
    assert all(each.option.route.cuts for each in chosen)
    task = replace(TASK, accumulate=2)
    apps = [message_app(index, task=task) for index in range(NUM_CLIENTS)]
    expected = run(apps, smart_split((), task=task))
    assert differences(made.state, expected.state) == []
    plain = run([message_app(index) for index in range(NUM_CLIENTS)], smart_split(()))
    assert differences(made.state, plain.state) != []
