"""Prediction: read off the profile, and equal to what a device measures."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import RecomputePlan, Rerun, Route
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.plan.profiles import chain_of
from tests.server.one_round import train
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


def test_a_route_over_several_edges_costs_what_its_front_costs() -> None:
    """What lies at edges is not the device's."""
    hops = Route.hops((1, 2), edges=("a", "b"))
    assert predicted_peak_bytes(chain_of([3, 5, 4]), hops) == 3


@pytest.mark.parametrize(
    ("peaks", "updates_last", "peak_bytes"),
    [
        # 8 of the tail, and then 4 batch + 8 front + 16 waiting + 32 of its step.
        ([3, 5, 4], False, 8 + 60),
        # The front's own peak is higher: 8 of the tail, and 100.
        ([100, 5, 4], False, 8 + 100),
        # The tail's 8 bytes of gradients wait for the front's.
        ([100, 5, 4], True, 8 + 100 + 8),
    ],
)
def test_a_route_that_comes_back_costs_both_of_its_parts(
    peaks: list[int], updates_last: bool, peak_bytes: int
) -> None:
    """By hand: the larger of the last segment's step, and the first one's backward."""
    profile = replace(chain_of(peaks), updates_last=updates_last)
    assert predicted_peak_bytes(profile, Route.u_shape(1, 2)) == peak_bytes


def with_a_wide_end() -> nn.Sequential:
    """Make a model whose last segment has its largest parameter."""
    return nn.Sequential(
        *(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()),
        *(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 512), nn.Linear(512, 4)),
    )


def test_where_gradients_are_clipped_the_last_segment_updates_among_all_of_them() -> (
    None
):
    """Its optimizer works while the first segment's gradients are still there."""
    task = Task(
        model_fn=with_a_wide_end,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.Adam, lr=1e-3),
        example_inputs=torch.zeros(1, 16),
        example_targets=torch.zeros(1, dtype=torch.int64),
        max_gradient_norm=1.0,
    )
    with RouteChecker(task, example_batches(task, batch_size=BATCH_SIZE)) as checker:
        size = len(checker.chain)
        profile = profile_chain(checker.chain, batch_size=BATCH_SIZE, task=task)
        for cuts in itertools.combinations(range(1, size), 2):
            route = Route.u_shape(*cuts)
            measured = checker.check(route).measured_peak_bytes
            assert predicted_peak_bytes(profile, route) == measured, route
            plan = RecomputePlan((Rerun(0, cuts[0]),))
            bound = predicted_peak_bytes(profile, route, plan)
            assert bound <= 1.05 * measured, route
