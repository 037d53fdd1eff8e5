"""Which fronts may run in slices, and what is said of the others."""

import pytest

from flwr_smartsplit import Route
from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.plan.slicing import deepest_sliced_cut, require_sliceable


@pytest.mark.parametrize(
    ("is_samplewise", "deepest"),
    [
        ([True, True, True], 2),
        ([True, False, True], 1),
        ([False, True, True], 0),
        ([True, True, False], 2),
        ([True], 0),
    ],
)
def test_the_front_ends_where_samples_mix(
    is_samplewise: list[bool], deepest: int
) -> None:
    """And before the last unit, since no cut is after that."""
    assert deepest_sliced_cut(is_samplewise) == deepest


UNITS = [True, True, True, False, True]


@pytest.mark.parametrize(
    "route", [Route.split(1), Route.split(3), Route.hops((3, 4), edges=("a", "b"))]
)
def test_a_front_of_samplewise_units_can_be_sliced(route: Route) -> None:
    """Up to the unit that mixes, whatever the edges do."""
    require_sliceable(route, 1, UNITS)


@pytest.mark.parametrize(
    ("route", "reason"),
    [
        (Route.whole(), "the loss, which is one of all samples, is on the device"),
        (Route.u_shape(1, 2), "is on the device"),
        (Route.split(4), "unit 3 is not known to treat.* Cut at 3 or before"),
        (Route.hops((4, 5), edges=("a", "b")), "unit 3"),
    ],
)
def test_other_routes_are_refused_with_the_reason(route: Route, reason: str) -> None:
    """And with what to do instead."""
    with pytest.raises(InvalidRoute, match=reason):
        require_sliceable(route, 2, UNITS)


@pytest.mark.parametrize("slice_size", [0, -1])
def test_a_slice_has_a_sample(slice_size: int) -> None:
    """None is another thing: the whole batch."""
    with pytest.raises(ValueError, match=f"slice_size is {slice_size}: give at least"):
        require_sliceable(Route.split(1), slice_size, UNITS)
