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
    dominates,
    extra_work,
    option_of,
    options_of_route,
    recommended_option,
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
    RouteOption,
    StepBytes,
    UnitCost,
    Work,
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


def made_option(cut, peak, extra, again, boundary):
    """Make an option of one cut, with any costs."""
    return RouteOption(
        route=Route.split(cut) if cut else Route.whole(),
        recompute=RecomputePlan((Rerun(0, 1),)) if again else KEEP_ALL,
        peak_bytes=peak,
        work=Work(
            device_flops=cut + extra,
            edge_flops=100 - cut,
            extra_flops=extra,
            boundary_bytes=boundary,
        ),
    )


@st.composite
def made_options(draw):
    """Options with any costs, equal ones among them."""
    costs = draw(st.lists(COSTS, max_size=20))
    return [made_option(cut, *each) for cut, each in enumerate(costs, start=1)]


def front_of(profile, *, budget_bytes=None, num_between=3, with_u_shapes=False):
    """List the options that no other beats, as ``smartsplit plan`` does."""
    return undominated(
        (
            option
            for route in routes_worth_a_plan(profile, with_u_shapes=with_u_shapes)
            for option in options_of_route(profile, route, num_between=num_between)
        ),
        budget_bytes=budget_bytes,
    )


@pytest.fixture(scope="module")
def small_cnn():
    """Profile a network whose BatchNorms and ReLUs are worth a rerun."""
    task = task_of("tests.models:small_cnn", input_shape=(3, 12, 12))
    return profile_chain(build_chain(task), batch_size=8, task=task)


def costs_of(option):
    return option.peak_bytes, extra_work(option), option.work.boundary_bytes


def as_good(option, others):
    """Whether some option is nowhere worse."""
    mine = costs_of(option)
    return any(
        all(a <= b for a, b in zip(costs_of(other), mine, strict=True))
        for other in others
    )


@given(made_options())
def test_the_front_has_no_dominated_option_and_one_as_good_as_each_left_out(options):
    front = undominated(options)

    assert not any(dominates(a, b) for a, b in product(front, front))
    assert len({costs_of(option) for option in front}) == len(front)
    assert all(as_good(option, front) for option in options)
    assert [c.peak_bytes for c in front] == sorted(c.peak_bytes for c in front)


@given(made_options())
def test_of_equal_choices_the_deepest_is_kept(options):
    for kept in undominated(options):
        equal = [c.route.cuts for c in options if costs_of(c) == costs_of(kept)]
        assert kept.route.cuts == max(equal)


def test_no_option_dominates_its_equal():
    equal = made_option(0, 1, 0, False, 0)
    less = replace(equal, peak_bytes=0)

    less_traffic = replace(equal, work=replace(equal.work, boundary_bytes=-1))
    assert not dominates(equal, equal)
    assert dominates(less, equal)
    assert not dominates(less, less_traffic)
    rerun = replace(equal, recompute=RecomputePlan((Rerun(0, 1),)))
    assert dominates(equal, rerun)
    assert not dominates(replace(rerun, peak_bytes=0), equal)


@settings(max_examples=40, deadline=None)
@given(profiles(), st.integers(0, 140), st.integers(0, 60))
def test_more_budget_loses_nothing_but_to_what_beats_it(profile, budget, more):
    low = front_of(profile, budget_bytes=budget)
    high = front_of(profile, budget_bytes=budget + more)

    assert all(option.peak_bytes <= budget for option in low)
    assert all(
        option in high or any(dominates(other, option) for other in high)
        for option in low
    )
    assert not any(dominates(a, b) for a, b in product(high, high))


@settings(max_examples=40, deadline=None)
@given(profiles())
def test_each_option_is_what_its_route_and_plan_cost(profile):
    for option in front_of(profile):
        assert option == option_of(profile, option.route, option.recompute)
        assert option.peak_bytes == predicted_peak_bytes(
            profile, option.route, option.recompute
        )


@settings(max_examples=40, deadline=None)
@given(profiles(), st.integers(0, 140))
def test_what_is_recommended_fits_and_nothing_in_the_front_takes_less_work(
    profile, budget
):
    front = front_of(profile)
    found = recommended_option(profile, front, budget_bytes=budget)
    fitting = [option for option in front if option.peak_bytes <= budget]

    if found is None:
        assert not fitting
        return
    assert found.peak_bytes <= budget
    assert extra_work(found) <= min(map(extra_work, fitting))
    plain = [option for option in fitting if option.recompute.is_empty]
    if plain:
        assert found in plain
        deepest = max(option.work.device_fraction for option in plain)
        assert found.work.device_fraction == deepest


