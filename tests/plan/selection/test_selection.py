"""Selection: a uniform sample that depends on the seed and on nothing else."""

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.plan.selection.selection import (
    sample_clients,
    select_at_random,
)
from flwr_smartsplit.types import EdgeProfile, Route
from tests.plan.fleets import candidate, request

KEYS = st.lists(st.text(min_size=1, max_size=3), unique=True, max_size=12)


@given(keys=KEYS, num_clients=st.integers(0, 15), seed=st.integers(0, 100))
def test_as_many_as_asked_for_are_drawn_or_all(
    keys: list[str], num_clients: int, seed: int
) -> None:
    """Nobody is invented or drawn twice."""
    chosen = sample_clients(keys, num_clients=num_clients, rng=Random(seed))
    assert chosen <= set(keys)
    assert len(chosen) == min(num_clients, len(keys))


@given(keys=KEYS, num_clients=st.integers(0, 15), seed=st.integers(0, 100))
def test_the_order_of_listing_is_no_matter(
    keys: list[str], num_clients: int, seed: int
) -> None:
    """The same seed draws the same clients from any order."""
    once = sample_clients(keys, num_clients=num_clients, rng=Random(seed))
    again = sample_clients(keys[::-1], num_clients=num_clients, rng=Random(seed))
    assert once == again


def test_everybody_has_the_same_chance() -> None:
    """2,000 draws of 2 of 5 give each about 800."""
    rng = Random(0)
    counts: Counter[str] = Counter()
    for _ in range(2000):
        counts.update(sample_clients(list("abcde"), num_clients=2, rng=rng))
    assert all(700 < counts[key] < 900 for key in "abcde")


def test_the_list_is_left_as_it_was() -> None:
    """Arguments are not sorted in place."""
    keys = ["b", "a"]
    sample_clients(keys, num_clients=1, rng=Random(0))
    assert keys == ["b", "a"]


def test_a_random_selection_takes_each_ones_best_option() -> None:
    """Uniform over clients, and edges' memory counts, too."""
    weak = [candidate(str(index), seconds=(9.0, 1.0)) for index in range(4)]
    edges = (EdgeProfile(name="x", memory_bytes=45),)
    found = select_at_random(request(weak, num_clients=3, edges=edges))
    assert len(found.chosen) == 3
    routes = Counter(each.option.route for each in found.chosen)
    assert routes == {Route.split(2, edge="x"): 2, Route.whole(): 1}
