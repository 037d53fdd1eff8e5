"""Routes that come back to the device, and routes over several edges.

Every kind is the stock step, bit for bit, at the predicted peak; a request that is
delivered twice has the effect of one; what fails anywhere ends in a report.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from flwr_smartsplit import Route, Task
from flwr_smartsplit.device import route_runner as runner_module
from flwr_smartsplit.device.local_training import (
    Conditions,
    Outcome,
    evaluate_locally,
    train_locally,
)
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import nowhere
from flwr_smartsplit.edge.session import Session
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import EdgeUnreachable, InvalidTask
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.types import Status, StepReport
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.faults import Deliver, MortalEdge, lost_reply, tail_files
from tests.tasks import (
    BATCH_SIZE,
    TASK,
    client_plan,
    device_part,
    differences,
    initial_state,
    loader,
    tiny_chain,
)

NUM_UNITS = len(tiny_chain())
PAIRS = list(itertools.combinations(range(1, NUM_UNITS), 2))
NEAR, FAR = "near", "far"
U_SHAPE = Route.u_shape(3, 7, edge=NEAR)
HOPS = Route.hops((3, 7), edges=(NEAR, FAR))
BOTH = Route((2, 4, 7), ("device", NEAR, FAR, "device"))
KINDS = [U_SHAPE, HOPS, BOTH]


def cosine(optimizer: Optimizer, config: Any) -> LRScheduler:
    """Lower the learning rate from step to step."""
    del config
    return CosineAnnealingLR(optimizer, 3)


VARIANTS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "adam": {"optimizer_fn": partial(torch.optim.Adam, lr=0.01)},
    "clipped": {"max_gradient_norm": 0.3},
    "scheduled": {"schedule_fn": cosine},
    "autocast": {"autocast_dtype": torch.bfloat16},
    "accumulated": {"accumulate": 2},
    "accumulated, adam": {
        "accumulate": 3,
        "optimizer_fn": partial(torch.optim.Adam, lr=0.01),
    },
    "accumulated, clipped": {"accumulate": 4, "max_gradient_norm": 0.3},
    "all": {
        "accumulate": 3,
        "max_gradient_norm": 0.3,
        "schedule_fn": cosine,
        "autocast_dtype": torch.bfloat16,
    },
}


def variant(name: str) -> Task:
    """Make the task with one thing more."""
    targets = torch.arange(3)
    return replace(TASK, example_targets=targets, **VARIANTS[name])


def routes_of(name: str) -> list[Route]:
    """List all routes of two cuts for the plain task, and some for the others."""
    pairs = PAIRS if name == "momentum" else PAIRS[::5]
    cuts = [3, 6]
    return [
        Route.whole(),
        *map(Route.split, cuts),
        *(Route.u_shape(*pair) for pair in pairs),
        *(Route.hops(pair, edges=(NEAR, FAR)) for pair in pairs),
        BOTH,
    ]


# --- the numbers ----------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_route_is_the_stock_step(name: str) -> None:
    """Loss, every gradient, state and evaluation; and the peak is the predicted one.

    Under autocast the peak is not compared: fake tensors take other kernels than
    bfloat16 ones (docs/memory-model.md). With micro-batches of two sizes the larger one
    is predicted with all gradients, though the first has none: never below.
    """
    task = variant(name)
    with RouteChecker(task, example_batches(task, batch_size=BATCH_SIZE)) as checker:
        profile = profile_chain(checker.chain, batch_size=BATCH_SIZE, task=task)
        for route in routes_of(name):
            check = checker.check(route)
            assert check.differences == (), route
            if task.autocast_dtype is None:
                expected = predicted_peak_bytes(profile, route)
                assert check.measured_peak_bytes <= expected, route
                if BATCH_SIZE % task.accumulate == 0:
                    assert check.measured_peak_bytes == expected, route


def bent(value: Any) -> Any:
    """Change the last bit of one number."""
    tensor = value.unpack()
    flat = tensor.view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    return type(value).pack(tensor)


@pytest.mark.parametrize("route", KINDS, ids=str)
def test_a_last_bit_that_changes_between_places_is_seen(
    route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted error in what an edge sends on, or back."""
    returned = Session._returned

    def bend(session: Session, *args: Any) -> wire.Stepped:
        stepped = returned(session, *args)
        return replace(stepped, gradients=tuple(map(bent, stepped.gradients)))

    monkeypatch.setattr(Session, "_returned", bend)
    task = variant("momentum")
    with RouteChecker(task, example_batches(task, batch_size=BATCH_SIZE)) as checker:
        assert checker.check(route).differences


