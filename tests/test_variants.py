"""Variants: what is kept of which arrays."""

import pickle
from typing import Any

import numpy as np
import pytest

from flwr_smartsplit import Variant
from flwr_smartsplit.types import (
    WHOLE,
    Axis,
    ChannelGroup,
    kept_problem,
    regions_of,
    width_of,
)

ONE = ChannelGroup(
    name="a.weight",
    size=6,
    multiple=2,
    axes=(Axis("a.weight", 0), Axis("b.weight", 1, 3)),
)
TWO = ChannelGroup(name="b.weight", size=3, axes=(Axis("b.weight", 0),))
GROUPS = (ONE, TWO)


def test_the_whole_model_is_the_variant_that_keeps_all() -> None:
    """The neutral value, equal in every process."""
    assert Variant() == WHOLE == width_of(GROUPS, 1.0)
    assert Variant().leading() == WHOLE
    assert regions_of(GROUPS, WHOLE) == {}


def test_a_variant_is_a_value() -> None:
    """Groups in any order, lists or tuples: equal, with one hash, and pickled."""
    one = Variant("v", {"b": (0,), "a": (1, 2)}, is_scaled=True)
    other = Variant("v", {"a": [1, 2], "b": [0]}, is_scaled=True)  # type: ignore[dict-item]
    assert one == other == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(other)
    assert one != Variant("v", {"b": (0,), "a": (1, 3)}, is_scaled=True)
    assert one != Variant("v", {"b": (0,), "a": (1, 2)})


@pytest.mark.parametrize("channels", [(), (1, 1), (2, 1), (-1, 2), (0.5,), (True,)])
def test_channels_are_increasing_numbers(channels: Any) -> None:
    """A repetition would count a value twice in a merge."""
    with pytest.raises(ValueError, match=r"variant 'v' keeps channels .* of 'a'"):
        Variant("v", {"a": channels})


def test_channels_may_be_numpys_numbers() -> None:
    """As a rule finds them that ranks filters."""
    one = Variant("v", {"a": tuple(np.array([1, 3]))})
    assert one == Variant("v", {"a": (1, 3)})
    assert all(type(channel) is int for channel in one.kept["a"])


def test_variants_of_one_size_have_one_leading_variant() -> None:
    """Their costs are found once."""
    one, other = (width_of(GROUPS, 0.5, shift=shift) for shift in (0, 2))
    assert one != other
    assert one.leading() == other.leading()
    assert one.leading().kept == {"a.weight": (0, 1, 2, 3), "b.weight": (0, 1)}
    assert one.leading() != width_of(GROUPS, 0.3).leading()
    assert one.leading() != width_of(GROUPS, 0.5, is_scaled=True).leading()


def test_a_region_has_the_entries_of_its_channels() -> None:
    """Behind a flattening, several for each channel."""
    regions = regions_of(GROUPS, Variant("v", {"a.weight": (2, 3), "b.weight": (0, 2)}))
    found = {
        n: [None if a is None else a.tolist() for a in r] for n, r in regions.items()
    }
    assert found == {"a.weight": [[2, 3]], "b.weight": [[0, 2], [6, 7, 8, 9, 10, 11]]}


def test_a_group_that_keeps_all_has_no_region() -> None:
    """So its arrays are merged as ever."""
    variant = Variant("v", {"a.weight": tuple(range(6)), "b.weight": (1,)})
    (region,) = regions_of(GROUPS, variant).values()
    assert region[1:] == ()


@pytest.mark.parametrize(
    ("kept", "problem"),
    [
        ({"c.weight": (0,)}, "no channel group 'c.weight'; its groups are a.weight, b"),
        ({"b.weight": (0, 3)}, "'b.weight' has 3 channels, so none is 3"),
        ({"a.weight": (0, 3)}, "by 2, so they are kept in whole runs"),
        ({"a.weight": (0, 1, 2)}, "by 2, so they are kept in whole runs"),
        ({"a.weight": (0, 1, 4, 5), "b.weight": (1,)}, ""),
    ],
)
def test_what_a_model_lacks_is_named(kept: Any, problem: str) -> None:
    """Of a variant made for another one."""
    found = kept_problem(Variant("v", kept), GROUPS)
    assert problem in found
    assert bool(problem) == bool(found)


def test_a_width_keeps_at_least_its_share_in_whole_runs() -> None:
    """And never nothing."""
    assert width_of(GROUPS, 0.5).kept == {"a.weight": (0, 1, 2, 3), "b.weight": (0, 1)}
    assert width_of(GROUPS, 0.01).kept == {"a.weight": (0, 1), "b.weight": (0,)}
    rolled = width_of(GROUPS, 0.3, shift=2)
    assert rolled.kept == {"a.weight": (4, 5), "b.weight": (2,)}
    with pytest.raises(ValueError, match=r"a width is 1\.5"):
        width_of(GROUPS, 1.5)


@pytest.mark.parametrize(
    "variant",
    [
        WHOLE,
        Variant("one", {"a": (3,)}),
        Variant("first", {"a": (0, 1, 2), "b": (0,)}, is_scaled=True),
        Variant("rolled", {"a": (0, 1, 6, 7)}),
        Variant("apart", {"a": (0, 2, 4, 9)}),
    ],
)
def test_a_variant_travels_as_runs_of_channels(variant: Variant) -> None:
    """And comes back the same, also with none next to another."""
    assert Variant.from_lists(variant.to_lists()) == variant


def test_a_window_is_two_numbers_however_wide() -> None:
    """Four where it has come round."""
    group = ChannelGroup(name="a", size=4096, axes=())
    half = Variant("half", {"a": group.share(0.5)})
    rolled = Variant("half", {"a": group.share(0.5, shift=3000)})
    assert half.to_lists()["kept"] == {"a": [0, 2048]}
    assert rolled.to_lists()["kept"] == {"a": [0, 952, 3000, 4096]}


@pytest.mark.parametrize(
    "kept",
    [
        *({"a": []}, {"a": [0]}, {"a": [0, 0]}, {"a": [2, 1]}, {"a": [0, 2, 1, 3]}),
        *({"a": [0, 1, 1, 2]}, {"a": [-1, 2]}, {"a": [0, 2.0]}, {"a": [False, 1]}),
        *({"a": (0, 1)}, {"a": "01"}, {"a": None}, [0, 1], None),
        *({"a": [0, 2**62]}, {str(n): [0, 2**16] for n in range(17)}),
    ],
    ids=lambda kept: str(kept)[:30],
)
def test_forged_runs_are_refused(kept: Any) -> None:
    """And take no memory, however far they say that they go."""
    with pytest.raises(ValueError, match=r"runs of|not a variant's|channels, of"):
        Variant.from_lists({"name": "v", "kept": kept, "is_scaled": False})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": "v", "kept": {}},
        {"name": 1, "kept": {}, "is_scaled": False},
        {"name": "v", "kept": {}, "is_scaled": 1},
        {"name": "v", "kept": {}, "is_scaled": False, "more": 1},
    ],
)
def test_values_of_something_else_are_refused(values: dict[str, Any]) -> None:
    """A field too few, too many, or of another type."""
    with pytest.raises(ValueError, match="not a variant's values"):
        Variant.from_lists(values)


def test_what_is_remembered_does_not_travel() -> None:
    """A hash of text is another one in each process."""
    variant = Variant("v", {"a": (0, 1)})
    hash(variant), variant.leading(), variant.to_lists()
    assert "_hash" in vars(variant)
    assert "_hash" not in vars(pickle.loads(pickle.dumps(variant)))
