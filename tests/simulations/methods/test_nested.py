"""Nested states, by numbers worked out by hand."""

import numpy as np
import pytest

from flwr_smartsplit.edge.weighted_mean import add_states, merge
from simulations.methods.nested import Share, average_shares, cut_state

WHOLE = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.float32([10, 20, 30]),
}


def test_a_smaller_model_holds_the_first_values_along_every_axis():
    cut = cut_state(WHOLE, {"w": (2, 3), "b": (1,)})

    assert cut["w"].tolist() == [[0, 1, 2], [4, 5, 6]]
    assert cut["b"].tolist() == [10]


def test_what_is_cut_shares_no_memory_with_the_whole():
    cut_state(WHOLE, {"b": (2,)})["b"][0] = 99

    assert WHOLE["b"][0] == 10


def test_each_value_is_the_weighted_mean_of_those_who_hold_it():
    """One client of weight 1 holds 2 x 2, one of weight 3 holds 3 x 3."""
    small = {"w": np.full((2, 2), 4, np.float32)}
    large = {"w": np.full((3, 3), 8, np.float32), "b": np.float32([1, 2, 3])}

    mean = average_shares(
        WHOLE, [Share(state=small, weight=1), Share(state=large, weight=3)]
    )

    assert mean["w"].tolist() == [[7, 7, 8, 3], [7, 7, 8, 7], [8, 8, 8, 11]]
    assert mean["b"].tolist() == [1, 2, 3]
    assert mean["w"].dtype == np.float32


def test_rows_that_a_client_did_not_train_are_not_its_own():
    one = Share(state={"b": np.float32([2, 2, 2])}, weight=1, rows={"b": (0, 2)})
    other = Share(state={"b": np.float32([6, 6, 6])}, weight=1, rows={"b": (2,)})

    assert average_shares(WHOLE, [one, other])["b"].tolist() == [2, 20, 4]


def test_without_any_share_all_stays_as_it_is():
    mean = average_shares(WHOLE, [])

    assert all(np.array_equal(mean[name], WHOLE[name]) for name in WHOLE)


@pytest.mark.parametrize("bend", [0.0, 1e-5])
def test_whole_models_get_the_bits_of_federated_averaging(bend):
    """The package's merge is the truth; a bent value is seen."""
    rng = np.random.default_rng(0)
    states = [
        ({"w": rng.normal(size=(3, 4)).astype(np.float32)}, weight)
        for weight in (3, 5, 7)
    ]
    truth = merge(WHOLE, add_states(states))
    states[1][0]["w"][0, 0] += bend

    mean = average_shares(WHOLE, [Share(state=s, weight=w) for s, w in states])

    assert np.array_equal(mean["w"], truth["w"]) == (bend == 0.0)
