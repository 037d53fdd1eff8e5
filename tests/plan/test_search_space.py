"""Choices: the front beats all else, keeps to budgets, and grows with them."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_smartsplit.cli.specs import task_of
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import least_bytes, plan_recompute
from flwr_smartsplit.plan.search_space import (
    Choice,
    choice_of,
    choices_of_route,
    front_of_choices,
    recommended_choice,
    routes_worth_a_plan,
    undominated,
)
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    RecomputePlan,
    Rerun,
    Route,
    StepBytes,
    UnitCost,
)

SIZES = st.integers(1, 9)


@st.composite
def units(draw):
    """A unit that can run twice, with a peak of its own."""
    saved, output, flops = draw(SIZES), draw(SIZES), draw(st.integers(0, 9))
    step = StepBytes(
        saved_bytes=saved + output,
        forward_peak_bytes=saved + output,
        rerun_peak_bytes=saved + output,
        passing_peak_bytes=output,
        backward_peak_bytes=saved + output + draw(SIZES),
        output_bytes=output,
        gradient_bytes=output,
        arriving_bytes=output,
        rerun_flops=flops,
    )
    return UnitCost(
        name="",
        parameter_bytes=draw(SIZES),
        buffer_bytes=0,
        gradient_bytes=0,
        optimizer_state_bytes=0,
        saved_bytes=saved,
        boundary_bytes=output,
        forward_flops=flops,
        device_peak_bytes=draw(st.integers(30, 120)),
        waiting_bytes=saved,
        return_bytes=draw(SIZES),
        step=step,
    )


@st.composite
def profiles(draw):
    """A short chain of any costs."""
    made = tuple(draw(st.lists(units(), min_size=1, max_size=6)))
    return ChainProfile(batch_size=1, batch_bytes=1, units=made)


COSTS = st.tuples(SIZES, st.integers(0, 3), st.booleans(), st.integers(0, 3))


@st.composite
def made_choices(draw):
    """Choices with any costs, equal ones among them."""
    return [
        Choice(
            route=Route.split(cut),
            recompute=RecomputePlan((Rerun(0, 1),)) if again else KEEP_ALL,
            peak_bytes=peak,
            extra_flops=extra,
            extra_flops_fraction=0.0,
            boundary_bytes=boundary,
            device_flops_fraction=cut / 100,
        )
        for cut, (peak, extra, again, boundary) in enumerate(
            draw(st.lists(COSTS, max_size=20)), start=1
        )
    ]


@pytest.fixture(scope="module")
def small_cnn():
    """Profile a network whose BatchNorms and ReLUs are worth a rerun."""
    task = task_of("tests.models:small_cnn", input_shape=(3, 12, 12))
    return profile_chain(build_chain(task), batch_size=8, task=task)


def costs_of(choice):
    return choice.peak_bytes, choice.work, choice.boundary_bytes


def as_good(choice, others):
    """Whether some choice is nowhere worse."""
    mine = costs_of(choice)
    return any(
        all(a <= b for a, b in zip(costs_of(other), mine, strict=True))
        for other in others
    )


@given(made_choices())
def test_the_front_has_no_dominated_choice_and_one_as_good_as_each_left_out(choices):
    front = undominated(choices)

    assert not any(a.dominates(b) for a, b in product(front, front))
    assert len({costs_of(choice) for choice in front}) == len(front)
    assert all(as_good(choice, front) for choice in choices)
    assert [c.peak_bytes for c in front] == sorted(c.peak_bytes for c in front)


@given(made_choices())
def test_of_equal_choices_the_deepest_is_kept(choices):
    for kept in undominated(choices):
        equal = [c.route.cuts for c in choices if costs_of(c) == costs_of(kept)]
        assert kept.route.cuts == max(equal)


def test_no_choice_dominates_its_equal():
    equal = Choice(
        route=Route.whole(),
        recompute=KEEP_ALL,
        peak_bytes=1,
        extra_flops=0,
        extra_flops_fraction=0.0,
        boundary_bytes=0,
        device_flops_fraction=1.0,
    )
    less = replace(equal, peak_bytes=0)

    assert not equal.dominates(equal)
    assert less.dominates(equal)
    assert not less.dominates(replace(equal, boundary_bytes=-1))
    rerun = replace(equal, recompute=RecomputePlan((Rerun(0, 1),)))
    assert equal.dominates(rerun)
    assert not replace(rerun, peak_bytes=0).dominates(equal)


@settings(max_examples=40, deadline=None)
@given(profiles(), st.integers(0, 140), st.integers(0, 60))
def test_more_budget_loses_nothing_but_to_what_beats_it(profile, budget, more):
    low = front_of_choices(profile, budget_bytes=budget)
    high = front_of_choices(profile, budget_bytes=budget + more)

    assert all(choice.peak_bytes <= budget for choice in low)
    assert all(
        choice in high or any(other.dominates(choice) for other in high)
        for choice in low
    )
    assert not any(a.dominates(b) for a, b in product(high, high))


@settings(max_examples=40, deadline=None)
@given(profiles())
def test_each_choice_is_what_its_route_and_plan_cost(profile):
    for choice in front_of_choices(profile):
        assert choice == choice_of(profile, choice.route, choice.recompute)
        assert choice.peak_bytes == predicted_peak_bytes(
            profile, choice.route, choice.recompute
        )


@settings(max_examples=40, deadline=None)
@given(profiles(), st.integers(0, 140))
def test_what_is_recommended_fits_and_nothing_in_the_front_takes_less_work(
    profile, budget
):
    front = front_of_choices(profile)
    found = recommended_choice(profile, front, budget_bytes=budget)
    fitting = [choice for choice in front if choice.peak_bytes <= budget]

    if found is None:
        assert not fitting
        return
    assert found.peak_bytes <= budget
    assert found.work <= min(choice.work for choice in fitting)
    plain = [choice for choice in fitting if choice.recompute.is_empty]
    if plain:
        assert found in plain
        deepest = max(choice.device_flops_fraction for choice in plain)
        assert found.device_flops_fraction == deepest


def test_the_extremes_of_a_route_are_there(small_cnn):
    for route in (Route.split(4), Route.whole(), Route.u_shape(2, 4)):
        choices = choices_of_route(small_cnn, route, num_between=2)
        assert choices[0].peak_bytes == least_bytes(small_cnn, route)
        assert choices[-1].recompute.is_empty
        assert len(choices) <= 4


def test_the_shares_of_the_work_are_the_units(small_cnn):
    flops = [unit.forward_flops for unit in small_cnn.units]
    plan = RecomputePlan((Rerun(0, 4),))

    choice = choice_of(small_cnn, Route.split(4), plan)
    assert choice.device_flops_fraction == sum(flops[:4]) / sum(flops)
    assert 0 < choice.extra_flops <= sum(flops[:4])
    assert choice.extra_flops_fraction == choice.extra_flops / sum(flops[:4])
    assert choice.boundary_bytes == small_cnn.units[3].boundary_bytes
    u_shape = choice_of(small_cnn, Route.u_shape(1, 4), KEEP_ALL)
    assert u_shape.device_flops_fraction == (flops[0] + sum(flops[4:])) / sum(flops)
    assert u_shape.boundary_bytes == sum(
        small_cnn.units[cut - 1].boundary_bytes for cut in (1, 4)
    )


def test_units_without_flops_leave_no_division_by_zero(small_cnn):
    first = replace(small_cnn.units[0], forward_flops=0)
    profile = replace(small_cnn, units=(first,))

    choice = choice_of(profile, Route.whole(), KEEP_ALL)
    assert (choice.extra_flops_fraction, choice.device_flops_fraction) == (0.0, 1.0)


@pytest.mark.parametrize("with_u_shapes", [False, True])
def test_routes_left_out_would_add_nothing_to_the_front(small_cnn, with_u_shapes):
    size = len(small_cnn.units)
    every = [*map(Route.split, range(1, size)), Route.whole()]
    if with_u_shapes:
        pairs = product(range(1, size), range(1, size))
        every += [Route.u_shape(a, b) for a, b in pairs if a < b]
    worth = routes_worth_a_plan(small_cnn, with_u_shapes=with_u_shapes)
    front = front_of_choices(small_cnn, with_u_shapes=with_u_shapes)
    exhaustive = undominated(
        choice for route in every for choice in choices_of_route(small_cnn, route)
    )

    assert set(worth) < set(every)
    assert all(as_good(choice, front) for choice in exhaustive)


@settings(max_examples=40, deadline=None)
@given(profiles())
def test_of_every_route_left_out_another_is_as_good_with_nothing_recomputed(profile):
    size = len(profile.units)
    every = [*map(Route.split, range(1, size)), Route.whole()]
    worth = routes_worth_a_plan(profile)
    plain = [choice_of(profile, route, KEEP_ALL) for route in worth]

    for route in every:
        assert as_good(choice_of(profile, route, KEEP_ALL), plain)
    assert len(undominated(plain)) == len(plain)


def test_u_shapes_are_there_if_asked_for(small_cnn):
    without = front_of_choices(small_cnn, num_between=0)
    with_them = front_of_choices(small_cnn, num_between=0, with_u_shapes=True)

    assert not any(choice.route.returns for choice in without)
    assert all(as_good(choice, with_them) for choice in without)


def test_a_recommended_plan_is_made_for_exactly_the_budget(small_cnn):
    whole = Route.whole()
    ends = choices_of_route(small_cnn, whole, num_between=0)
    least, plain = ends[0].peak_bytes, ends[-1].peak_bytes
    assert least < plain
    better = 0
    for budget in range(least, plain, (plain - least) // 7):
        found = recommended_choice(small_cnn, ends, budget_bytes=budget)
        exact = plan_recompute(small_cnn, whole, budget_bytes=budget)
        assert not found.recompute.is_empty
        assert found.work == min(ends[0].work, choice_of(small_cnn, whole, exact).work)
        better += found.work < ends[0].work
    assert better


@pytest.mark.parametrize("budget_bytes", [-1, 1.5, "64MiB", float("nan"), True])
def test_what_is_no_budget_is_refused(small_cnn, budget_bytes):
    with pytest.raises(ValueError, match="whole number of bytes"):
        front_of_choices(small_cnn, budget_bytes=budget_bytes)
    with pytest.raises(ValueError, match="whole number of bytes"):
        recommended_choice(small_cnn, (), budget_bytes=budget_bytes)


def test_a_negative_number_of_budgets_is_refused(small_cnn):
    with pytest.raises(ValueError, match="num_between is -1: give 0 or more"):
        front_of_choices(small_cnn, num_between=-1)
