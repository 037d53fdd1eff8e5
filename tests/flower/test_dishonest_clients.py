"""Clients that open or do more than the strategy has planned: the others go on."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Context
from flwr.clientapp import ClientApp

from flwr_smartsplit import SmartSplitNumPyClient, build_client_app
from flwr_smartsplit.device.local_training import Outcome
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.message_bytes import decode, encode
from flwr_smartsplit.types import ClientPlan
from tests.edge.gate.forging import altered
from tests.flower.apps import apps, budgets_of, message_app, run, smart_split
from tests.in_process_grid import InProcessGrid
from tests.tasks import TASK, differences, loader

BUDGETS = budgets_of(2, 3, 4)
Change = Callable[[ClientPlan], ClientPlan]


class Dishonest(SmartSplitNumPyClient):
    """A client that changes its plan before it trains."""

    change: Change

    def train(self, plan: ClientPlan, state: Mapping[str, Any]) -> Outcome:
        """Train by another plan."""
        return super().train(self.change(plan), state)


def dishonest(index: int, change: Change) -> ClientApp:
    """Make the app of a client that changes its plan."""

    def client_fn(context: Context) -> SmartSplitNumPyClient:
        client = Dishonest(
            TASK,
            loader(index),
            client_key=f"c{index}",
            budget_bytes=BUDGETS[index],
            edges=(LocalEdge(),),
        )
        client.change = change
        return client

    return build_client_app(client_fn)


def with_opening(**changes: Any) -> Change:
    """Open something else than was signed."""

    def change(plan: ClientPlan) -> ClientPlan:
        opening = altered(decode(plan.opening), **changes)
        return replace(plan, opening=b"".join(encode(opening)))

    return change


FORGED: dict[str, tuple[Callable[[], ClientApp], str]] = {
    "threads": (
        lambda: dishonest(1, with_opening(num_threads=9)),
        "was not signed by the strategy of run",
    ),
    "another's session": (
        lambda: dishonest(1, with_opening(session="1.0/c0/edge")),
        "was not signed by the strategy of run",
    ),
    "no opening": (
        lambda: dishonest(1, lambda plan: replace(plan, opening=b"")),
        "OpenSession is for the strategy of a run",
    ),
    "an opening that is none": (
        lambda: dishonest(1, lambda plan: replace(plan, opening=b"x")),
        "bytes should follow",
    ),
    "more examples than it said": (
        lambda: message_app(1, BUDGETS[1], num_examples=2),
        "10 examples so far, and the plan allows 8: give the client its true",
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_dishonest_client_is_left_out(kind: str) -> None:
    """The state is that of a run in which its replies are lost."""
    make, text = FORGED[kind]
    clients = apps(BUDGETS)
    honest = InProcessGrid(clients)
    for number in (1, 2):
        honest.lose(1, nth=number)
    without = run(honest, smart_split(), num_rounds=2)
    found = run([clients[0], make(), clients[2]], smart_split(), num_rounds=2)
    assert found.kinds() == [("c1", "edge_failed")] * 2
    assert all(text in failure.cause for failure in found.strategy.failures)
    assert differences(found.state, without.state) == []


def test_honest_clients_are_let_in() -> None:
    """The planted error, turned round: a plan that is not changed is no failure."""
    clients = [dishonest(n, lambda plan: plan) for n in range(3)]
    assert run(clients, smart_split(), num_rounds=2).kinds() == []
