"""Which codecs a cut may have, and which of them a device gets with its route."""

from dataclasses import replace
from functools import partial
from math import inf
from random import Random
from typing import Any

import pytest

from flwr_smartsplit import (
    CodecRequest,
    Constraints,
    Integer,
    Link,
    Packed,
    Raw,
    Route,
    TopK,
    codec_by_rate,
)
from flwr_smartsplit.plan.codec_choice import CodecChoice, chosen_codecs
from flwr_smartsplit.plan.coding import coded_profile
from flwr_smartsplit.plan.rounds import Routing, plan_round
from flwr_smartsplit.plan.routes import deepest_split
from flwr_smartsplit.plan.selection.history import NO_HISTORY, History
from flwr_smartsplit.plan.timing import step_seconds
from flwr_smartsplit.types import (
    ChainProfile,
    Codec,
    DeviceProfile,
    DeviceTraits,
    EdgeProfile,
    RoundPlan,
    TensorCost,
    UnitCost,
)
from tests.plan.fleets import seen

BATCH_SIZE = 4
AS_IT_IS = Constraints(recompute=False)
EDGES = (EdgeProfile(name="edge", flops_per_second=1e12),)
WIDTHS = {"relu": 4000, "conv": 2000, "small": 40, "head": 0}
"""Values of a row after each unit: what no gradient passes at +0, and what it does."""


def unit(name: str, width: int) -> UnitCost:
    """Make a unit of which only traffic, time and peaks count."""
    tensor = TensorCost(
        shape=(BATCH_SIZE, width), dtype="float32", blocks=name == "relu"
    )
    return UnitCost(
        name=name,
        parameter_bytes=400,
        buffer_bytes=0,
        gradient_bytes=400,
        optimizer_state_bytes=0,
        saved_bytes=16,
        boundary_bytes=tensor.num_bytes,
        forward_flops=10**8,
        device_peak_bytes=10**6 * (1 + list(WIDTHS).index(name)),
        waiting_bytes=16,
        return_bytes=32,
        crossing=(tensor,) if width else (),
        static_bytes=800,
        leaving_bytes=tensor.num_bytes,
    )


PROFILE = ChainProfile(
    batch_size=BATCH_SIZE,
    batch_bytes=64,
    units=tuple(unit(name, width) for name, width in WIDTHS.items()),
)


def device(
    rate: float | None,
    *,
    flops_per_second: float | None = 1e9,
    budget_bytes: int | None = None,
) -> DeviceProfile:
    """Make a device with a link."""
    link = None
    if rate is not None:
        link = Link(up_bytes_per_second=rate, down_bytes_per_second=10 * rate)
    return DeviceProfile(
        client_key="a",
        budget_bytes=budget_bytes,
        num_examples=60,
        batch_size=BATCH_SIZE,
        traits=DeviceTraits(flops_per_second=flops_per_second, link=link),
    )


def planned(
    client: DeviceProfile,
    codec: CodecChoice = None,
    *,
    history: History = NO_HISTORY,
    **changes: Any,
) -> RoundPlan:
    """Plan a round of one client."""
    return plan_round(
        [client],
        {BATCH_SIZE: PROFILE},
        round_number=1,
        num_clients=1,
        routing=Routing(
            **{"edges": EDGES, "codec": codec, "constraints": AS_IT_IS, **changes}
        ),
        rng=Random(0),
        history=history,
    )


def taken(
    client: DeviceProfile, codec: CodecChoice = None, **changes: Any
) -> tuple[tuple[int, ...], list[str]]:
    """Return the cuts that a client gets, and their codecs."""
    (assignment,) = planned(client, codec, **changes).assignments
    option = assignment.option
    return option.route.cuts, list(map(str, option.codecs))


# --- what a cut may have --------------------------------------------------------------

BY_RATE = codec_by_rate({1e5: Integer(), 1e6: Packed(), 10: TopK()})


@pytest.mark.parametrize(
    ("rate", "codec"),
    [
        (1e7, Packed()),
        (1e6, Packed()),
        (9e5, Integer()),
        (1e4, TopK()),
        (1.0, TopK()),  # Slower than all: that of the lowest rate
        (None, Packed()),  # Unknown: that of the highest
    ],
)
def test_a_link_gets_the_codec_of_its_rate(rate: float | None, codec: Codec) -> None:
    """The slower direction counts."""
    found = chosen_codecs(BY_RATE, device(rate), PROFILE, EDGES)
    assert found == ((codec,) * 3,)


