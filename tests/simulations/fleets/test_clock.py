"""The clock, against numbers worked out by hand."""

from dataclasses import replace

import pytest

from flwr_smartsplit.plan.coding import route_profile
from flwr_smartsplit.plan.timing import work_of
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    ClientPlan,
    DeviceTraits,
    EdgeProfile,
    Integer,
    Link,
    Move,
    RecomputePlan,
    Replan,
    Rerun,
    Route,
    StepBytes,
    StepReport,
    TensorCost,
    UnitCost,
    Variant,
)
from simulations.experiments.errors import ExperimentError
from simulations.experiments.rows import ClientRow
from simulations.fleets.clock import (
    NOMINAL_FLOPS_PER_SECOND,
    NOMINAL_LINK,
    NOTHING,
    Clock,
    Stretch,
    stretches_of,
)
from simulations.fleets.devices import FleetDevice, Watts


def unit(name, *, flops, parameters, boundary):
    """A unit of which only what time depends on is not 0."""
    return UnitCost(
        name=name,
        parameter_bytes=parameters,
        buffer_bytes=0,
        gradient_bytes=parameters,
        optimizer_state_bytes=0,
        saved_bytes=0,
        boundary_bytes=boundary,
        forward_flops=flops,
        device_peak_bytes=0,
        waiting_bytes=0,
        return_bytes=0,
        step=StepBytes(rerun_flops=flops, can_rerun=True),
    )


PROFILE = ChainProfile(
    batch_size=4,
    batch_bytes=16,
    units=(
        unit("a", flops=100, parameters=10, boundary=40),
        unit("b", flops=200, parameters=20, boundary=8),
        unit("c", flops=300, parameters=30, boundary=0),
    ),
)
PHONE = FleetDevice(
    name="phone",
    budget_bytes=None,
    traits=DeviceTraits(
        flops_per_second=1000,
        link=Link(
            up_bytes_per_second=10, down_bytes_per_second=20, latency_seconds=0.5
        ),
        edge_links={
            "near": Link(
                up_bytes_per_second=40, down_bytes_per_second=80, latency_seconds=0.25
            )
        },
    ),
    speed=(1.0, 0.5),
    watts=Watts(compute=2.0, radio=1.0),
)
CLOCK = Clock(
    profile=PROFILE,
    devices=(PHONE, FleetDevice(name="nominal", budget_bytes=None)),
    edge_flops_per_second=3000,
    edge_watts=10,
)
WHOLE = ClientRow(
    round=1, client_key="0", route="whole", num_steps=2, bytes_down=60, bytes_up=60
)
SPLIT = ClientRow(
    round=1,
    client_key="0",
    route="device[:1] > near[1:]",
    num_steps=2,
    bytes_down=10,
    bytes_up=10,
    edge_bytes_up=80,
    edge_bytes_down=80,
)


def plan(route, *, round_number=1):
    return ClientPlan(
        client_key="0",
        round_number=round_number,
        route=route,
        seed=0,
        edge_addresses={},
    )


def test_a_whole_model_takes_work_both_messages_and_their_latencies():
    """2 steps x 3 x 600 FLOPs; 60 B down at 20 B/s and up at 10; twice 0.5 s."""
    spent = CLOCK.spent(WHOLE)

    assert spent.device_seconds == 3.6
    assert spent.radio_seconds == 3 + 6
    assert spent.waiting_seconds == 1.0
    assert spent.seconds == pytest.approx(13.6)
    assert spent.device_joules == pytest.approx(3.6 * 2 + 9 * 1)
    assert spent.edge_joules == 0


def test_a_split_model_takes_the_edges_work_and_each_steps_exchange_too():
    """An edge does 2 x 3 x 500 FLOPs; there is a link of its own to it."""
    spent = CLOCK.spent(SPLIT)

    assert spent.device_seconds == pytest.approx(0.6)
    assert spent.edge_seconds == pytest.approx(1.0)
    assert spent.radio_seconds == pytest.approx(10 / 20 + 10 / 10 + 80 / 40 + 80 / 80)
    assert spent.waiting_seconds == pytest.approx(2 * 0.5 + 2 * 2 * 0.25)
    assert spent.seconds == pytest.approx(8.1)
    assert spent.device_joules == pytest.approx(0.6 * 2 + 4.5 * 1)
    assert spent.edge_joules == pytest.approx(10)


def test_a_link_gives_what_its_trace_says_in_a_round():
    """Half the rate in every second round: twice the time, the latencies as ever."""
    changing = replace(PHONE, speed=(), link_speed=(1.0, 0.5))
    clock = replace(CLOCK, devices=(changing,))

    first, second, third = (
        clock.spent(replace(SPLIT, round=number)) for number in (1, 2, 3)
    )

    assert second.radio_seconds == 2 * first.radio_seconds == 2 * third.radio_seconds
    assert second.waiting_seconds == first.waiting_seconds
    route = Route.split(1, edge="near")
    steps = [
        clock.step_seconds(plan(route, round_number=number), route, KEEP_ALL)
        for number in (1, 2)
    ]
    assert steps[1] - steps[0] == pytest.approx(40 / 40 + 40 / 80)


