"""SelectByUtility: each factor by hand, edges' memory, and brute force beside it."""

from collections import Counter
from itertools import combinations
from math import log
from random import Random

import numpy as np
import pytest

from flwr_smartsplit.plan.selection.candidates import Candidate
from flwr_smartsplit.plan.selection.history import NO_HISTORY, History
from flwr_smartsplit.plan.selection.selection import EDGES_FULL, Selection
from flwr_smartsplit.plan.selection.utility import (
    SelectByUtility,
    factors_of,
    normalised,
)
from flwr_smartsplit.types import EdgeProfile, Route
from simulations.studies.scale.planning import utility_of
from tests.plan.fleets import candidate, request, seen


def test_factors_are_those_worked_out_by_hand() -> None:
    """Examples x loss; budget over 40 bytes; one over the seconds; rounds to wait."""
    fleet = [
        candidate("a", seconds=(8.0, 2.0), num_examples=10, budget_bytes=10),
        candidate("b", num_examples=20, budget_bytes=400),
        candidate("c", num_examples=30),
    ]
    history = NO_HISTORY.after(
        [seen("a", round_number=2, loss_rms=3.0), seen("b", round_number=4, loss_rms=1)]
    )
    asked = request(fleet, history=history, round_number=5, num_clients=2)
    found = factors_of(fleet, asked)
    # c was never seen: the median loss of the others, 2.
    assert np.exp(found.loss) == pytest.approx([30.0, 20.0, 60.0])
    assert found.memory == pytest.approx([log(0.25), 0.0, 0.0])
    assert found.speed[0] == pytest.approx(-log(2.0))
    assert np.isnan(found.speed[1:]).all()
    # Two of three each round: 2, 0 and 4 rounds are 4/3, 0 and 8/3 turns.
    assert found.waiting == pytest.approx([4 / 3, 0.0, 8 / 3])


def test_normalising_ignores_what_is_unknown() -> None:
    """It counts as average, and does not move the average."""
    found = normalised(np.array([2.0, np.nan, 4.0]))
    assert found.tolist() == [-1.0, 0.0, 1.0]


def test_normalising_what_does_not_differ_gives_zeros() -> None:
    """Not rounding errors blown up."""
    assert normalised(np.array([0.1 + 0.2, 0.3, 0.3])).tolist() == [0, 0, 0]
    assert normalised(np.array([])).tolist() == []
    assert normalised(np.array([np.nan])).tolist() == [0]


def test_outliers_are_cut_off() -> None:
    """At three deviations."""
    found = normalised(np.array([0.0] * 99 + [1e9]))
    assert found.max() == 3.0


# --- SelectByUtility ------------------------------------------------------------------

NOTHING = SelectByUtility(loss=0, memory=0, speed=0, coverage=0, waiting=0)


def keys(selection: Selection) -> list[str]:
    """Name who was chosen."""
    return sorted(each.client_key for each in selection.chosen)


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        (SelectByUtility(loss=1, memory=0, speed=0, coverage=0, waiting=0), "lossy"),
        (SelectByUtility(loss=0, memory=1, speed=0, coverage=0, waiting=0), "roomy"),
        (SelectByUtility(loss=0, memory=0, speed=1, coverage=0, waiting=0), "fast"),
        (SelectByUtility(loss=0, memory=0, speed=0, coverage=1, waiting=0), "even"),
        (SelectByUtility(loss=0, memory=0, speed=0, coverage=0, waiting=1), "waiting"),
    ],
)
def test_each_factor_alone_decides_as_its_name_says(
    rule: SelectByUtility, chosen: str
) -> None:
    """And none of the others does, since its weight is 0."""
    usual = {"seconds": (5.0,), "budget_bytes": 20, "label_counts": (10, 0)}
    special = {
        "lossy": {},
        "roomy": {"budget_bytes": 40},
        "fast": {"seconds": (1.0,)},
        "even": {"label_counts": (5, 5)},
        "waiting": {},
    }
    fleet = [candidate(key, **{**usual, **own}) for key, own in special.items()]
    fleet.append(candidate("other", **{**usual, "label_counts": (0, 10)}))
    history = NO_HISTORY.after(
        seen(
            each.client_key,
            round_number=1 if each.client_key == "waiting" else 4,
            loss_rms=2.0 if each.client_key == "lossy" else 1.0,
        )
        for each in fleet
    )
    found = rule(request(fleet, history=history, round_number=5))
    assert keys(found) == [chosen]
    assert set(found.passed) == {*special, "other"} - {chosen}


def test_labels_that_are_missing_are_looked_for() -> None:
    """Two that complete each other, not the two best ones alone."""
    fleet = [
        candidate("a", label_counts=(20, 0, 0)),
        candidate("b", label_counts=(19, 1, 0)),
        candidate("c", label_counts=(0, 10, 10)),
    ]
    rule = SelectByUtility(loss=0, memory=0, speed=0, waiting=0)
    assert "c" in keys(rule(request(fleet, num_clients=2)))


