"""The steps of a progressive training, and when one ends."""

from typing import Any

import numpy as np
import pytest

from flwr_smartsplit import Movement, Progressive, RoundOutcome, Variant, VariantRequest
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.plan.variants.movement import (
    MAX_SCALARS,
    effective_movement,
    scalars_of,
    slope_of,
)
from flwr_smartsplit.types import WHOLE
from tests.plan.profiles import device

UNITS = {
    "stem": ("stem.weight",),
    "a.0": ("a.0.weight",),
    "a.1": ("a.1.weight",),
    "b": ("b.weight",),
    "c": ("c.weight",),
    "head": ("head.weight",),
}
NAMES = tuple(UNITS)


def offered(rule: Progressive, memory: Any = None) -> Variant:
    """Ask for a step."""
    request = VariantRequest(
        device=device("a"), round_number=1, groups=(), units=UNITS, memory=memory
    )
    (found,) = rule.offered(request)
    return found


def run(rule: Progressive, values: list[float]) -> list[str]:
    """Let rounds end with all parameters at these values; name the steps."""
    memory, names = None, []
    for number, value in enumerate(values, start=1):
        names.append(offered(rule, memory).name)
        state = {name: np.full(2, value) for own in UNITS.values() for name in own}
        memory = rule.learned(
            RoundOutcome(
                round_number=number,
                clients={},
                state=state,
                groups=(),
                units=UNITS,
                memory=memory,
            )
        )
    return names


def test_steps_freeze_what_came_before_and_replace_what_comes_after() -> None:
    """By names, by what they begin with, and by numbers."""
    rule = Progressive(("a", "b", "c"), pace=(1, 1, 1))
    assert rule.steps(NAMES) == (
        Variant("block 1 of 3", proxies=((3, 4), (4, 5))),
        Variant("block 2 of 3", frozen=3, proxies=((4, 5),)),
        Variant("block 3 of 3", frozen=4),
    )
    assert Progressive((3, 4, 5), pace=(1, 1, 1)).steps(NAMES) == rule.steps(NAMES)
    assert Progressive(("c",), pace=(1,)).steps(NAMES) == (WHOLE,)


def test_a_pace_counts_merged_rounds_and_the_last_step_goes_on() -> None:
    """A round in which nobody was merged is not learned from."""
    rule = Progressive((3, 4, 5), pace=(2, 1, 1))
    found = run(rule, [0.0] * 6)
    assert [name.split()[1] for name in found] == ["1", "1", "2", "3", "3", "3"]


def test_a_block_ends_when_its_movement_no_longer_falls() -> None:
    """Movement of 1 in a row has slope 0; of back and forth it falls at first."""
    pace = Movement(window=3, patience=2, slope=0.5)
    straight = run(Progressive((4, 5), pace=pace), [float(n) for n in range(8)])
    assert [name.split()[1] for name in straight] == ["1"] * 5 + ["2"] * 3
    turning = run(Progressive((4, 5), pace=pace), [0, 1, 2, 1, 2, 1, 2, 1, 2])
    assert [name.split()[1] for name in turning] == ["1"] * 7 + ["2"] * 2


def test_bounds_hold_whatever_the_movement() -> None:
    """The most and the least rounds."""
    pace = Movement(window=3, patience=2, slope=0.5, most_rounds=2)
    assert run(Progressive((4, 5), pace=pace), [0.0] * 4)[2] == "block 2 of 2"
    pace = Movement(window=2, patience=1, slope=9.0, least_rounds=5)
    assert run(Progressive((4, 5), pace=pace), [0.0] * 6)[4:] == [
        "block 1 of 2",
        "block 2 of 2",
    ]


def test_effective_movement_is_by_the_l1_norm() -> None:
    """1 straight, 0 back and forth, 0 at rest; L2, planted, gives another number."""
    line = [np.array([n, 2.0 * n]) for n in range(4)]
    assert effective_movement(line) == pytest.approx(1)
    assert effective_movement([line[0], line[1], line[0]]) == 0
    assert effective_movement([line[1]] * 4) == 0
    corner = [np.array([0.0, 0.0]), np.array([1.0, 0.0]), np.array([1.0, 1.0])]
    assert effective_movement(corner) == 1
    l2 = np.linalg.norm(corner[2] - corner[0]) / 2
    assert effective_movement(corner) != pytest.approx(l2)
    half = [np.array([0.0]), np.array([3.0]), np.array([1.5])]
    assert effective_movement(half) == pytest.approx(1 / 3)


def test_few_scalars_of_a_block_are_looked_at() -> None:
    """Evenly, in the order of its parameters."""
    state = {"a": np.arange(3.0), "b": np.arange(25_000.0), "c": np.ones(1)}
    found = scalars_of(state, ("a", "b"))
    assert MAX_SCALARS / 2 < len(found) <= MAX_SCALARS
    assert np.array_equal(found[1:3], [0.0, 3.0])
    assert scalars_of(state, ()).shape == (0,)


def test_a_slope_is_over_a_window_of_length_one() -> None:
    """Whatever the number of values."""
    assert slope_of([0.0, 1.0]) == pytest.approx(1)
    assert slope_of([0.0, 0.5, 1.0]) == pytest.approx(1)
    assert slope_of([1.0, 0.0, 1.0]) == pytest.approx(0)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Progressive(()), "name the last unit"),
        (lambda: Progressive("layer1"), "name the last unit"),  # type: ignore
        (lambda: Progressive((1, 2), pace=(1,)), "each of the 2 blocks"),
        (lambda: Progressive((1, 2), pace=(1, 0)), "each of the 2 blocks"),
        (lambda: Movement(window=1), "window >= 2"),
        (lambda: Movement(least_rounds=3, most_rounds=2), "least_rounds <= most"),
        (lambda: Variant("x", frozen=-1), "freezes -1"),
        (lambda: Variant("x", frozen=3, proxies=((2, 4),)), "proxies for"),
        (lambda: Variant("x", proxies=((2, 2),)), "proxies for"),
        (lambda: Variant("x", {"a": (0,)}, frozen=1), "mixes"),
    ],
)
def test_what_is_no_rule_is_refused(make: Any, problem: str) -> None:
    """When it is made."""
    with pytest.raises(ValueError, match=problem):
        make()


def test_blocks_that_are_none_are_named_with_those_there_are() -> None:
    """So that the next try is right."""
    with pytest.raises(InvalidTask, match=r"'layer9'.*stem, a.0, a.1, b, c\."):
        Progressive(("layer9",), pace=(1,)).steps(NAMES)
