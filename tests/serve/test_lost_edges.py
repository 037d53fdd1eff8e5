"""What a predictor does when an edge hangs, dies, forgets, or comes back."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import pytest
import torch
from torch import Tensor

from flwr_smartsplit import Predictor, Route
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.grpc import GrpcEdge
from flwr_smartsplit.errors import EdgeUnreachable, RefusedMessage
from tests.edge.hosts.edge_process import EdgeProcess
from tests.edge.hosts.served import ServedEdge
from tests.faults import Deliver, MortalEdge
from tests.serve.whole import batch, difference, predictor, served, whole

ROUTE = Route.split(2)
ZEROS = torch.zeros(4, 3)


def fallback(inputs: Tensor) -> Tensor:
    """Answer as a small model of the device would."""
    return ZEROS[: len(inputs)]


def answers(device: Predictor, seed: int = 0) -> str:
    """Say who answered, and check the answer."""
    found = device.predict(batch(seed))
    if found.is_fallback:
        assert torch.equal(found.outputs, ZEROS)
        return "fallback"
    assert difference(found, whole(batch(seed))) == ""
    return "edge"


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Any]:
    """Make an edge that can be killed."""
    yield MortalEdge(tmp_path / "edge")


def test_a_killed_edge_is_fallen_back_from_and_comes_back(edge: Any) -> None:
    """Without restart of the device: the restarted edge has the state on its disk."""
    with served(edge, route=ROUTE) as (_, offer):
        with predictor(offer, edge, fallback=fallback) as device:
            assert answers(device) == "edge"
            edge.kill()
            assert [answers(device, n) for n in (1, 2)] == ["fallback"] * 2
            edge.restart()
            assert answers(device, 3) == "edge"
            edge.restart()  # Unnoticed: the session is gone.
            assert answers(device, 4) == "edge"
            assert (device.num_batches, device.num_fallbacks) == (5, 2)


def test_without_a_fallback_the_error_is_raised(edge: Any) -> None:
    """And says what is wrong; the next batch tries again."""
    with served(edge, route=ROUTE) as (_, offer):
        with predictor(offer, edge) as device:
            edge.kill()
            with pytest.raises(EdgeUnreachable, match="is dead"):
                device.predict(batch())
            edge.restart()
            assert answers(device) == "edge"


@pytest.mark.parametrize("kind", [wire.OpenSigned, wire.Forward])
def test_a_hanging_edge_is_waited_for_once(edge: Any, kind: type) -> None:
    """Later batches wait for nothing, and ask nothing, until the edge has answered."""
    may_go_on, asked = Event(), []

    def hang(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, kind):
            asked.append(request)
            assert may_go_on.wait(20)
        return deliver(request)

    edge.hook = hang
    with served(edge, route=ROUTE) as (_, offer):
        how = {"fallback": fallback, "timeout_seconds": 0.3}
        with predictor(offer, edge, **how) as device:
            started = monotonic()
            assert answers(device) == "fallback"
            waited = monotonic() - started
            assert 0.3 <= waited < 5
            found = device.predict(batch())
            assert "still not answered" in found.cause
            assert monotonic() - started - waited < 0.3
            assert len(asked) == 1
            may_go_on.set()
            while device._answers.is_waiting:
                pass
            assert answers(device, 2) == "edge"


def test_the_fallback_counts_in_the_cap(edge: Any) -> None:
    """Its tensors are this device's, too."""
    with served(edge, route=ROUTE) as (_, offer):

        def large(inputs: Tensor) -> Tensor:
            return torch.zeros(10**6)[:4]

        with predictor(offer, edge, fallback=large) as device:
            device.predict(batch())
            assert device.peak_bytes == offer.predicted_peak_bytes
            edge.kill()
            device.predict(batch())
            assert device.peak_bytes > 4 * 10**6


@pytest.mark.parametrize(
    "outputs", [None, (), (wire.WireTensor.pack(torch.zeros(3)),)], ids=str
)
def test_outputs_of_another_form_are_refused(edge: Any, outputs: Any) -> None:
    """A dishonest edge cannot crash a device that has a fallback."""

    def lie(request: Any, deliver: Deliver) -> Any:
        is_step = isinstance(request, wire.Forward)
        return wire.Stepped(outputs=outputs) if is_step else deliver(request)

    edge.hook = lie
    with served(edge, route=ROUTE) as (_, offer):
        with predictor(offer, edge) as device:
            with pytest.raises(RefusedMessage, match="not nested"):
                device.predict(batch())


def test_an_edge_that_nobody_named_is_missed(edge: Any) -> None:
    """The device's set-up is wrong, and the cause says so."""
    with served(edge, route=ROUTE) as (_, offer):
        with predictor(offer, fallback=fallback) as device:
            found = device.predict(batch())
            assert "give it that edge" in found.cause


def test_over_grpc_a_stopped_edge_is_fallen_back_from() -> None:
    """The address comes with the offer; the device is given no edge."""
    edge = ServedEdge()
    with served(edge, route=ROUTE) as (serving, offer):
        how = {"fallback": fallback, "timeout_seconds": 1.0}
        with predictor(offer, **how) as device:
            assert answers(device) == "edge"
            (address,) = offer.plan.edge_addresses.values()
            edge.stop(address)
            assert [answers(device, n) for n in (1, 2)] == ["fallback"] * 2
        again = serving.offer(ROUTE, batch_size=4)  # The edge is started again.
        with predictor(again, **how) as device:
            assert answers(device) == "edge"


@pytest.mark.slow
def test_a_process_that_is_killed_and_started_again_answers_again(
    tmp_path: Path,
) -> None:
    """``smartsplit edge`` with TLS and an admin secret, ended as by a power cut."""
    process = EdgeProcess(tmp_path).start()
    edge: GrpcEdge = process.edge()
    with served(edge, route=ROUTE) as (_, offer):
        how = {"fallback": fallback, "timeout_seconds": 2.0}
        with predictor(offer, **how) as device:
            assert answers(device) == "edge"
            process.kill()
            assert answers(device, 1) == "fallback"
            process.start()
            deadline = monotonic() + 60
            while answers(device, 2) == "fallback":
                assert monotonic() < deadline
            assert answers(device, 3) == "edge"
    assert process.stop() == 0