def test_a_function_sees_route_and_cut() -> None:
    """It is asked for each cut of a route, and what it returns is checked."""
    asked: list[CodecRequest] = []

    def choose(request: CodecRequest) -> Codec | tuple[Codec, ...]:
        asked.append(request)
        return (Integer(), Packed()) if request.crossing_index else TopK()

    route = Route.u_shape(1, 3)
    found = chosen_codecs(choose, device(1e5), PROFILE, EDGES, route=route)
    assert found == ((TopK(), Raw(), Integer()), (TopK(), Raw(), Packed()))
    assert [(r.route, r.crossing_index) for r in asked] == [(route, 0), (route, 1)]
    assert asked[0].link is not None
    with pytest.raises(TypeError, match=r"'int8' is no codec: give Raw\(\)"):
        chosen_codecs(lambda _: "int8", device(1), PROFILE, EDGES)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"\(\) has no codec"):
        chosen_codecs(lambda _: (), device(1), PROFILE, EDGES)


@pytest.mark.parametrize("given", [{}, {-1.0: Raw()}, {float("nan"): Raw()}])
def test_rates_that_are_none_are_refused(given: dict[float, Codec]) -> None:
    """At least one, from 0 on."""
    with pytest.raises(ValueError, match="give at least one"):
        codec_by_rate(given)
    with pytest.raises(TypeError, match="is no codec"):
        codec_by_rate({1.0: "int8"})  # type: ignore[dict-item]


NEAR = EdgeProfile(
    name="near",
    links={"far": Link(up_bytes_per_second=1e4, down_bytes_per_second=1e9)},
)
FAR = EdgeProfile(name="far")
HOPS = Route.hops((1, 2), edges=("near", "far"))


def test_a_hop_gets_the_codec_of_the_link_between_its_edges() -> None:
    """That of the device's link, if nobody knows it."""
    given = partial(chosen_codecs, BY_RATE, device(1e7), PROFILE, route=HOPS)
    assert given((NEAR, FAR)) == ((Packed(), TopK(), Raw()),)
    assert given((replace(NEAR, links={}), FAR)) == ((Packed(), Packed(), Raw()),)


def test_a_slow_link_between_edges_gets_a_smaller_code() -> None:
    """Of several codecs; each edge may be the one that tells of the link."""
    link = NEAR.links["far"]
    fast = replace(link, up_bytes_per_second=1e9)
    flipped = Link(up_bytes_per_second=1e9, down_bytes_per_second=1e4)
    cases = [
        ({"far": link}, {}, ["integer:8", "integer:8"]),
        ({}, {"near": flipped}, ["integer:8", "integer:8"]),
        ({"far": fast}, {}, []),
        ({}, {}, []),
    ]
    for near, far, codecs in cases:
        edges = (replace(NEAR, links=near), replace(FAR, links=far))
        plan = planned(
            device(1e9), (Raw(), Integer()), edges=edges, choose_route=lambda _: HOPS
        )
        (assignment,) = plan.assignments
        assert [str(codec) for codec in assignment.option.codecs][:2] == codecs


# --- by default -----------------------------------------------------------------------

AT_RELU: dict[str, Any] = {"choose_route": lambda _: Route.split(1, edge="edge")}
AT_CONV: dict[str, Any] = {"choose_route": lambda _: Route.split(2, edge="edge")}


def test_packed_is_taken_where_it_saves_time() -> None:
    """Behind a ReLU, over a link that is slow, by a device that knows its speed."""
    assert taken(device(1e4), **AT_RELU) == ((1,), ["packed"])
    assert taken(device(1e9), **AT_RELU) == ((1,), [])
    assert taken(device(1e4), **AT_CONV) == ((2,), [])
    assert taken(device(None), **AT_RELU) == ((1,), [])
    assert taken(device(1e4, flops_per_second=None), **AT_RELU) == ((1,), [])


@pytest.mark.parametrize("codec", [None, codec_by_rate({1e9: Raw(), 0: Integer()})])
def test_a_device_that_tells_its_speed_only_gets_a_code_once_its_link_was_learned(
    codec: CodecChoice,
) -> None:
    """And so it does for the link that its steps had."""
    client, link = (
        device(None),
        Link(up_bytes_per_second=1e4, down_bytes_per_second=1e4),
    )
    assert taken(client, codec, **AT_RELU) == ((1,), [])
    (assignment,) = planned(client, codec, **AT_RELU).assignments
    work = assignment.option.work
    seconds = step_seconds(
        work, flops_per_second=1e9, link=link, edge_flops_per_second=inf
    )
    history = NO_HISTORY.after(
        [seen("a", step_seconds=seconds, work=work, edge="edge")]
    )
    (later,) = planned(client, codec, history=history, **AT_RELU).assignments
    told = replace(client, traits=replace(client.traits, link=link))
    (wanted,) = planned(told, codec, **AT_RELU).assignments
    assert later.option.codecs == wanted.option.codecs != ()
    assert later.option.route == wanted.option.route


