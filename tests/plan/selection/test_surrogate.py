"""The surrogate learns what is planted, and is surer where it has looked."""

import numpy as np

from flwr_smartsplit.plan.selection.surrogate import Surrogate, rewards
from tests.plan.fleets import seen

RNG = np.random.default_rng(0)
PLACES = RNG.normal(size=(60, 2))


def test_rewards_are_examples_times_fall_per_second() -> None:
    """Around the median, in robust deviations, cut off at three."""
    window = [
        seen("a", num_examples=10, loss_drop=1.0, seconds=2.0),
        seen("b", num_examples=10, loss_drop=0.0, seconds=2.0),
        seen("c", num_examples=10, loss_drop=-1.0, seconds=2.0),
        seen("d", num_examples=10**6, loss_drop=1.0),
    ]
    # 5, 0, -5 and a million around 2.5: deviations 2.5, 2.5, 7.5, much; median 5.
    found = rewards(window)
    assert found[:3].round(3).tolist() == [0.337, -0.337, -1.012]
    assert found[3] == 3.0
    assert rewards([seen("a")]).tolist() == [0.0]


def test_what_is_planted_is_found() -> None:
    """The first feature pays, the second does nothing."""
    window = [seen("a", loss_drop=place[0], features=tuple(place)) for place in PLACES]
    new = np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]])
    found = Surrogate(kappa_first=0.0, kappa_last=0.0).bonus(window, new, 5)
    assert found[:2].min() > found[2:].max()


def test_what_was_not_tried_is_worth_a_look() -> None:
    """The same expectation, but farther from everything seen: a higher bound."""
    window = [seen("a", loss_drop=0.0, features=tuple(place)) for place in PLACES]
    new = np.array([[0.0, 0.0], [9.0, 9.0]])
    near, far = Surrogate().bonus(window, new, 5)
    assert far > near


def test_curiosity_fades() -> None:
    """From 2 to 0.5."""
    rule = Surrogate()
    kappas = [rule.kappa(number) for number in (0, 10, 1000)]
    assert kappas[0] == 2.0
    assert 1.0 < kappas[1] < 1.1
    assert abs(kappas[2] - 0.5) < 1e-9