def test_a_norm_that_leaves_a_place_out_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A planted error: each device clips by the norm of what it holds itself."""
    total = runner_module.total_norm

    def partial_norm(norms: dict[str, float], *where: Any) -> float:
        return total(dict(list(norms.items())[:1]), *where)

    monkeypatch.setattr(runner_module, "total_norm", partial_norm)
    task = variant("clipped")
    with RouteChecker(task, example_batches(task, batch_size=BATCH_SIZE)) as checker:
        assert checker.check(HOPS).differences


def test_parameters_of_two_types_cannot_be_clipped_together() -> None:
    """torch does not add their norms up either."""
    task = Task(
        model_fn=TwoTypes,
        loss_fn=nn.functional.mse_loss,
        optimizer_fn=partial(torch.optim.SGD, lr=0.1),
        example_inputs=torch.zeros(1, 4),
        example_targets=torch.zeros(1, 2),
        max_gradient_norm=1.0,
    )
    conditions = Conditions(task=task, connect=lambda *_: None)  # type: ignore[arg-type]
    state = {n: t.numpy() for n, t in TwoTypes().state_dict().items()}
    plan = replace(client_plan(0, Route.whole(), {}), state_digest="")
    batches = [(torch.zeros(2, 4), torch.zeros(2, 2))]
    with pytest.raises(InvalidTask, match=r"torch\.float32, torch\.float64"):
        train_locally(plan, state, batches, conditions)


class TwoTypes(nn.Module):
    """Two layers, the second in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run both."""
        result: torch.Tensor = self.second(self.first(x).double()).float()
        return result


# --- two edges ------------------------------------------------------------------------


class Pair:
    """Client 0 and two edges that know each other."""

    def __init__(self, folder: Path, task: Task = TASK) -> None:
        """Start both edges and give them the state."""
        self.task = task
        self.edges = {n: MortalEdge(folder / n, name=n) for n in (NEAR, FAR)}
        self.addresses: dict[str, str] = {}
        state = initial_state()
        for name, edge in self.edges.items():
            edge.neighbours = self.edges
            self.addresses[name] = edge.start(task)
            hold = wire.HoldState(state_digest(state), state)
            edge.connect(self.addresses[name]).send(hold)

    def train(self, route: Route) -> Outcome:
        """Train along a route."""
        return train_locally(*self._parts(route))

    def evaluate(self, route: Route) -> StepReport:
        """Evaluate along a route."""
        return evaluate_locally(*self._parts(route))

    def _parts(self, route: Route) -> Any:
        state = initial_state()
        plan = client_plan(0, route, state, addresses=self.addresses)
        conditions = Conditions(
            task=self.task,
            connect=lambda place, address: self.edges[place].connect(address),
        )
        return plan, device_part(state, route), loader(0), conditions

    def merged(self, outcome: Outcome) -> dict[str, Any]:
        """Join what the device sends and what the edges have sealed."""
        state = dict(outcome.state)
        for receipt in outcome.receipts:
            entry = wire.Entry(receipt.session, receipt.digest, 1)
            edge = self.edges[receipt.place]
            transport = edge.connect(self.addresses[receipt.place])
            sums = transport.send(wire.Commit(1, (entry,))).sums
            state |= {n: s.mean(initial_state()[n].dtype) for n, s in sums.items()}
        return state

    def sealed(self) -> list[str]:
        """Name the edges that keep a tail."""
        return [n for n, edge in self.edges.items() if tail_files(edge.folder)]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Start two edges."""
    yield Pair(tmp_path)


@pytest.mark.parametrize("route", KINDS, ids=str)
def test_every_place_confirms_its_part(pair: Pair, route: Route) -> None:
    """Together device and receipts are the whole model's state, exactly once."""
    outcome = pair.train(route)
    assert [receipt.place for receipt in outcome.receipts] == list(route.edges())
    names = [*outcome.state, *(n for r in outcome.receipts for n in r.names)]
    assert sorted(names) == sorted(initial_state())
    whole = pair.train(Route.whole())
    assert differences(pair.merged(outcome), whole.state) == []
    assert outcome.report.loss == whole.report.loss


@pytest.mark.parametrize("route", KINDS, ids=str)
def test_every_kind_evaluates_as_the_whole_model(pair: Pair, route: Route) -> None:
    """Loss and metrics; nothing stays open or sealed."""
    whole, split = pair.evaluate(Route.whole()), pair.evaluate(route)
    assert (split.loss, split.metrics) == (whole.loss, whole.metrics)
    assert pair.sealed() == []
    for name in route.edges():
        asked = [type(request) for request in pair.edges[name].requests]
        assert asked.count(wire.OpenSession) == asked.count(wire.Abandon) == 1


