"""What codecs cost, and which one a link gets."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from flwr_smartsplit import (
    BFloat16,
    Float16,
    Integer,
    Link,
    Packed,
    Raw,
    Route,
    Task,
    TopK,
    predicted_peak_bytes,
)
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.plan.coding import (
    codecs_of,
    coded_profile,
    route_profile,
)
from flwr_smartsplit.plan.search_space import option_of
from flwr_smartsplit.plan.timing import round_seconds, work_of
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.types import (
    ChainProfile,
    Codec,
    DeviceProfile,
    DeviceTraits,
    EdgeProfile,
    TensorCost,
    block_rows,
    codecs,
    wire_bytes,
)
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches

BATCH_SIZE = 6
CODECS: list[Codec] = [
    Packed(),
    Float16(),
    BFloat16(),
    Integer(),
    Integer(bits=4),
    Integer(back_bits=16),
    TopK(),
    TopK(fraction=0.01),
    TopK(fraction=0.2, random_share=0.1),
    TopK(fraction=0.1, values="float16"),
]
OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def network() -> nn.Module:
    """Build a network whose boundaries are larger than its parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def task_with(optimizer: str = "momentum") -> Task:
    """Make the task with an optimizer."""
    return Task(
        model_fn=network,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=OPTIMIZERS[optimizer],
        example_inputs=torch.zeros(1, 3, 16, 16),
        example_targets=torch.arange(5),
    )


@pytest.fixture(scope="module")
def profile() -> ChainProfile:
    """Profile the network once."""
    task = task_with()
    with RouteChecker(task, example_batches(task, batch_size=2)) as checker:
        return profile_chain(checker.chain, batch_size=BATCH_SIZE, task=task)


# --- memory ---------------------------------------------------------------------------


def peaks(optimizer: str, codecs: list[Codec], routes: list[Route]) -> list[Any]:
    """Predict and measure the peaks of routes with each codec at their cuts."""
    task = task_with(optimizer)
    batches = example_batches(task, batch_size=BATCH_SIZE)
    found = []
    with RouteChecker(task, batches, ends=batches[:1]) as checker:
        costs = profile_chain(checker.chain, batch_size=BATCH_SIZE, task=task)
        for codec in codecs:
            for route in routes:
                own = (codec,) * len(route.cuts)
                check = checker.check(route, codecs=own)
                assert check.differences == (), (codec, route)
                coded = route_profile(costs, route, own)
                predicted = predicted_peak_bytes(coded, route)
                found.append((codec, route, predicted, check.measured_peak_bytes))
    return found