def test_a_u_shape_exchanges_twice_in_each_step():
    row = replace(SPLIT, route="device[:1] > near[1:2] > device[2:]")

    spent = CLOCK.spent(row)

    assert spent.waiting_seconds == pytest.approx(2 * 0.5 + 2 * 2 * 2 * 0.25)
    assert spent.device_seconds == pytest.approx(2 * 3 * 400 / 1000)


HOPS = Route.hops((1, 2), edges=("near", "far"))
BETWEEN = EdgeProfile(
    name="far",
    links={
        "near": Link(
            up_bytes_per_second=2, down_bytes_per_second=4, latency_seconds=0.125
        )
    },
)


def test_what_passes_between_edges_takes_the_time_of_their_link():
    """In each of 2 steps 8 B at 4 B/s and back at 2, and twice 0.125 s."""
    row = replace(SPLIT, route=str(HOPS))
    clock = replace(CLOCK, edges=(BETWEEN,))
    plain, spent = CLOCK.spent(row), clock.spent(row)

    assert plain.hop_seconds == 0
    assert spent.hop_seconds == 2 * (2 + 4 + 0.25)
    assert replace(spent, hop_seconds=0) == plain
    assert spent.seconds == plain.seconds + spent.hop_seconds
    assert clock.spent(SPLIT) == CLOCK.spent(SPLIT)
    steps = [each.step_seconds(plan(HOPS), HOPS, KEEP_ALL) for each in (CLOCK, clock)]
    assert steps[1] - steps[0] == pytest.approx(6.25)
    report = StepReport(num_steps=2, sent_bytes=80, received_bytes=80, metrics={})
    told = [each.client_seconds(plan(HOPS), report) for each in (CLOCK, clock)]
    assert told[1] - told[0] == pytest.approx(12.5)


def test_an_edge_without_a_link_of_its_own_is_as_far_as_the_server():
    row = replace(SPLIT, route="device[:1] > far[1:]")

    assert CLOCK.spent(row).radio_seconds == pytest.approx(0.5 + 1 + 80 / 10 + 80 / 20)


def test_a_device_is_as_fast_as_it_really_is_in_that_round():
    assert CLOCK.spent(replace(WHOLE, round=2)).device_seconds == 7.2
    assert CLOCK.spent(replace(WHOLE, round=3)).device_seconds == 3.6


def test_a_device_that_says_nothing_is_the_nominal_one():
    spent = CLOCK.spent(replace(WHOLE, client_key="1"))

    assert spent.device_seconds == 3600 / NOMINAL_FLOPS_PER_SECOND
    assert spent.waiting_seconds == 2 * NOMINAL_LINK.latency_seconds


def test_a_moved_cut_counts_by_the_steps_before_and_after():
    """Two steps on cut 2 and three on cut 1: 2 x 3 x 300 + 3 x 3 x 100 FLOPs here."""
    row = replace(
        SPLIT,
        route="device[:2] > near[2:]",
        num_steps=5,
        moves=({"step": 2, "before": 2, "after": 1, "reason": "less memory"},),
    )

    spent = CLOCK.spent(row)

    assert spent.device_seconds == pytest.approx(2.7)
    assert spent.edge_seconds == pytest.approx((2 * 3 * 300 + 3 * 3 * 500) / 3000)


def test_what_runs_twice_counts_for_the_steps_in_which_it_does():
    """Unit 0 runs again in the last 3 of 5 steps: 100 FLOPs more in each."""
    row = replace(
        SPLIT,
        num_steps=5,
        replans=({"step": 2, "before": "none", "after": "[0:1]", "reason": ""},),
    )

    assert CLOCK.spent(row).device_seconds == pytest.approx((5 * 300 + 3 * 100) / 1000)


def test_a_move_and_a_new_plan_at_one_step_belong_together():
    """The plan of cut 2 reruns what cut 1 has no more: they are never combined."""
    begun = Stretch(
        num_steps=4, route=Route.split(2), recompute=RecomputePlan((Rerun(0, 2),))
    )

    found = stretches_of(
        begun,
        moves=[{"step": 1, "after": 1}],
        replans=[{"step": 1, "after": "none"}],
    )

    assert found == [
        replace(begun, num_steps=1),
        Stretch(num_steps=3, route=Route.split(1), recompute=RecomputePlan()),
    ]


def test_a_step_takes_what_its_route_costs():
    """300 FLOPs here, 1,500 there, 40 B up at 40 B/s and down at 80, twice 0.25 s."""
    route = Route.split(1, edge="near")

    seconds = CLOCK.step_seconds(plan(route), route, RecomputePlan())
    later = CLOCK.step_seconds(plan(route, round_number=2), route, RecomputePlan())

    assert seconds == pytest.approx(0.3 + 0.5 + 1 + 0.5 + 0.5)
    assert later == pytest.approx(seconds + 0.3)