def has_targets(request: Any) -> bool:
    """Say whether a request brings labels along."""
    return getattr(request, "targets", None) is not None


@pytest.mark.parametrize("route", [U_SHAPE, BOTH], ids=str)
def test_labels_stay_on_the_device(pair: Pair, route: Route) -> None:
    """On a route that comes back, no edge is asked anything with targets."""
    pair.train(route)
    pair.evaluate(route)
    for edge in pair.edges.values():
        assert not any(map(has_targets, edge.requests))
    pair.train(HOPS)  # The check sees them where they go along.
    assert any(map(has_targets, pair.edges[FAR].requests))


def test_a_boundary_between_edges_does_not_pass_the_device(pair: Pair) -> None:
    """The device's traffic is that of its own boundary and labels."""
    hops = pair.train(HOPS).report
    split = pair.train(Route.split(3, edge=NEAR)).report
    assert (hops.sent_bytes, hops.received_bytes) == (
        split.sent_bytes,
        split.received_bytes,
    )


# --- what fails -----------------------------------------------------------------------


STEPS = [wire.OpenSession, wire.Forward, wire.Backward]
MOMENTS = [
    (route, kind, place)
    for route in KINDS
    for kind in [*STEPS, wire.Seal]
    for place in route.edges()
    if not (kind is wire.Backward and not route.returns)
]


@pytest.mark.parametrize(("route", "kind", "place"), MOMENTS)
def test_a_request_that_is_delivered_twice_counts_once(
    pair: Pair, route: Route, kind: type, place: str
) -> None:
    """Whichever it is, at whichever edge."""
    expected = pair.train(route)
    pair.edges[place].hook = lost_reply(kind, lambda: None)
    outcome = pair.train(route)
    assert outcome.report.status is Status.OK
    assert outcome.receipts == expected.receipts
    assert differences(outcome.state, expected.state) == []


@pytest.mark.parametrize(("route", "kind", "place"), MOMENTS)
def test_losing_an_edge_ends_in_a_report_and_leaves_nothing(
    pair: Pair, route: Route, kind: type, place: str
) -> None:
    """Also if it is not the one that the device talks to."""

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, kind):
            pair.edges[place].kill()
        return deliver(request)

    pair.edges[place].hook = hook
    outcome = pair.train(route)
    assert outcome.report.status is Status.EDGE_FAILED
    assert place in outcome.report.message
    assert (outcome.state, outcome.receipts) == ({}, ())
    pair.edges[place].restart()
    alive = [name for name in pair.sealed() if name != place]
    assert alive == []


@pytest.mark.parametrize("route", [HOPS, BOTH], ids=str)
def test_values_that_are_not_finite_are_sealed_nowhere(
    pair: Pair, route: Route
) -> None:
    """The edge that finds them refuses, and the others are told."""

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.Forward):
            (packed,) = request.boundary
            poison = torch.full_like(packed.unpack(), float("nan"))
            request = replace(request, boundary=(type(packed).pack(poison),))
        return deliver(request)

    pair.edges[FAR].hook = hook
    outcome = pair.train(route)
    assert outcome.report.status is Status.EDGE_FAILED
    assert "not finite" in outcome.report.message
    assert pair.sealed() == []


def test_a_backward_without_its_forward_voids_the_session(pair: Pair) -> None:
    """Messages of a step come there, then back."""

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.Backward):
            request = replace(request, step=request.step + 1)
        return deliver(request)

    pair.edges[NEAR].hook = hook
    report = pair.train(U_SHAPE).report
    assert report.status is Status.EDGE_FAILED
    assert "step 1 came after 0 steps, in a Backward" in report.message


def test_an_edge_without_a_way_to_others_says_so() -> None:
    """An edge that was made alone hosts the ends of routes only."""
    with pytest.raises(EdgeUnreachable, match="'far' at 'x' cannot be reached"):
        nowhere(FAR, "x")


def test_a_missing_norm_is_refused(tmp_path: Path) -> None:
    """A device of another version would clip by its own part."""
    pair = Pair(tmp_path, variant("clipped"))

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, wire.Forward):
            request = replace(request, norm=None)
        return deliver(request)

    pair.edges[NEAR].hook = hook
    report = pair.train(Route.split(3, edge=NEAR)).report
    assert report.status is Status.EDGE_FAILED
    assert "by their common norm" in report.message
