"""Cuts that move between two steps of a round change where it is done, and no bit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from flwr_smartsplit import Route, proximal
from flwr_smartsplit.model.cap import CapMode
from flwr_smartsplit.runtime.training import Conditions, Outcome
from flwr_smartsplit.runtime.walk import Walk
from flwr_smartsplit.types import Status
from tests.runtime.test_routes import FAR, NEAR, Pair
from tests.tasks import (
    TASK,
    client_plan,
    device_part,
    differences,
    initial_state,
    loader,
)

NUM_STEPS = 9  # Three epochs, each with a last batch of one example.
SPLIT = partial(Route.split, edge=NEAR)
Between = Callable[[Walk], None]


def one_cycle(optimizer: Optimizer, config: Any) -> LRScheduler:
    """Change rates and momenta from step to step."""
    del config
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=NUM_STEPS + 1)


VARIANTS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "plain": {"optimizer_fn": partial(torch.optim.SGD, lr=0.05)},
    "adam": {"optimizer_fn": partial(torch.optim.Adam, lr=0.01)},
    "adagrad": {"optimizer_fn": partial(torch.optim.Adagrad, lr=0.01)},
    "proximal": {
        "optimizer_fn": partial(proximal, optimizer_fn=TASK.optimizer_fn, mu=0.5)
    },
    "scheduled": {"schedule_fn": one_cycle},
    "clipped": {"max_gradient_norm": 0.3},
    "all": {
        "optimizer_fn": partial(torch.optim.AdamW, lr=0.01),
        "schedule_fn": one_cycle,
        "max_gradient_norm": 0.3,
    },
}

EVERYWHERE = {0: 2, 1: 8, 2: 7, 3: 1, 4: 6, 5: 5, 7: 3, 8: 4}
"""Every cut, earlier and later, by the number of steps done before."""
BELOW = {0: 1, 2: 5, 3: 2, 5: 4, 6: 1, 8: 3}
"""The same below a second cut at six."""


class Moving(Pair):
    """Client 0 and two edges, in a round of nine steps."""

    between: Between | None = None

    def _parts(self, route: Route) -> Any:
        state = initial_state()
        plan = client_plan(0, route, state, addresses=self.addresses)
        conditions = Conditions(
            task=self.task,
            connect=lambda place, address: self.edges[place].connect(address),
            cap_mode=CapMode.STRICT,
            local_epochs=3,
            between_steps=self.between,
        )
        return plan, device_part(state, route), loader(0), conditions

    def run(self, route: Route, between: Between | None = None) -> Outcome:
        """Train along a route, with something between the steps."""
        self.between = between
        return self.train(route)


def losses_into(losses: list[float]) -> Between:
    """Write down the mean loss so far before each step."""
    return lambda walk: losses.append(walk.report(num_epochs=1).loss)


def moving(plan: dict[int, int], *others: Between) -> Between:
    """Move the cut before certain steps."""

    def between(walk: Walk) -> None:
        for other in others:
            other(walk)
        if walk.num_steps in plan:
            walk.move(plan[walk.num_steps], reason=f"test {walk.num_steps}")

    return between


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Moving]:
    """Start two edges."""
    yield Moving(tmp_path)


KINDS = {
    "split": (SPLIT(3), EVERYWHERE),
    "u-shape": (Route.u_shape(3, 6, edge=NEAR), BELOW),
    "hops": (Route.hops((3, 6), edges=(NEAR, FAR)), BELOW),
    "both": (Route((3, 6, 8), ("device", NEAR, FAR, "device")), BELOW),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_route_that_moves_trains_to_the_same_bits(
    tmp_path: Path, name: str, kind: str
) -> None:
    """Loss after every step, the state everywhere, and what the edges sign for."""
    pair = Moving(tmp_path, replace(TASK, **VARIANTS[name]))
    route, plan = KINDS[kind]
    expected_losses: list[float] = []
    losses: list[float] = []
    last = route.with_first_cut(list(plan.values())[-1])
    expected = pair.run(last, losses_into(expected_losses))
    outcome = pair.run(route, moving(plan, losses_into(losses)))
    assert outcome.report.status is Status.OK, outcome.report.message
    assert len(losses) == NUM_STEPS
    assert losses == expected_losses
    assert outcome.report.loss == expected.report.loss
    assert outcome.receipts == expected.receipts
    assert differences(outcome.state, expected.state) == []
    whole = pair.run(Route.whole())
    assert differences(pair.merged(outcome), whole.state) == []
    moves = [(move.step, move.after) for move in outcome.report.moves]
    assert moves == list(plan.items())