@pytest.fixture
def _block_values(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the boundaries of this network take several blocks of rows, or one."""
    size = getattr(request, "param", 2**13)
    monkeypatch.setattr(codecs, "BLOCK_VALUES", size)
    monkeypatch.setattr(codecs, "LEAST_BLOCK_VALUES", size)
    coded_profile.cache_clear()
    yield
    coded_profile.cache_clear()


def assert_predicted(found: list[Any]) -> None:
    """Compare to the byte; ``Packed`` is a bound, since zeros are not known."""
    for codec, route, predicted, measured in found:
        if isinstance(codec, Packed):
            assert predicted >= measured, (codec, route)
        else:
            assert predicted == measured, (str(codec), str(route))


ROUTES = [Route.split(1), Route.split(3), Route.split(7), Route.u_shape(2, 5)]


@pytest.mark.usefixtures("_block_values")
def test_peaks_with_codecs_are_predicted_to_the_byte() -> None:
    """Where coding is the peak, too."""
    codecs = [Packed(), CODECS[5], CODECS[7], CODECS[9]]
    assert_predicted(peaks("momentum", codecs, [Route.split(1), Route.u_shape(2, 5)]))


@pytest.mark.slow
@pytest.mark.usefixtures("_block_values")
@pytest.mark.parametrize("_block_values", [2**13, codecs.BLOCK_VALUES], indirect=True)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_so_they_are_at_every_cut(optimizer: str) -> None:
    """With each optimizer."""
    routes = [*map(Route.split, range(1, 8)), *ROUTES[3:], Route.u_shape(1, 7)]
    assert_predicted(peaks(optimizer, CODECS, routes))


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((32, 16, 8, 8), 4), ((2, 100), 40), ((64, 512, 56, 56), 1), ((8, 0), 4096)],
)
def test_coding_takes_an_eighth_of_a_tensor_at_a_time(
    shape: tuple[int, ...], rows: int
) -> None:
    """Or 4,096 values of a small one, and a row of one whose rows are large."""
    assert block_rows(TensorCost(shape=shape, dtype="float32")) == rows


def test_a_byte_too_few_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: coding a row is forgotten."""
    monkeypatch.setattr(
        "flwr_smartsplit.plan.coding._send_rows", lambda codec, tensor: 0
    )
    coded_profile.cache_clear()
    with pytest.raises(AssertionError):
        assert_predicted(peaks("sgd", [Float16()], [Route.split(1)]))
    coded_profile.cache_clear()


def test_packed_is_never_below(profile: ChainProfile) -> None:
    """Raw is what it is compared with."""
    for cut in range(1, len(profile.units)):
        route = Route.split(cut)
        packed = route_profile(profile, route, (Packed(),))
        assert predicted_peak_bytes(packed, route) >= predicted_peak_bytes(
            profile, route
        )


# --- bytes and seconds ----------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_traffic_is_priced_each_way(profile: ChainProfile, codec: Codec) -> None:
    """By the formulas of the wire, over the micro-batches of a step."""
    for route in ROUTES:
        own = (codec,) * len(route.cuts)
        work = work_of(route_profile(profile, route, own), route)
        ways = []
        for cut in route.cuts:
            (tensor,) = profile.units[cut - 1].crossing
            ways.append(wire_bytes(codec, tensor))
        (up, down), *returning = ways
        for forward, back in returning:
            up, down = up + back, down + forward
        assert work.most_bytes == up + down
        if isinstance(codec, Packed):
            assert work.up_bytes < up or not work.doubtful_bytes
        else:
            assert (work.up_bytes, work.down_bytes) == (up, down)
        option = option_of(route_profile(profile, route, own), route)
        assert option.codecs == own


def test_raw_prices_are_the_plain_ones(profile: ChainProfile) -> None:
    """Not one number changes."""
    size = len(profile.units)
    assert coded_profile(profile, (Raw(),) * (size - 1)) is profile
    assert codecs_of(profile, Route.split(3)) == ()
    assert ChainProfile.from_json(profile.to_json()) == profile


def test_the_codec_of_another_cut_is_not_priced(profile: ChainProfile) -> None:
    """Each route has its own; the first one goes along when the first cut moves."""
    coded = route_profile(profile, Route.u_shape(2, 5), (Integer(), TopK()))
    assert [str(unit.codec) for unit in coded.units] == [
        *("integer:8",) * 4,
        "topk:0.1",
        *("raw",) * 3,
    ]


def test_float64_is_not_rounded(profile: ChainProfile) -> None:
    """It says what would be, and what to do."""
    units = list(profile.units)
    (tensor,) = units[2].crossing
    units[2] = replace(units[2], crossing=(replace(tensor, dtype="float64"),))
    wide = replace(profile, units=tuple(units))
    with pytest.raises(InvalidTask, match=r"after 2 is float64.*integer:8 would round"):
        route_profile(wide, Route.split(3), (Integer(),))
    route_profile(wide, Route.split(3), (Packed(),))


def device(rate: float | None) -> DeviceProfile:
    """Make a device with a link."""
    link = None
    if rate is not None:
        link = Link(up_bytes_per_second=rate, down_bytes_per_second=10 * rate)
    return DeviceProfile(
        client_key="a",
        budget_bytes=None,
        num_examples=60,
        batch_size=BATCH_SIZE,
        traits=DeviceTraits(flops_per_second=1e9, link=link),
    )


EDGES = (EdgeProfile(name="edge", flops_per_second=1e12),)


def test_a_smaller_code_is_faster_where_the_link_is_slow(
    profile: ChainProfile,
) -> None:
    """So that a route with it is chosen."""
    route = Route.split(3)
    seconds = [
        round_seconds(
            work_of(route_profile(profile, route, (codec,)), route),
            device(1e5),
            EDGES[0],
        )
        for codec in (Raw(), Float16(), Integer(), Integer(bits=4))
    ]
    assert seconds == sorted(seconds, reverse=True)  # type: ignore[type-var]
    assert len(set(seconds)) == 4


def test_where_no_gradient_passes_is_in_the_profile(profile: ChainProfile) -> None:
    """Behind a ReLU, and a max-pool of one: there ``Packed`` likely sends half."""
    blocks = [any(t.blocks for t in unit.crossing) for unit in profile.units]
    assert blocks == [False, True, True, False, True, False, False, False]
    for cut, is_smaller in enumerate(blocks[:-1], start=1):
        route = Route.split(cut)
        work = work_of(route_profile(profile, route, (Packed(),)), route)
        assert (work.doubtful_bytes > 0) == is_smaller
        assert work.most_bytes == 2 * work.boundary_bytes
    (tensor,) = profile.units[1].crossing
    work = work_of(route_profile(profile, Route.split(2), (Packed(),)), Route.split(2))
    bits = tensor.num_values // 8
    assert work.up_bytes == tensor.num_bytes // 2 + bits
    assert work.down_bytes == tensor.num_bytes // 2


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_coding_takes_time_at_both_ends(profile: ChainProfile, codec: Codec) -> None:
    """In the FLOPs of a step; those of the model stay, and so does its share."""
    for route in ROUTES:
        plain = work_of(profile, route)
        coded = route_profile(profile, route, (codec,) * len(route.cuts))
        work = work_of(coded, route)
        assert work.model_flops == plain.device_flops
        assert work.coding_flops == work.device_flops - plain.device_flops > 0
        assert work.edge_coding_flops == work.edge_flops - plain.edge_flops >= 0
        assert work.device_fraction == plain.device_fraction
    # What is made here and read there; the other way round where the step returns.
    ends = coded.units[ROUTES[3].cuts[0] - 1].coding, coded.units[4].coding
    assert work.coding_flops == sum(
        (
            ends[0].send_flops + ends[0].receive_back_flops,
            ends[1].receive_flops + ends[1].send_back_flops,
        )
    )