def test_who_keeps_its_labels_at_home_counts_as_no_gain() -> None:
    """Nothing is guessed; without any, coverage does nothing."""
    silent = [candidate(key) for key in "abc"]
    found = SelectByUtility()(request(silent, num_clients=2))
    assert all("labels +0.00" in each.why for each in found.chosen)


def test_among_equals_chance_decides_and_a_seed_repeats_it() -> None:
    """So without any knowledge it is a uniform sample."""
    fleet = [candidate(key) for key in "abcd"]
    drawn = Counter(
        keys(NOTHING(request(fleet, rng=Random(seed))))[0] for seed in range(400)
    )
    assert set(drawn) == set("abcd")
    assert max(drawn.values()) < 1.4 * min(drawn.values())
    again = [keys(NOTHING(request(fleet, rng=Random(3)))) for _ in range(2)]
    assert again[0] == again[1]


def test_in_time_everybody_takes_part() -> None:
    """Fairness: who waits gets ahead of who is a little better."""
    fleet = [candidate(str(index), num_examples=10 + index) for index in range(9)]
    history, taken = NO_HISTORY, set()
    for number in range(1, 61):
        found = SelectByUtility()(
            request(fleet, num_clients=3, round_number=number, history=history)
        )
        taken |= set(keys(found))
        history = history.after(
            seen(key, round_number=number, num_examples=10 + int(key))
            for key in keys(found)
        )
    assert taken == set(map(str, range(9)))


def test_no_edge_is_ever_asked_for_more_than_it_has() -> None:
    """A cut takes 20 or 30 bytes there; who finds no room gives way to the next."""
    weak = [candidate(f"w{index}", seconds=(9.0, 1.0)) for index in range(3)]
    strong = [candidate("s", seconds=(30.0,))]
    edges = (EdgeProfile(name="x", memory_bytes=45),)
    found = SelectByUtility()(request([*strong, *weak], num_clients=4, edges=edges))
    routes = Counter(each.option.route for each in found.chosen)
    assert routes == {Route.split(2, edge="x"): 2, Route.whole(): 2}
    nobody = (EdgeProfile(name="x", memory_bytes=5),)
    only_cuts = [
        Candidate(each.device, each.space, np.array([1]), np.array([1.0]), 1, 1.0)
        for each in weak
    ]
    found = SelectByUtility()(request(only_cuts, num_clients=2, edges=nobody))
    assert list(found.chosen) == []
    assert set(found.passed.values()) == {EDGES_FULL}


def test_everybody_has_a_reason_with_the_numbers() -> None:
    """Why chosen, and why not, with the rank."""
    fleet = [candidate(str(index), num_examples=10 + index) for index in range(5)]
    found = SelectByUtility()(request(fleet, num_clients=2))
    assert all(each.why.startswith("utility ") for each in found.chosen)
    assert sorted(reason[:22] for reason in found.passed.values()) == [
        f"not chosen: number {rank} o" for rank in (3, 4, 5)
    ]
    assert all("2 were wanted" in reason for reason in found.passed.values())


def random_fleet(seed: int) -> tuple[list[Candidate], History]:
    """Draw a small fleet of very different devices and data."""
    draw = np.random.default_rng(seed)
    classes = int(draw.integers(2, 8))
    shares = draw.dirichlet(np.full(classes, 0.2), size=8)
    counts = 1 + (shares * draw.integers(5, 100, size=(8, 1))).astype(int)
    fleet = [
        candidate(
            str(index),
            seconds=(float(draw.lognormal(0, 2)),),
            num_examples=int(own.sum()),
            label_counts=tuple(own.tolist()),
        )
        for index, own in enumerate(counts)
    ]
    known = [each for each in fleet if draw.random() < 0.7]
    return fleet, NO_HISTORY.after(
        seen(
            each.client_key,
            loss_rms=float(draw.uniform(0.1, 3)),
            round_number=int(draw.integers(1, 5)),
        )
        for each in known
    )


def worst_share(choose: SelectByUtility, *, num_fleets: int) -> float:
    """Compare with every way to choose 3 of 8; return the least share of the best."""
    judge, worst = SelectByUtility(coverage=3.0), 1.0
    for seed in range(num_fleets):
        fleet, history = random_fleet(seed)
        asked = request(fleet, num_clients=3, round_number=6, history=history)
        best = max(
            utility_of(judge, asked, names)
            for names in combinations([str(index) for index in range(8)], 3)
        )
        worst = min(worst, utility_of(judge, asked, keys(choose(asked))) / best)
    return worst


def test_small_fleets_are_within_five_percent_of_the_best_choice() -> None:
    """Of all sets there are; a rule that looks at something else is not."""
    assert worst_share(SelectByUtility(coverage=3.0), num_fleets=60) > 0.95
    assert worst_share(SelectByUtility(coverage=0), num_fleets=60) < 0.95
