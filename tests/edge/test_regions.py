"""Parts of a state: the limits of the merge are FedAvg, bit for bit."""

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from flwr_smartsplit.edge.regions import check_sums, cut_array, cut_state, merge_parts
from flwr_smartsplit.edge.weighted_mean import WeightedSum, add_states, merge
from flwr_smartsplit.errors import EdgeError

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
CURRENT: dict[str, Array] = {
    "a": RNG.normal(size=(8, 6, 3)).astype(np.float32),
    "b": RNG.normal(size=8),
    "h": RNG.normal(size=8).astype(np.float16),
    "c": (RNG.normal(size=(8, 2)) + 1j * RNG.normal(size=(8, 2))).astype(np.complex64),
    "i": RNG.integers(-(2**62), 2**62, 8),
    "t": RNG.integers(0, 2, 8).astype(bool),
    "n": np.array(5),
    "x": np.ones(3, np.float32),
}
CLIENTS: list[tuple[dict[str, Array], int]] = [
    (
        {
            name: (
                array + np.int64(index)
                if array.dtype.kind == "i"
                else (array ^ (index % 2 == 1))
                if array.dtype.kind == "b"
                else (array * (1 + index / 7)).astype(array.dtype)
            )
            for name, array in CURRENT.items()
            if name != "x"
        },
        int(RNG.integers(1, 999)),
    )
    for index in range(9)
]
TRUTH = merge(CURRENT, add_states(CLIENTS))
ROWS = np.arange(8)


def region(rows: Array, columns: Array | None = None) -> dict[str, Any]:
    """Take rows of every array, and columns of one."""
    names = "abhcit"
    return {n: (rows, columns) if n == "a" else (rows,) for n in names}


def share(index: int, regions: Any, weight: int = 0) -> Any:
    """Make the part of one client, whose weight may be another one."""
    state, true_weight = CLIENTS[index]
    cut = cut_state(state, regions)
    return add_states([(cut, weight or true_weight)]), regions


def same(one: Any, other: Any) -> list[str]:
    """Name what differs in a bit."""
    return [
        n
        for n in one
        if one[n].dtype != other[n].dtype or one[n].tobytes() != other[n].tobytes()
    ]


def test_whole_parts_are_the_usual_merge() -> None:
    """Without regions, with explicit ones, and in groups."""
    assert same(merge_parts(CURRENT, [(add_states(CLIENTS), {})]), TRUTH) == []
    explicit = [share(i, region(ROWS, np.arange(6))) for i in range(9)]
    assert same(merge_parts(CURRENT, explicit), TRUTH) == []
    grouped = [
        (add_states(CLIENTS[:4]), {}),
        *(share(i, region(ROWS)) for i in range(4, 9)),
    ]
    assert same(merge_parts(CURRENT, grouped), TRUTH) == []


def test_a_weight_that_is_off_by_one_is_seen() -> None:
    """The planted error: one client counts once more."""
    parts = [share(i, region(ROWS), CLIENTS[i][1] + (i == 3)) for i in range(9)]
    assert {"a", "b", "c"} <= set(same(merge_parts(CURRENT, parts), TRUTH))


def test_permuted_rows_are_put_back() -> None:
    """As where windows roll."""
    order = RNG.permutation(8)
    parts = [share(i, region(order)) for i in range(9)]
    assert same(merge_parts(CURRENT, parts), TRUTH) == []


def test_a_wrong_permutation_is_seen() -> None:
    """The planted error: rows are put back one further."""
    order = RNG.permutation(8)
    parts = [(share(i, region(order))[0], region(np.roll(order, 1))) for i in range(9)]
    assert {"a", "b", "h", "c"} <= set(same(merge_parts(CURRENT, parts), TRUTH))


def test_values_count_for_who_has_them() -> None:
    """Those of all for all, those of the wide for the wide."""
    half = region(np.arange(4), np.array([0, 2]))
    parts = [share(i, {} if i % 2 else half) for i in range(9)]
    merged = merge_parts(CURRENT, parts)
    wide = merge(CURRENT, add_states(CLIENTS[1::2]))
    assert np.array_equal(merged["a"][4:], wide["a"][4:])
    assert np.array_equal(merged["a"][:, 1], wide["a"][:, 1])
    for column in (0, 2):
        assert np.array_equal(merged["a"][:4, column], TRUTH["a"][:4, column])
    assert np.array_equal(merged["n"], TRUTH["n"])
    assert not np.array_equal(wide["a"][:4], TRUTH["a"][:4])


