"""An edge has one copy of its units for everybody who predicts with them."""

from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit import Route, Serving
from flwr_smartsplit.edge.gate.gate import EdgeGate
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge, _edges
from flwr_smartsplit.errors import EdgeError, EdgeFull
from flwr_smartsplit.profile.forward_memory import dry_forward
from flwr_smartsplit.split.build import state_of
from flwr_smartsplit.types import EDGE
from tests.edge.gate.federation import DIGEST, Strategy, make_gate
from tests.serve.whole import batch, difference, predictor, served, whole
from tests.tasks import BATCH_SIZE, TASK

ROUTE = Route.split(2)


def needed_bytes(batch_size: int = BATCH_SIZE) -> int:
    """What one copy takes at the edge, from its opening on."""
    found = dry_forward(TASK, ROUTE, batch_size=batch_size, place=EDGE)
    return max(found.peak_bytes, 2 * found.state_bytes)


def gate_of(serving: Serving) -> EdgeGate:
    """Look into the edge of this process."""
    (address,) = serving._pool._addresses().values()
    return _edges[address][0]


def segments_at(gate: EdgeGate) -> list[nn.Module]:
    """List the units that its sessions run."""
    sessions = [
        session
        for held in gate._runs.values()
        for session in held.service.sessions._open.values()
    ]
    return [session.runner.segment for session in sessions]


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_memory_is_that_of_one_however_many_ask(count: int) -> None:
    """The edge has room for one copy; each device is answered with its own batch."""
    edge = LocalEdge(memory_bytes=needed_bytes())
    with served(edge, route=ROUTE) as (serving, _):
        offers = [serving.offer(ROUTE, batch_size=4) for _ in range(count)]
        devices = [predictor(offer, edge) for offer in offers]
        truths = [whole(batch(seed)) for seed in range(count)]
        found: dict[int, str] = {}

        def ask(index: int) -> None:
            answer = devices[index].predict(batch(index))
            found[index] = difference(answer, truths[index])

        threads = [Thread(target=ask, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == dict.fromkeys(range(count), "")
        gate = gate_of(serving)
        assert gate.load().num_sessions == count
        assert gate.load().reserved_bytes == needed_bytes()
        assert len({id(segment) for segment in segments_at(gate)}) == 1
        for device in devices:
            assert gate.load().reserved_bytes == needed_bytes()
            device.close()
        assert gate.load().reserved_bytes == gate.load().num_sessions == 0


def test_one_byte_less_is_not_enough() -> None:
    """Planted: so the edge above had no more than it needed."""
    edge = LocalEdge(memory_bytes=needed_bytes() - 1)
    with served(edge, route=ROUTE) as (_, offer):
        with pytest.raises(EdgeFull), predictor(offer, edge) as device:
            device.predict(batch())


def test_sessions_that_evaluate_have_a_copy_each(tmp_path: Path) -> None:
    """Planted: without sharing, there is a segment for each, and the count sees it."""
    gate = make_gate(tmp_path)
    strategy = Strategy(gate)
    strategy.hold()
    for predicts in (False, True):
        for client in (0, 1):
            opening = strategy.signed(
                client,
                is_train=False,
                change=lambda o, p=predicts: replace(  # type: ignore[misc]
                    o, predicts=p, session=f"{o.session}/{p}"
                ),
            )
            gate.handle(opening)
    segments = segments_at(gate)
    assert len(segments) == 4
    assert len({id(segment) for segment in segments}) == 3
    assert DIGEST


def test_a_larger_batch_takes_more_and_is_refused_where_that_is_not_there() -> None:
    """What all share is what the largest of them needs."""
    edge = LocalEdge(memory_bytes=needed_bytes(), room_patience_seconds=0.0)
    with served(edge, route=ROUTE) as (serving, small):
        large = serving.offer(ROUTE, batch_size=64)
        assert needed_bytes(64) > needed_bytes()
        with predictor(small, edge) as device, predictor(large, edge) as other:
            assert difference(device.predict(batch()), whole(batch())) == ""
            with pytest.raises(EdgeFull):
                other.predict(batch())
            assert difference(device.predict(batch()), whole(batch())) == ""


class Counting(nn.Module):
    """Counts its calls, in a buffer or in Python, and adds the count."""

    def __init__(self, *, in_buffer: bool) -> None:
        super().__init__()
        self.count: Any = 0
        if in_buffer:
            del self.count
            self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.count, Tensor):
            self.count.add_(1)
        else:
            self.count += 1
        return x + self.count


def counting_in_a_buffer() -> nn.Module:
    """Build a model that changes a tensor when it predicts."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), Counting(in_buffer=True)
    )


def ask_twice(edge: Edge, task: Any) -> list[str]:
    """Let two devices predict in turn, and compare with a whole model for each."""
    torch.manual_seed(0)
    state, differences = state_of(task.model_fn()), []
    with Serving(task, state, (edge,)) as serving:
        offers = [serving.offer(ROUTE, batch_size=4) for _ in range(2)]
        devices = [predictor(offer, edge, task=task) for offer in offers]
        for device in devices:
            found = device.predict(batch())
            differences.append(difference(found, whole(batch(), state, task)))
    return differences


def test_a_model_that_changes_a_tensor_when_it_predicts_is_refused() -> None:
    """Else one device's outputs would depend on what another one sent."""
    task = replace(TASK, model_fn=counting_in_a_buffer)
    with pytest.raises(EdgeError, match=r"changes .*count.* when it predicts"):
        ask_twice(LocalEdge(), task)


def always_in_training() -> nn.Module:
    """Build a model whose BatchNorm never stops to learn."""
    return OddMode()


class OddMode(nn.Module):
    """Keeps its BatchNorm in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8))
        self.norm = nn.BatchNorm1d(8)

    def train(self, mode: bool = True) -> "OddMode":
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x)).relu()


def test_a_model_that_learns_in_evaluation_has_a_copy_for_each_device() -> None:
    """Each device's is as if it had the whole model for itself."""
    task = replace(TASK, model_fn=always_in_training)
    assert ask_twice(LocalEdge(), task) == ["", ""]
