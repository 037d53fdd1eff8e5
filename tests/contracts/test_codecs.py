"""Codecs: each cut has its own, at both ends, in both directions, over every route.

Whatever a codec does, a route computes what the whole model with the crossing in it
computes, bit for bit; a lossless one computes what no codec does.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit import (
    BFloat16,
    Float16,
    Integer,
    Packed,
    Raw,
    Route,
    TopK,
    with_crossing,
)
from flwr_smartsplit.device.local_training import Conditions, Outcome
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.coding import crossing
from flwr_smartsplit.edge.coding.crossing import Crossing
from flwr_smartsplit.edge.tensors import Coded
from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.train.segment_runner import blocks_gradient
from flwr_smartsplit.types import Codec, Status, codec_at
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.device.test_routes import (
    BOTH,
    HOPS,
    NEAR,
    NUM_UNITS,
    U_SHAPE,
    Pair,
    variant,
)
from tests.faults import Deliver
from tests.tasks import (
    BATCH_SIZE,
    TASK,
    client_plan,
    device_part,
    differences,
    initial_state,
    loader,
)

LOSSY: list[Codec] = [
    Float16(),
    BFloat16(),
    Integer(),
    Integer(bits=4, back_bits=16),
    TopK(),
    TopK(fraction=0.3, random_share=0.2),
    TopK(fraction=0.1, values="float16"),
]
MIXED = (Integer(), TopK(fraction=0.2), Packed())
SPLIT = Route.split(3, edge=NEAR)
ROUTES = [SPLIT, U_SHAPE, HOPS, BOTH]
Between = Callable[[RouteRunner], None]


# --- against the whole model ----------------------------------------------------------


def checked(name: str, routes: list[Route], *codecs: Codec) -> list[Any]:
    """List what differs from the model with the crossings in it."""
    task = variant(name)
    with RouteChecker(task, example_batches(task, batch_size=BATCH_SIZE)) as checker:
        checks = [
            checker.check(route, codecs=codecs[: len(route.cuts)]) for route in routes
        ]
    return [found for check in checks for found in check.differences]


@pytest.mark.every(3)
@pytest.mark.parametrize("codec", [Packed(), *LOSSY], ids=str)
def test_split_training_is_the_model_with_the_crossing_in_it(codec: Codec) -> None:
    """Losses, gradients, states and evaluation, with another codec at each cut."""
    routes = [Route.split(4), U_SHAPE, HOPS, BOTH]
    assert checked("momentum", routes, codec, *MIXED) == []


def test_so_it_is_with_all_that_a_step_can_have() -> None:
    """Micro-batches, clipping, a schedule and bfloat16."""
    for codec in (Packed(), Integer(), LOSSY[5]):
        assert checked("all", [BOTH], codec, *MIXED) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "adam", "accumulated, clipped", "all"])
@pytest.mark.parametrize("codec", [Packed(), *LOSSY], ids=str)
def test_so_it_is_at_every_cut(codec: Codec, name: str) -> None:
    """And with each optimizer."""
    assert checked(name, list(map(Route.split, range(1, NUM_UNITS))), codec) == []


def test_the_codec_of_another_cut_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the first cut's codec at both ends of every cut."""
    monkeypatch.setattr(crossing, "codec_at", lambda codecs, _: codec_at(codecs, 0))
    assert checked("momentum", [U_SHAPE], *MIXED) != []