@pytest.mark.parametrize("row", [WHOLE, SPLIT])
def test_strategies_and_reports_are_told_the_same(row):
    """The state of the segments is what the messages of these rows carry."""
    edge = Route.split(1, edge="near")
    report = StepReport(num_steps=2, sent_bytes=80, received_bytes=80, metrics={})
    if row is WHOLE:
        edge, report = Route.whole(), replace(report, sent_bytes=0, received_bytes=0)

    seconds = CLOCK.client_seconds(plan(edge), report)

    assert seconds == pytest.approx(CLOCK.spent(row).seconds)


def test_a_strategy_is_told_of_moves_and_new_plans_too():
    """Down come units 0 and 1, up goes unit 0, and 1 step runs unit 0 twice."""
    report = StepReport(
        num_steps=5,
        metrics={},
        moves=(Move(step=2, before=2, after=1),),
        replans=(Replan(step=4, before="none", after="[0:1]"),),
    )

    seconds = CLOCK.client_seconds(plan(Route.split(2, edge="near")), report)

    work = (2 * 3 * 300 + 3 * 3 * 100 + 100) / 1000 + (2 * 900 + 3 * 1500) / 3000
    assert seconds == pytest.approx(work + 30 / 20 + 10 / 10 + 1.0 + 5 * 0.5)


def test_a_model_of_the_methods_own_takes_the_work_that_it_says():
    spent = CLOCK.spent(replace(WHOLE, step_flops=250.0))

    assert spent.device_seconds == 0.5
    assert spent.seconds == pytest.approx(13.6 - 3.6 + 0.5)


def test_a_variant_takes_what_its_own_chain_costs():
    """In a plan by its costs, in a journal by its FLOPs; another clock would guess."""
    units = (replace(u, forward_flops=u.forward_flops // 2) for u in PROFILE.units)
    half = replace(PROFILE, units=tuple(units))
    clock = replace(CLOCK, costs=lambda variant: half)
    route = Route.split(1, edge="near")
    narrow = replace(plan(route), variant=Variant("half", {"a": (0,)}))
    report = StepReport(num_steps=2, sent_bytes=80, received_bytes=80, metrics={})

    truth = replace(CLOCK, profile=half)
    work = work_of(half, route)
    row = replace(
        SPLIT,
        variant="half",
        step_flops=work.device_flops,
        edge_step_flops=work.edge_flops,
    )

    assert clock.client_seconds(narrow, report) == truth.client_seconds(
        plan(route), report
    )
    assert clock.step_seconds(narrow, route, KEEP_ALL) == truth.step_seconds(
        plan(route), route, KEEP_ALL
    )
    assert CLOCK.spent(row) == truth.spent(SPLIT) != CLOCK.spent(SPLIT)
    with pytest.raises(ExperimentError, match="does not know what 'half' costs"):
        CLOCK.client_seconds(narrow, report)


@pytest.mark.parametrize("status", ["sat_out", "not_sampled", "lost"])
def test_who_made_no_step_took_nothing(status):
    row = ClientRow(round=1, client_key="node 7", status=status, bytes_down=60)

    assert CLOCK.spent(row) == NOTHING


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 3},
        {"bytes_down": 11},
        {"bytes_up": 11},
        {"edge_bytes_up": 81},
        {"edge_bytes_down": 81},
        {"route": "device[:2] > near[2:]"},
        {"recompute": "[0:1]"},
        {"round": 2},
        {"client_key": "1"},
        {"step_flops": 301},
    ],
)
def test_whatever_a_row_says_changes_its_time(change):
    """Else the numbers above could be right by accident."""
    assert CLOCK.spent(replace(SPLIT, **change)).seconds != pytest.approx(8.1)


def test_coding_takes_time_on_the_device_and_on_its_edge():
    """As the same work of training does, in a plan and in the journal."""
    tensor = TensorCost(shape=(4, 100), dtype="float32")
    first = replace(PROFILE.units[0], boundary_bytes=1600, crossing=(tensor,))
    profile = replace(PROFILE, units=(first, *PROFILE.units[1:]))
    clock, route = replace(CLOCK, profile=profile), Route.split(1, edge="near")
    coding = route_profile(profile, route, (Integer(),)).units[0].coding
    here = coding.send_flops + coding.receive_back_flops
    there = coding.receive_flops + coding.send_back_flops

    plain, coded = (
        clock.spent(SPLIT),
        clock.spent(replace(SPLIT, codecs=("integer:8",))),
    )

    assert here > 0
    assert there > 0
    assert coded.device_seconds == pytest.approx(plain.device_seconds + 2 * here / 1000)
    assert coded.edge_seconds == pytest.approx(plain.edge_seconds + 2 * there / 3000)
    assert coded.radio_seconds == plain.radio_seconds
    report = StepReport(num_steps=2, sent_bytes=80, received_bytes=80, metrics={})
    plans = plan(route), replace(plan(route), codecs=(Integer(),))
    raw, rounded = (clock.client_seconds(each, report) for each in plans)
    assert rounded - raw == pytest.approx(coded.seconds - plain.seconds)
