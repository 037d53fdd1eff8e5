"""Codecs: what crosses a cut goes through both ends' codec, and nothing else does."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flwr_smartsplit import Route
from flwr_smartsplit.device.local_training import Conditions, Outcome
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.edge.codec import CODECS, Crossing, Raw
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import EdgeError
from flwr_smartsplit.types import Status
from tests.device.test_routes import BOTH, HOPS, NEAR, U_SHAPE, Pair
from tests.tasks import client_plan, device_part, differences, initial_state, loader

NUM_STEPS = 3
Between = Callable[[RouteRunner], None]


@dataclass
class Inverting:
    """Writes each bit inverted: read without it, nothing is right."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)

    def encode(self, tensor: Tensor) -> WireTensor:
        """Count, and invert."""
        self.counts["encoded"] += 1
        packed = WireTensor.pack(tensor)
        return replace(packed, data=~packed.data)

    def decode(self, tensor: WireTensor, device: torch.device) -> Tensor:
        """Count, and invert back."""
        self.counts["decoded"] += 1
        return Raw().decode(replace(tensor, data=~tensor.data), device)


@pytest.fixture
def codecs(monkeypatch: pytest.MonkeyPatch) -> list[Inverting]:
    """Add three codecs."""
    made = [Inverting(name) for name in ("one", "two", "three")]
    for codec in made:
        monkeypatch.setitem(CODECS, codec.name, codec)
    return made


class Coded(Pair):
    """Client 0 and two edges, with a codec at each cut."""

    codecs: tuple[str, ...] = ()
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


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Coded]:
    """Start two edges."""
    yield Coded(tmp_path)


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
@pytest.mark.parametrize(
    "route", [Route.split(3, edge=NEAR), U_SHAPE, HOPS, BOTH], ids=str
)
def test_each_cut_has_a_codec_of_its_own_in_both_directions(
    pair: Coded, codecs: list[Inverting], route: Route, between: Between | None
) -> None:
    """A boundary and its gradient at each cut, and each once, though edges relay."""
    pair.between = between
    plain, evaluated = pair.train(route), pair.evaluate(route)
    pair.codecs = tuple(codec.name for codec in codecs)
    assert_same(pair.train(route), plain)
    used = codecs[: len(route.cuts)]
    for codec in used:
        assert codec.counts == {"encoded": 2 * NUM_STEPS, "decoded": 2 * NUM_STEPS}
    again = pair.evaluate(route)
    assert (again.loss, again.metrics) == (evaluated.loss, evaluated.metrics)
    for codec in used:
        assert codec.counts == {"encoded": 3 * NUM_STEPS, "decoded": 3 * NUM_STEPS}
    assert not any(codec.counts for codec in codecs[len(route.cuts) :])


def test_a_codec_that_one_end_forgets_is_seen(
    pair: Coded, codecs: list[Inverting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: gradients are read as if they had been written raw."""
    route = Route.split(3, edge=NEAR)
    plain = pair.train(route)
    pair.codecs = ("one",)
    monkeypatch.setattr(
        Crossing, "encode", lambda self, tensors: tuple(map(WireTensor.pack, tensors))
    )
    outcome = pair.train(route)
    assert outcome.report.status is not Status.OK or (
        differences(outcome.state, plain.state)
    )


def test_a_codec_that_a_place_does_not_know_is_named(pair: Coded) -> None:
    """The client sits the round out."""
    pair.codecs = ("int8",)
    report = pair.train(Route.split(3, edge=NEAR)).report
    assert report.status is Status.EDGE_FAILED
    assert "codec 'int8' is not one of raw" in report.message
    with pytest.raises(EdgeError, match="CODECS"):
        Crossing.at(("int8",), 0)


@pytest.mark.parametrize(
    "route", [Route.whole(), Route.split(3, edge=NEAR), BOTH], ids=str
)
def test_a_place_that_names_its_device_trains_to_the_same_bits(
    pair: Coded, route: Route
) -> None:
    """The neutral one is the CPU; "cpu:0" goes the way of an accelerator."""
    plain, evaluated = pair.train(route), pair.evaluate(route)
    pair.device = torch.device("cpu", 0)
    assert_same(pair.train(route), plain)
    assert pair.evaluate(route).loss == evaluated.loss
