"""Merging: the exact weighted mean, whatever the order and wherever it is summed."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.edge.weighted_mean import WeightedSum, add_states, add_sums, merge

# Sums are exact while all digits of all products lie within 106 bits; these ranges
# (2**-40 to 2**15, 2**20 examples, 8 clients) need 103.
VALUES = st.floats(
    min_value=2.0**-40, max_value=2.0**15, width=32, allow_subnormal=False
)
SIGNED = st.one_of(st.just(0.0), VALUES, VALUES.map(lambda value: -value))
CLIENTS = st.lists(st.tuples(SIGNED, st.integers(1, 2**20)), min_size=1, max_size=8)

Client = tuple[float, int]


def states_of(clients: Sequence[Client]) -> list[tuple[dict[str, Any], int]]:
    """Give every client a state of one value."""
    return [({"w": np.float32([value])}, weight) for value, weight in clients]


def merged_bits(clients: Sequence[Client]) -> bytes:
    """Merge clients in the order given."""
    merged = merge({"w": np.zeros(1, np.float32)}, add_states(states_of(clients)))
    return merged["w"].tobytes()


def exact_mean(clients: Sequence[Client]) -> Fraction:
    """Work the mean out in fractions."""
    total = sum((Fraction(v) * w for v, w in clients), Fraction(0))
    return total / sum(w for _, w in clients)


def careless_bits(clients: Sequence[Client]) -> bytes:
    """Merge as one would without care: one float64 sum."""
    total = sum(value * weight for value, weight in clients)
    return np.float32(total / sum(w for _, w in clients)).tobytes()


# --- exactness ------------------------------------------------------------------------


@given(clients=CLIENTS)
def test_the_sum_is_exact(clients: list[Client]) -> None:
    """The two float64 numbers together are the sum in fractions, and math.fsum's."""
    total = add_states(states_of(clients))["w"]
    exact = sum((Fraction(v) * w for v, w in clients), Fraction(0))
    assert Fraction(float(total.high[0])) + Fraction(float(total.low[0])) == exact
    assert float(total.high[0] + total.low[0]) == math.fsum(v * w for v, w in clients)
    assert total.weight == sum(weight for _, weight in clients)


@given(clients=CLIENTS)
def test_the_mean_is_the_exact_one_to_the_last_place(clients: list[Client]) -> None:
    """Two roundings, of the float64 quotient and of the cast, are all there is."""
    merged = np.frombuffer(merged_bits(clients), np.float32)[0]
    exact = exact_mean(clients)
    nearest = np.float32(float(exact))
    neighbours = {
        float(nearest),
        float(np.nextafter(nearest, np.float32(np.inf))),
        float(np.nextafter(nearest, np.float32(-np.inf))),
    }
    assert float(merged) in neighbours
    half_place = Fraction(float(np.spacing(np.abs(nearest)))) / 2
    assert abs(Fraction(float(merged)) - exact) <= half_place * (1 + Fraction(1, 2**20))


@given(clients=CLIENTS, chance=st.randoms(use_true_random=False))
def test_the_order_of_clients_changes_no_bit(
    clients: list[Client], chance: Any
) -> None:
    """Every permutation gives the same bits."""
    shuffled = list(clients)
    chance.shuffle(shuffled)
    assert merged_bits(shuffled) == merged_bits(clients)