def test_the_extremes_of_a_route_are_there(small_cnn):
    for route in (Route.split(4), Route.whole(), Route.u_shape(2, 4)):
        options = options_of_route(small_cnn, route, num_between=2)
        assert options[0].peak_bytes == least_bytes(small_cnn, route)
        assert options[-1].recompute.is_empty
        assert len(options) <= 4


def test_the_shares_of_the_work_are_the_units(small_cnn):
    flops = [unit.forward_flops for unit in small_cnn.units]
    plan = RecomputePlan((Rerun(0, 4),))

    option = option_of(small_cnn, Route.split(4), plan)
    assert option.work.device_fraction == sum(flops[:4]) / sum(flops)
    assert 0 < option.work.extra_flops <= sum(flops[:4])
    assert option.work.extra_fraction == option.work.extra_flops / sum(flops[:4])
    assert option.work.boundary_bytes == small_cnn.units[3].boundary_bytes
    u_shape = option_of(small_cnn, Route.u_shape(1, 4), KEEP_ALL)
    assert u_shape.work.device_fraction == (flops[0] + sum(flops[4:])) / sum(flops)
    assert u_shape.work.boundary_bytes == sum(
        small_cnn.units[cut - 1].boundary_bytes for cut in (1, 4)
    )


def test_units_without_flops_leave_no_division_by_zero(small_cnn):
    first = replace(small_cnn.units[0], forward_flops=0)
    profile = replace(small_cnn, units=(first,))

    option = option_of(profile, Route.whole(), KEEP_ALL)
    assert (option.work.extra_fraction, option.work.device_fraction) == (0.0, 1.0)


@pytest.mark.parametrize("with_u_shapes", [False, True])
def test_routes_left_out_would_add_nothing_to_the_front(small_cnn, with_u_shapes):
    size = len(small_cnn.units)
    every = [*map(Route.split, range(1, size)), Route.whole()]
    if with_u_shapes:
        pairs = product(range(1, size), range(1, size))
        every += [Route.u_shape(a, b) for a, b in pairs if a < b]
    worth = routes_worth_a_plan(small_cnn, with_u_shapes=with_u_shapes)
    front = front_of(small_cnn, with_u_shapes=with_u_shapes)
    exhaustive = undominated(
        option for route in every for option in options_of_route(small_cnn, route)
    )

    assert set(worth) < set(every)
    assert all(as_good(option, front) for option in exhaustive)


@settings(max_examples=40, deadline=None)
@given(profiles())
def test_of_every_route_left_out_another_is_as_good_with_nothing_recomputed(profile):
    size = len(profile.units)
    every = [*map(Route.split, range(1, size)), Route.whole()]
    worth = routes_worth_a_plan(profile)
    plain = [option_of(profile, route, KEEP_ALL) for route in worth]

    for route in every:
        assert as_good(option_of(profile, route, KEEP_ALL), plain)
    assert len(undominated(plain)) == len(plain)


def test_u_shapes_are_there_if_asked_for(small_cnn):
    without = front_of(small_cnn, num_between=0)
    with_them = front_of(small_cnn, num_between=0, with_u_shapes=True)

    assert not any(option.route.returns for option in without)
    assert all(as_good(option, with_them) for option in without)


def test_a_recommended_plan_is_made_for_exactly_the_budget(small_cnn):
    whole = Route.whole()
    ends = options_of_route(small_cnn, whole, num_between=0)
    least, plain = ends[0].peak_bytes, ends[-1].peak_bytes
    assert least < plain
    better = 0
    for budget in range(least, plain, (plain - least) // 7):
        found = recommended_option(small_cnn, ends, budget_bytes=budget)
        exact = plan_recompute(small_cnn, whole, budget_bytes=budget)
        assert not found.recompute.is_empty
        assert extra_work(found) == min(
            extra_work(ends[0]), extra_work(option_of(small_cnn, whole, exact))
        )
        better += extra_work(found) < extra_work(ends[0])
    assert better


@pytest.mark.parametrize("budget_bytes", [-1, -1.5, "64MiB", float("nan"), True])
def test_what_is_no_budget_is_refused(small_cnn, budget_bytes):
    with pytest.raises(ValueError, match="whole number of bytes"):
        front_of(small_cnn, budget_bytes=budget_bytes)
    with pytest.raises(ValueError, match="whole number of bytes"):
        recommended_option(small_cnn, (), budget_bytes=budget_bytes)


def test_a_negative_number_of_budgets_is_refused(small_cnn):
    with pytest.raises(ValueError, match="num_between is -1: give 0 or more"):
        front_of(small_cnn, num_between=-1)