def test_a_mean_is_the_exact_one_rounded() -> None:
    """Computed by hand, in fractions, for three overlapping windows."""
    windows = [np.array([0, 1, 2]), np.array([2, 3, 4]), np.array([1, 2, 7])]
    parts = [share(i, {"b": (w,)}) for i, w in enumerate(windows)]
    merged = merge_parts({"b": CURRENT["b"]}, parts)["b"]
    for row in range(8):
        own = [i for i, window in enumerate(windows) if row in window]
        weights = [CLIENTS[i][1] for i in own]
        total = sum(
            Fraction(float(CLIENTS[i][0]["b"][row])) * CLIENTS[i][1] for i in own
        )
        expected = float(total / sum(weights)) if own else float(CURRENT["b"][row])
        assert merged[row] == expected


def test_what_nobody_has_stays() -> None:
    """In every bit, also signs of zero and what is not finite."""
    assert same(merge_parts(CURRENT, []), CURRENT) == []
    odd = {"b": np.array([-0.0, np.nan, np.inf, 1.0])}
    parts = [(add_states([({"b": np.array([2.0])}, 3)]), {"b": (np.array([3]),)})]
    merged = merge_parts(odd, parts)["b"]
    assert merged.tobytes() == np.array([-0.0, np.nan, np.inf, 2.0]).tobytes()


def test_a_cut_copies_only_what_it_cuts() -> None:
    """Regions are arrays of their own; the rest is shared."""
    regions = {"a": (None, np.array([5, 1]))}
    cut = cut_state(CURRENT, regions)
    assert np.array_equal(cut["a"], CURRENT["a"][:, [5, 1]])
    assert not np.shares_memory(cut["a"], CURRENT["a"])
    assert cut["b"] is CURRENT["b"]
    assert cut_state(CURRENT, {}) is CURRENT
    assert cut_array(CURRENT["n"], None) is CURRENT["n"]


def test_a_sum_of_another_shape_than_its_region_is_an_error() -> None:
    """It must not be broadcast."""
    with pytest.raises(ValueError, match="shape"):
        merge_parts(
            CURRENT, [share(0, region(ROWS[:4])), (share(1, {})[0], region(ROWS[:4]))]
        )


def test_what_no_edge_can_have_summed_is_refused() -> None:
    """Another shape, even one that NumPy would stretch; no weight, or too much."""
    regions = region(ROWS[:4], np.arange(2))
    sums, _ = share(0, regions)
    weight = CLIENTS[0][1]
    check_sums(sums, CURRENT, regions, most_weight=weight)
    check_sums(share(0, {})[0], CURRENT, {}, most_weight=weight)
    for name, each in sums.items():
        high, low = each.high, each.low
        wrongs = [WeightedSum(high, low, 0), WeightedSum(high, low, weight + 1)]
        if high.ndim:  # NumPy would stretch one row over all.
            wrongs += [WeightedSum(high[:1], low[:1], weight)]
            wrongs += [WeightedSum(high, low[:1], weight)]
        for wrong in wrongs:
            with pytest.raises(EdgeError, match=f"an edge's sum of '{name}'"):
                check_sums({name: wrong}, CURRENT, regions, most_weight=weight)
    with pytest.raises(EdgeError, match="'other'"):
        check_sums({"other": sums["b"]}, CURRENT, regions, most_weight=weight)


def test_many_weights_are_divided_by_each() -> None:
    """Each client keeps rows of its own, so that nearly all weights differ."""
    size = 40
    current = {"w": RNG.normal(size=(size, 3))}
    parts, held = [], []
    for index in range(9):
        rows = np.sort(RNG.choice(size, 20, replace=False))
        state = {"w": RNG.normal(size=(size, 3))}
        weight = 2**index
        parts.append(
            (
                {n: WeightedSum.of(a[rows], weight) for n, a in state.items()},
                {"w": (rows,)},
            )
        )
        held.append((rows, state["w"], weight))
    merged = merge_parts(current, parts)["w"]
    for row in range(size):
        own = [(w[row], weight) for rows, w, weight in held if row in rows]
        total = sum(weight for _, weight in own)
        wanted = (
            sum(w * weight for w, weight in own) / total if own else current["w"][row]
        )
        np.testing.assert_allclose(merged[row], wanted, rtol=1e-14)


@pytest.mark.parametrize(
    "rows", [ROWS[:3], ROWS[3:], ROWS[5:6], ROWS[[0, 1, 6, 7]], ROWS[::2]], ids=str
)
@pytest.mark.parametrize("columns", [None, np.arange(2), np.array([0, 5])], ids=str)
def test_runs_of_neighbours_are_cut_as_all_others(rows: Array, columns: Any) -> None:
    """By slices where they are runs: the values are NumPy's, and copies."""
    array = CURRENT["a"]
    at = np.arange(6) if columns is None else columns
    cut = cut_array(array, (rows, columns))
    assert cut.tobytes() == array[np.ix_(rows, at)].tobytes()
    assert not np.shares_memory(cut, array)
    assert cut.flags.c_contiguous