@given(clients=CLIENTS, places=st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_where_a_sum_is_made_changes_no_bit(
    clients: list[Client], places: list[int]
) -> None:
    """Summing some at edges and adding the sums gives the bits of one long sum."""
    groups: dict[int, list[Client]] = {}
    for client, place in zip(clients, places, strict=False):
        groups.setdefault(place, []).append(client)
    current = {"w": np.zeros(1, np.float32)}
    parts = [add_states(states_of(group)) for group in groups.values()]
    for order in itertools.permutations(parts):
        assert merge(current, add_sums(order))["w"].tobytes() == merged_bits(clients)


def test_the_check_of_orders_sees_a_careless_sum() -> None:
    """A plain float64 sum depends on the order, and the check would say so."""
    clients = [(2.0**15, 2**20), (2.0**-40, 1), (-(2.0**15), 2**20), (2.0**-39, 3)]
    orders = list(itertools.permutations(clients))
    assert len({merged_bits(order) for order in orders}) == 1
    assert len({careless_bits(order) for order in orders}) > 1


def test_equal_states_merge_to_themselves() -> None:
    """The mean of one value is that value, whatever the weights."""
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    states = [({"w": values}, weight) for weight in (1, 3, 7, 11, 13, 600)]
    merged = merge({"w": np.zeros_like(values)}, add_states(states))
    assert merged["w"].tobytes() == values.tobytes()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("num_rows", [255, 256, 257, 1024])
def test_large_arrays_are_summed_as_small_ones(num_rows: int, order: Any) -> None:
    """Block by block and in place, whatever their order in memory: the same bits."""
    chance = np.random.default_rng(0)
    states = [
        ({"w": normals(num_rows * 256, k).reshape(num_rows, 256).copy(order)}, weight)
        for k, weight in enumerate(chance.integers(1, 2**20, size=5).tolist())
    ]
    expected = add_sums(
        {"w": WeightedSum.of(state["w"], weight)} for state, weight in states
    )["w"]
    found = add_states(states)["w"]
    assert found.high.tobytes() == expected.high.tobytes()
    assert found.low.tobytes() == expected.low.tobytes()
    assert found.low.any()
    assert found.weight == expected.weight


def test_large_arrays_of_other_shapes_are_refused() -> None:
    """Also if they have as many values, or more."""
    states = [({"w": np.ones(shape)}, 1) for shape in ((2**16, 2), (2**17,))]
    with pytest.raises(ValueError, match=r"shapes \(131072,\) and \(65536, 2\) differ"):
        add_states(states)


# --- names ----------------------------------------------------------------------------


def test_each_name_is_averaged_over_those_who_trained_it() -> None:
    """Who sends only a front does not dilute the tail of the others."""
    front = {"a": np.float32([4])}
    whole = {"a": np.float32([1]), "b": np.float32([5])}
    current = {"a": np.float32([0]), "b": np.float32([0])}
    merged = merge(current, add_states([(front, 1), (whole, 2)]))
    assert merged["a"].tolist() == [2.0]
    assert merged["b"].tolist() == [5.0]


def test_names_nobody_trained_are_the_same_objects_in_the_same_order() -> None:
    """They are not even copied, and the state's order stays."""
    current = {name: np.float32([1]) for name in "cab"}
    merged = merge(current, add_states([({"a": np.float32([3])}, 1)]))
    assert list(merged) == ["c", "a", "b"]
    assert merged["c"] is current["c"]
    assert merged["b"] is current["b"]


def test_merging_changes_none_of_its_arguments() -> None:
    """States and sums can be used again."""
    state = {"w": np.float32([1, 2])}
    sums = add_states([(state, 2)])
    before = {name: value.high.copy() for name, value in sums.items()}
    add_sums([sums, sums])
    merge(state, sums)
    assert state["w"].tolist() == [1, 2]
    assert all((sums[name].high == value).all() for name, value in before.items())


# --- dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([10, 10, 10], [1, 3, 7], 10),
        ([1, 2], [1, 1], 1),
        ([-1, -2], [1, 1], -1),
        ([0, 9], [1, 8], 8),
        ([2**52 + 1, 2**52 + 1], [1, 1], 2**52 + 1),
    ],
)
def test_integer_buffers_are_truncated(
    values: list[int], weights: list[int], expected: int
) -> None:
    """As Flower's average followed by ``load_state_dict``; equal counts stay equal."""
    states = [
        ({"n": np.array(v, np.int64)}, w) for v, w in zip(values, weights, strict=True)
    ]
    merged = merge({"n": np.array(0, np.int64)}, add_states(states))["n"]
    assert merged.dtype == np.int64
    assert merged.shape == ()
    assert int(merged) == expected


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "bool"])
def test_every_dtype_and_shape_comes_back(dtype: str) -> None:
    """The current state says what the merged arrays are."""
    for shape in ((), (0,), (2, 3)):
        array = np.ones(shape, dtype)
        merged = merge({"w": array}, add_states([({"w": array}, 3), ({"w": array}, 2)]))
        assert merged["w"].dtype == array.dtype
        assert merged["w"].shape == shape
        assert (merged["w"] == array).all()


def test_float16_is_rounded_once() -> None:
    """Summing in float64 neither overflows nor rounds on the way."""
    big = np.float16([60000.0])
    near = np.float16([1.0, 1.0009765625])
    merged = merge({"w": big}, add_states([({"w": big}, 1000), ({"w": big}, 24)]))
    assert merged["w"].tolist() == [60000.0]
    states = [({"w": near[:1]}, 1), ({"w": near[1:]}, 2)]
    mean = (1.0 + 2 * 1.0009765625) / 3
    assert merge({"w": near[:1]}, add_states(states))["w"] == np.float16(mean)


DOUBLES = st.floats(2.0**-16, 2.0**8)


@given(
    values=st.lists(
        st.one_of(DOUBLES, DOUBLES.map(lambda v: -v)), min_size=2, max_size=8
    ),
    chance=st.randoms(use_true_random=False),
)
def test_float64_states_do_not_depend_on_the_order_either(
    values: list[float], chance: Any
) -> None:
    """Their products are rounded, once each; the sum of them is exact."""
    pairs = [(value, chance.randint(1, 1000)) for value in values]
    current = {"w": np.zeros(1)}

    def merged() -> float:
        states = [({"w": np.float64([v])}, weight) for v, weight in pairs]
        return float(merge(current, add_states(states))["w"][0])

    first = merged()
    chance.shuffle(pairs)
    assert merged() == first
    scale = max(abs(Fraction(v)) * w for v, w in pairs) / sum(w for _, w in pairs)
    gap = abs(Fraction(first) - exact_mean(pairs))
    assert gap <= scale * len(values) * Fraction(1, 2**52)


# --- against Flower -------------------------------------------------------------------


def normals(size: int, seed: int) -> npt.NDArray[np.float32]:
    """Draw values like those of weights."""
    return np.random.default_rng(seed).normal(scale=0.05, size=size).astype(np.float32)


def test_one_merge_agrees_with_flower() -> None:
    """Identical replies give Flower's average, to 1e-6 of each array's scale.

    Flower multiplies by weight fractions and adds in float32.
    """
    states = [{"w": normals(10_000, k), "b": normals(10, 50 + k)} for k in range(10)]
    weights = [31, 7, 120, 64, 1, 999, 50, 12, 13, 14]
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({n: Array(a) for n, a in state.items()}),
                "metrics": MetricRecord({"num-examples": weight}),
            }
        )
        for state, weight in zip(states, weights, strict=True)
    ]
    theirs = aggregate_arrayrecords(records, "num-examples")
    ours = merge(states[0], add_states(zip(states, weights, strict=True)))
    for name, mine in ours.items():
        gap = np.abs(mine - theirs[name].numpy()).max()
        assert gap <= 1e-6 * np.abs(mine).max()
    assert WeightedSum.of(states[0]["w"], 3).weight == 3
