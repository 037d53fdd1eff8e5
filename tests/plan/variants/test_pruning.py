"""Which channels go: against numbers worked out by hand."""

import numpy as np
import pytest

from flwr_smartsplit.plan.variants.pruning import (
    flat_share,
    kept_channels,
    norms_of,
    pruned,
    share_below,
    weight_at,
)
from flwr_smartsplit.types import (
    WHOLE,
    Axis,
    ChannelGroup,
    Variant,
    groups_under,
    inside,
    width_of,
    within,
)

MADE = Axis("a.weight", 0)
ALSO = Axis("b.weight", 1)  # A transposed convolution's channels out
LINEAR = Axis("c.weight", 0)
STATE = {
    "a.weight": np.arange(1.0, 5.0).reshape(4, 1, 1, 1),  # 1 2 3 4
    "b.weight": np.array([8.0, -7.0, 6.0, -5.0]).reshape(1, 4, 1, 1),
    "c.weight": np.full((4, 2), 0.1),
}
GROUP = ChannelGroup(name="a.weight", size=4, axes=(MADE,), makers=(MADE,))
TIED = ChannelGroup(name="a.weight", size=4, axes=(MADE, ALSO), makers=(MADE, ALSO))
DENSE = ChannelGroup(name="c.weight", size=4, axes=(LINEAR,), makers=(LINEAR,))


def test_v_is_the_parameter_at_its_place() -> None:
    """At ``floor(p * R)`` of all by size, signs aside."""
    names = ["a.weight", "b.weight"]
    found = [weight_at(rate, STATE, names) for rate in (0.0, 0.24, 0.25, 0.5, 0.99)]
    assert found == [1.0, 2.0, 3.0, 5.0, 8.0]


def test_a_layer_loses_as_many_as_its_weights_below_v() -> None:
    """Those of layers whose outputs are added count together; linear layers stay."""
    assert share_below(3.0, GROUP, STATE) == 0.5
    assert share_below(6.0, TIED, STATE) == 5 / 8
    assert share_below(9.0, DENSE, STATE) == 0.0
    assert norms_of(TIED, STATE).tolist() == [9.0, 9.0, 9.0, 9.0]
    assert norms_of(GROUP, STATE).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_lowest_go_in_whole_runs_and_one_stays() -> None:
    """Ties are decided by the second score, then by the order."""
    first, second = np.array([2.0, 1.0, 2.0, 2.0]), np.array([3.0, 9.0, 1.0, 2.0])
    assert kept_channels(GROUP, 0.5, [first, second]) == (0, 3)
    assert kept_channels(GROUP, 0.74, [first, second]) == (0, 3)
    assert kept_channels(GROUP, 1.0, [first]) == (3,)
    runs = ChannelGroup(name="a.weight", size=4, multiple=2, axes=())
    assert kept_channels(runs, 0.5, [first, second]) == (2, 3)
    assert kept_channels(runs, 0.49, [first, second]) == (0, 1, 2, 3)


def test_ranks_go_before_sizes() -> None:
    """And a rate of 0 leaves the model as it is."""
    how = {"parameters": ["a.weight"]}
    ranks = {"a.weight": np.array([4.0, 3.0, 2.0, 1.0])}
    assert pruned([GROUP], 0.5, STATE, ranks=None, **how).kept == {"a.weight": (2, 3)}
    assert pruned([GROUP], 0.5, STATE, ranks=ranks, **how).kept == {"a.weight": (0, 1)}
    assert pruned([GROUP], 0.0, STATE, ranks=ranks, **how) == WHOLE


def test_the_share_above_where_it_stays_the_same() -> None:
    """What is far above 0 counts; of a bulk around 0, which falls away, a part does."""
    assert flat_share(np.array([0.0, 5.0]), np.array([0.1, 0.9])) == 0.9
    found = flat_share(np.array([0.0, 50.0]), np.array([0.8, 0.2]))
    assert (0.4 + 0.2) / 2 <= found < 0.4 + 0.2
    assert flat_share(np.array([-3.0]), np.array([1.0])) == 0.0
    assert flat_share(np.array([3.0]), np.array([1.0])) == 1.0


# --- a variant of a variant -----------------------------------------------------------

BASE = Variant("pruned", {"a.weight": (0, 2, 3)})


def test_a_width_of_a_pruned_model_is_a_share_of_what_is_left() -> None:
    """Said in channels of the whole model, and back."""
    (group,) = groups_under([GROUP], BASE)
    assert group.size == 3
    half = width_of([group], 0.5)
    assert half.kept == {"a.weight": (0, 1)}
    both = within(BASE, half)
    assert both.kept == {"a.weight": (0, 2)}
    assert inside(BASE, both).kept == half.kept
    assert within(BASE, WHOLE) == inside(WHOLE, BASE) == BASE
    assert inside(BASE, BASE).kept == {}


def test_a_group_of_which_one_run_is_left_is_none() -> None:
    """Nothing of it can be left out."""
    assert groups_under([GROUP], Variant("one", {"a.weight": (2,)})) == ()


def test_what_a_smaller_model_has_not_is_refused() -> None:
    """By name."""
    for kept in ({"a.weight": (0, 1)}, {}):
        with pytest.raises(ValueError, match=r"a\.weight.*pruned.*has not"):
            inside(BASE, Variant("other", kept))
