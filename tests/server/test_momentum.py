"""Momentum: against values by hand, its neutral bits, its one memory, its refusals."""

from typing import Any

import numpy as np
import pytest

from flwr_smartsplit import Momentum
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.server.aggregation import RoundStart, RoundSummary, prepare
from tests.tasks import TASK, State, differences

HARD = np.array([1.0, -0.0, 1e-20, 3.0, 16777217.0, 5e-45], np.float32)
BEFORE = np.array([0.3, -0.0, 1.0, 1e20, 1.0, -5e-45], np.float32)


def state(**arrays: Any) -> State:
    """Make a state of float32 arrays."""
    return {name: np.asarray(a, np.float32) for name, a in arrays.items()}


def begin(step: Momentum, number: int = 1) -> None:
    """Tell a step of a round; ``w`` is a parameter, ``b`` a buffer."""
    start = RoundStart(
        round_number=number,
        task=TASK,
        seed=0,
        state={},
        parameter_names=frozenset({"w"}),
    )
    prepare((step, step), start)


def stepped(step: Momentum, before: State, after: State, number: int = 1) -> State:
    """Take a step of a round."""
    return dict(step.step(before, after, RoundSummary(round_number=number, reports={})))


def run(step: Momentum, changes: list[float]) -> list[float]:
    """Go from 0 by these changes of each round's mean; return the states."""
    now, found = state(w=[0.0]), []
    for number, change in enumerate(changes, start=1):
        begin(step, number)
        now = stepped(step, now, state(w=now["w"] + np.float32(change)), number)
        found.append(float(now["w"][0]))
    return found


def test_momentum_against_values_by_hand() -> None:
    """m: 1, 0.5 + 1, 0.75 - 2; with dampening 0.5: 1, 0.5 + 0.5, 0.5 - 1."""
    assert run(Momentum(beta=0.5), [1, 1, -2]) == [1, 2.5, 1.25]
    assert run(Momentum(beta=0.5, dampening=0.5), [1, 1, -2]) == [1, 2, 1.5]


def test_the_published_one_lags_behind_a_change_that_goes_on() -> None:
    """After a change of direction, it goes on the old way for six rounds."""
    states = run(Momentum(beta=0.9, dampening=0.9), [1] * 5 + [-1] * 9)
    steps = np.diff([0.0, *states])
    assert (steps[5:11] > 0).all()
    assert steps[11] < 0.1 and steps[13] < 0


def planted_as_float32(before: State, after: State) -> State:
    """Keep the change in float32, and add it."""
    change = np.asarray(after["w"] - before["w"], np.float32)
    return {"w": before["w"] + change}


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_beta_0_changes_no_bit(num_rounds: int) -> None:
    """Nor a negative zero, nor what is lost beside a large number; planted: it is."""
    step = Momentum(beta=0.0)
    for number in range(1, num_rounds + 1):
        begin(step, number)
        made = stepped(step, {"w": BEFORE}, {"w": HARD}, number)
    assert differences(made, {"w": HARD}) == []
    assert differences(planted_as_float32({"w": BEFORE}, {"w": HARD}), made) == ["w"]


def test_one_in_two_places_has_one_memory_and_steps_from_where_it_left() -> None:
    """FedDUM: after the mean, and after the server's training."""
    step = Momentum(beta=0.5)
    begin(step, 1)
    half = stepped(step, state(w=[0.0]), state(w=[2.0]))  # m = 2
    last = stepped(step, state(w=[0.0]), state(w=[3.0]))  # m = 0.5 * 2 + (3 - 2)
    assert (half["w"], last["w"]) == (2.0, 4.0)
    begin(step, 2)
    half = stepped(step, state(w=[4.0]), state(w=[4.0]), 2)  # m = 0.5 * 2
    assert half["w"] == 5.0
    two = Momentum(beta=0.5), Momentum(beta=0.5)
    for each in two:
        begin(each, 1)
    stepped(two[0], state(w=[0.0]), state(w=[2.0]))
    assert stepped(two[1], state(w=[0.0]), state(w=[3.0]))["w"] != 4.0  # Planted


def test_buffers_stay_as_they_were_merged() -> None:
    """A step could make a variance negative."""
    step = Momentum(beta=0.9)
    for number in (1, 2):
        begin(step, number)
        made = stepped(step, state(w=[0.0], b=[9.0]), state(w=[1.0], b=[0.5]), number)
    assert made["b"] == 0.5
    assert made["w"] == pytest.approx(1.9)


def test_round_1_begins_without_another_runs_memory() -> None:
    """A run that goes on keeps it."""
    step = Momentum(beta=0.5)
    first = run(step, [1, 1])
    assert run(step, [1, 1]) == first
    begin(step, 3)
    assert stepped(step, state(w=[0.0]), state(w=[1.0]), 3)["w"] == 1.75


def test_its_memory_is_what_a_checkpoint_holds() -> None:
    """In float64, and nothing else."""
    step, other = Momentum(beta=0.9), Momentum(beta=0.9)
    run(step, [0.1, 0.2])
    assert step.state_dict()["w"].dtype == np.float64
    other.load_state_dict(step.state_dict())
    for each in (step, other):
        begin(each, 3)
    told = state(w=[0.0]), state(w=[1.0])
    assert differences(stepped(step, *told, 3), stepped(other, *told, 3)) == []


@pytest.mark.parametrize("wrong", [{"beta": 1.0}, {"beta": -0.1}, {"dampening": 1}])
def test_numbers_without_a_meaning_are_refused(wrong: Any) -> None:
    """Where they are given."""
    with pytest.raises(ValueError, match="from 0 to below 1"):
        Momentum(**wrong)


def test_a_step_that_nobody_prepared_is_refused() -> None:
    """It does not know buffers from parameters."""
    with pytest.raises(SmartSplitError, match=r"server_steps=\.\.\."):
        stepped(Momentum(), state(w=[0.0]), state(w=[1.0]))
