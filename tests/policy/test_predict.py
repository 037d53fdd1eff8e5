"""Prediction: read off the profile, and equal to what a device measures."""

import pytest

from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.model.costs import profile_chain
from flwr_smartsplit.policy.predict import predicted_peak_bytes
from flwr_smartsplit.types import Route
from tests.policy.profiles import chain_of
from tests.runtime.one_round import train
from tests.tasks import BATCH_SIZE, TASK, initial_state, tiny_chain


def test_the_peak_is_that_of_the_last_unit_on_the_device() -> None:
    """Whole takes the last unit's, a split the unit's before its cut."""
    profile = chain_of([3, 5, 4])
    assert predicted_peak_bytes(profile, Route.whole()) == 4
    assert predicted_peak_bytes(profile, Route.split(1)) == 3
    assert predicted_peak_bytes(profile, Route.split(2)) == 5


def test_a_cut_outside_the_chain_is_refused() -> None:
    """The error says how long the chain is."""
    with pytest.raises(InvalidRoute, match="outside a chain of 3 units"):
        predicted_peak_bytes(chain_of([3, 5, 4]), Route.split(3))


def test_a_whole_device_measures_what_was_predicted() -> None:
    """To the byte, for the whole model (cuts: ``runtime/test_training``)."""
    profile = profile_chain(tiny_chain(), batch_size=BATCH_SIZE, task=TASK)
    (reply,) = train([Route.whole()], initial_state())
    assert reply.report.peak_bytes == predicted_peak_bytes(profile, Route.whole())


def test_a_route_that_comes_back_to_the_device_is_refused() -> None:
    """Its two segments live at the same time; one number would be too low."""
    route = Route((1, 2), ("device", "edge", "device"))
    with pytest.raises(InvalidRoute, match="several segments on the device"):
        predicted_peak_bytes(chain_of([3, 5, 4]), route)
    hops = Route((1, 2), ("device", "a", "b"))
    assert predicted_peak_bytes(chain_of([3, 5, 4]), hops) == 3