def test_the_journal_hears_why() -> None:
    """What the other codec would have taken; nothing where there is no other."""
    (assignment,) = planned(device(1e4), **AT_RELU).assignments
    why = assignment.why.rpartition("; ")[2]
    raw, packed = why.removeprefix("codecs for this cut: ").split(", ")
    assert (raw.split()[0], packed.split()[0]) == ("raw", "packed")
    assert float(raw.split()[1]) > float(packed.split()[1])
    assert packed.split()[1] == f"{assignment.option.seconds:.3g}"
    (assignment,) = planned(device(1e4), **AT_CONV).assignments
    assert "codec" not in assignment.why


def slow_coding(monkeypatch: pytest.MonkeyPatch, flops: int) -> None:
    """Let coding take so many FLOPs for each value."""
    monkeypatch.setattr(
        "flwr_smartsplit.plan.coding._flops_per_value", lambda _: (flops,) * 4
    )
    coded_profile.cache_clear()


def test_coding_that_takes_no_time_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: then it pays on any link. If it takes long, it pays on none."""
    slow_coding(monkeypatch, 0)
    assert taken(device(1e9), **AT_RELU) == ((1,), ["packed"])
    slow_coding(monkeypatch, 10**9)
    assert taken(device(1e4), **AT_RELU) == ((1,), [])
    coded_profile.cache_clear()


@pytest.mark.parametrize("how", [{}, {"choose_route": deepest_split}])
def test_nobody_loses_a_route(how: dict[str, Any]) -> None:
    """What fits as it is fits, whatever ``Packed`` may take."""
    packed = coded_profile(PROFILE, (Packed(),) * 3).units[0].device_peak_bytes
    tight = replace(PROFILE.units[0], leaving_bytes=10**6 - 800)
    units = (tight, *PROFILE.units[1:])
    assert packed == 10**6
    costs = replace(PROFILE, units=units)
    assert coded_profile(costs, (Packed(),) * 3).units[0].device_peak_bytes > 10**6
    plan = partial(
        plan_round,
        [device(1e4, budget_bytes=10**6)],
        {BATCH_SIZE: costs},
        round_number=1,
        num_clients=1,
    )

    def given(codec: CodecChoice) -> Routing:
        return Routing(edges=EDGES, codec=codec, constraints=AS_IT_IS, **how)

    (found,) = plan(routing=given(None), rng=Random(0)).assignments
    assert (found.option.route.cuts, found.option.codecs) == ((1,), ())
    assert plan(routing=given(Packed()), rng=Random(0)).assignments == ()


# --- one of several, with the route ---------------------------------------------------


def test_a_slow_link_gets_a_deeper_cut_or_a_smaller_code() -> None:
    """Whichever is faster, of all that the user accepts."""
    budget = 2 * 10**6  # The last cut and the whole model need more.
    cases = {
        (Raw(),): {1e9: ((1,), []), 1e4: ((2,), [])},
        (Raw(), Packed()): {1e9: ((1,), []), 1e4: ((1,), ["packed"])},
        (Raw(), Integer()): {1e9: ((1,), []), 1e4: ((1,), ["integer:8"])},
        (Packed(), Integer()): {1e3: ((2,), ["integer:8"])},
    }
    for codecs, found in cases.items():
        for rate, expected in found.items():
            client = device(rate, budget_bytes=budget, flops_per_second=1e8)
            assert taken(client, codecs) == expected, (codecs, rate)


def test_of_unknown_speed_the_first_codec_is_taken() -> None:
    """At the deepest cut that fits with it; another one where it does not fit."""
    client = device(1e4, flops_per_second=None, budget_bytes=2 * 10**6)
    assert taken(client, (Integer(), Raw())) == ((2,), ["integer:8"])
    assert taken(client, (Raw(), Integer())) == ((2,), [])


def test_a_link_that_may_carry_little_gets_the_smaller_code() -> None:
    """Of ``Packed``, the most that it may send counts."""
    client = device(1e4, budget_bytes=10**6)
    assert client.traits.link is not None
    most = 2 * 15 * PROFILE.units[0].boundary_bytes + 2 * 400
    link = partial(replace, client.traits.link)

    def limited(num_bytes: int) -> DeviceProfile:
        traits = replace(client.traits, link=link(most_bytes_per_round=num_bytes))
        return replace(client, traits=traits)

    assert taken(limited(most)) == ((1,), ["packed"])
    assert taken(limited(most - 1), (Packed(), Integer())) == ((1,), ["integer:8"])
    (reason,) = planned(limited(most - 1)).skipped.values()
    assert "no route sends so little" in reason