def test_a_codec_that_is_not_used_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the whole model has it, and the route has none."""
    at = Crossing.at
    plain = classmethod(lambda _, opening, *a: at(replace(opening, codecs=()), *a))
    monkeypatch.setattr(Crossing, "at", plain)
    assert checked("momentum", [Route.split(4)], Integer()) != []


# --- against no codec -----------------------------------------------------------------


class WithCodecs(Pair):
    """Client 0 and two edges, with a codec at each cut."""

    codecs: tuple[Codec, ...] = ()
    between: Between | None = None
    device = torch.device("cpu")

    def _parts(self, route: Route) -> Any:
        state = initial_state()
        plan = client_plan(0, route, state, addresses=self.addresses)
        conditions = Conditions(
            task=self.task,
            connect=lambda place, address: self.edges[place].connect(address),
            between_steps=self.between,
            device=self.device,
        )
        plan = replace(plan, codecs=self.codecs[: len(route.cuts)])
        return plan, device_part(state, route), loader(0), conditions

    def steps(self) -> list[Any]:
        """List the tensors that came with each step at any edge."""
        requests = [
            request for edge in self.edges.values() for request in edge.requests
        ]
        return [
            (*getattr(r, "boundary", ()), *getattr(r, "gradients", ()))
            for r in requests
            if isinstance(r, wire.Forward | wire.Backward)
        ]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[WithCodecs]:
    """Start two edges."""
    yield WithCodecs(tmp_path)


def there_and_back(runner: RouteRunner) -> None:
    """Move the first cut before two of the steps."""
    if runner.num_steps in (1, 2):
        runner.move(1 if runner.num_steps == 1 else runner.plan.route.cuts[0])


def assert_same(outcome: Outcome, plain: Outcome) -> None:
    """Compare all that a round leaves."""
    assert outcome.report.status is Status.OK, outcome.report.message
    assert outcome.report.loss == plain.report.loss
    assert outcome.receipts == plain.receipts
    assert differences(outcome.state, plain.state) == []


@pytest.mark.parametrize("between", [None, there_and_back], ids=["stays", "moves"])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_a_lossless_codec_changes_bytes_and_nothing_else(
    pair: WithCodecs, route: Route, between: Between | None
) -> None:
    """Not a bit of training and evaluation; the report says what was saved."""
    pair.between = between
    plain, evaluated = pair.train(route), pair.evaluate(route)
    assert plain.report.plain_sent_bytes == 0
    for codec in (Packed(), TopK(fraction=1.0)):
        pair.codecs = (codec,) * 3
        outcome, again = pair.train(route), pair.evaluate(route)
        assert_same(outcome, plain)
        assert (again.loss, again.metrics) == (evaluated.loss, evaluated.metrics)
        report, raw = outcome.report, plain.report
        assert report.sent_bytes <= raw.sent_bytes
        assert report.received_bytes <= raw.received_bytes
        if isinstance(codec, Packed):
            assert report.plain_sent_bytes == raw.sent_bytes
            assert report.plain_received_bytes == raw.received_bytes
            assert report.sent_bytes < raw.sent_bytes
    pair.codecs = (Raw(),) * 3
    assert_same(pair.train(route), plain)
    assert not any(isinstance(t, Coded) for step in pair.steps()[-3:] for t in step)


@pytest.mark.parametrize("route", [SPLIT, BOTH], ids=str)
@pytest.mark.parametrize("codec", [Packed(), LOSSY[5]], ids=str)
def test_a_step_that_comes_twice_counts_once(
    pair: WithCodecs, route: Route, codec: Codec
) -> None:
    """Nothing is coded again for a repetition."""
    pair.codecs = (codec,) * 3
    plain = pair.train(route)

    def twice(request: Any, deliver: Deliver) -> Any:
        first = deliver(request)
        if isinstance(request, wire.Forward | wire.Backward):
            assert deliver(request) is first
        return first

    for edge in pair.edges.values():
        edge.hook = twice
    assert_same(pair.train(route), plain)


def test_bytes_that_changed_on_the_way_end_the_session(pair: WithCodecs) -> None:
    """The client sits the round out, and the report says why."""
    pair.codecs = (Integer(),)

    def bend(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.Forward) and request.step == 1:
            (sent,) = request.boundary
            short = replace(sent, data=sent.data[:-1])
            request = replace(request, boundary=(short,))
        return deliver(request)

    pair.edges[NEAR].hook = bend
    report = pair.train(SPLIT).report
    assert report.status is Status.EDGE_FAILED
    assert "the codec of this cut is integer:8" in report.message


# --- where no gradient passes ---------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "is_blocking"),
    [
        (nn.ReLU(), True),
        (nn.ReLU(inplace=True), True),
        (nn.ReLU6(), True),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), True),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.Flatten()), True),
        (nn.MaxPool2d(2), False),
        (nn.Hardtanh(), False),
        (nn.LeakyReLU(), False),
        (nn.GELU(), False),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), False),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), False),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), False),
    ],
    ids=str,
)
def test_where_no_gradient_passes_at_zero(make: nn.Module, is_blocking: bool) -> None:
    """What the graph says is what backward does; nothing else is claimed."""
    chance = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, 6, 6, generator=chance).requires_grad_()

    def result() -> Tensor:
        torch.manual_seed(0)
        value: Tensor = make(inputs * 1)
        return value

    value = result()
    assert blocks_gradient(value) is is_blocking
    gradient = torch.randn(value.shape, generator=chance)
    (whole,) = torch.autograd.grad(value, inputs, gradient)
    masked = torch.where(value.detach() == 0, 0, gradient)
    (part,) = torch.autograd.grad(result(), inputs, masked)
    if is_blocking:
        assert torch.equal(whole, part)


def test_whoever_watches_a_gradient_gets_all_of_it() -> None:
    """A hook, or a kept gradient, sees what was not sent; so it is sent."""
    for watch in (lambda t: t.register_hook(lambda g: g), lambda t: t.retain_grad()):
        value = torch.zeros(3, requires_grad=True).relu()
        watch(value)
        assert not blocks_gradient(value)


# --- the model that was trained -------------------------------------------------------


def test_with_crossing_is_the_model_that_was_trained() -> None:
    """It loads the model's state, and gives what an evaluation on the route gives."""
    inputs = torch.randn(4, *TASK.example_inputs.shape[1:])
    state = {name: torch.from_numpy(array) for name, array in initial_state().items()}
    stock = TASK.model_fn()
    stock.load_state_dict(state)
    found = {}
    for codec in (Raw(), Packed(), Integer(bits=4), TopK(fraction=0.05)):
        model = with_crossing(TASK, 3, codec)
        model.load_state_dict(state)
        found[str(codec)] = model.eval()(inputs)
    plain = stock.eval()(inputs)
    assert torch.equal(found["raw"], plain)
    assert torch.equal(found["packed"], plain)
    assert not torch.equal(found["integer:4"], plain)
    assert not torch.equal(found["topk:0.05"], plain)
    with pytest.raises(InvalidRoute, match=r"cut 9 is outside .* one in 1\.\.8"):
        with_crossing(TASK, 9, Integer())


@pytest.mark.parametrize("route", [Route.whole(), SPLIT, BOTH], ids=str)
def test_a_place_that_names_its_device_trains_to_the_same_bits(
    pair: WithCodecs, route: Route
) -> None:
    """The neutral one is the CPU; "cpu:0" goes the way of an accelerator."""
    pair.codecs = MIXED
    plain, evaluated = pair.train(route), pair.evaluate(route)
    pair.device = torch.device("cpu", 0)
    assert_same(pair.train(route), plain)
    assert pair.evaluate(route).loss == evaluated.loss
