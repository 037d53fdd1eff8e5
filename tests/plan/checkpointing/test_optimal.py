"""The dynamic programme against brute force over every nested plan."""

from dataclasses import replace
from random import Random

import pytest

from flwr_smartsplit.errors import InvalidPlan
from flwr_smartsplit.plan.checkpointing.optimal import Rotor
from flwr_smartsplit.plan.checkpointing.plan import cost_of
from flwr_smartsplit.plan.checkpointing.stages import Stage
from flwr_smartsplit.plan.checkpointing.step_memory import held_by
from flwr_smartsplit.types import RecomputePlan
from tests.plan.stage_chains import every_plan, random_stages

NUM_CHAINS = 500
CLOSE = 1e-6
"""Ties are decided by a thousandth of the smallest cost, and less."""


def peak_of(stages: tuple[Stage, ...], plan: RecomputePlan) -> int | None:
    """Follow a plan; None if a stage must not run twice."""
    try:
        return held_by(stages, plan).peak_bytes
    except InvalidPlan:
        return None


def brute_force(stages: tuple[Stage, ...], budget: int) -> float | None:
    """Try every plan; return the least extra cost of those that fit."""
    costs = [
        cost_of(stages, plan)
        for plan in every_plan(stages)
        if (peak := peak_of(stages, plan)) is not None and peak <= budget
    ]
    return min(costs, default=None)


@pytest.mark.every(2)
@pytest.mark.parametrize("part", range(5))
def test_it_is_as_good_as_trying_everything(part: int) -> None:
    """Five hundred chains whose sizes are whole slots: never worse, never over."""
    rng, gaps, refusals = Random(part), 0, 0
    for _ in range(NUM_CHAINS // 5):
        stages = random_stages(rng, rng.randint(1, 4))
        highest = held_by(stages, RecomputePlan()).peak_bytes
        budget = rng.randint(highest * 3 // 5, highest)
        plan = Rotor(stages, budget, slots=budget).plan()
        best = brute_force(stages, budget)
        refusals += best is None
        if plan is None:
            gaps += best is not None
            continue
        assert held_by(stages, plan).peak_bytes <= budget
        assert best is not None
        gaps += cost_of(stages, plan) > best + CLOSE
    assert gaps == 0
    assert 0 < refusals < NUM_CHAINS // 5


def test_a_programme_that_forgets_the_gradients_is_found(monkeypatch) -> None:
    """Then some plan goes over its budget."""
    monkeypatch.setattr(Rotor, "_arriving", lambda self, last: 0)
    rng, over = Random(0), 0
    for _ in range(100):
        stages = tuple(replace(s, arriving_bytes=9) for s in random_stages(rng, 4))
        budget = held_by(stages, RecomputePlan()).peak_bytes * 4 // 5
        plan = Rotor(stages, budget, slots=budget).plan()
        over += plan is not None and held_by(stages, plan).peak_bytes > budget
    assert over > 0


def test_a_segment_that_is_rerun_as_a_whole_keeps_nothing_meanwhile() -> None:
    """What waits for a gradient that takes long is the batch alone."""
    stages = random_stages(Random(1), 4)
    stages = tuple(s for s in stages if s.can_rerun)
    budget = 2 * held_by(stages, RecomputePlan()).peak_bytes
    plan = Rotor(stages, budget, slots=budget, is_rerun=True).plan()
    assert plan is not None
    assert held_by(stages, plan).waiting_bytes == 0
    assert held_by(stages, RecomputePlan()).waiting_bytes > 0
