"""Split training is the stock model's training, to the last bit.

Every cut of two networks is trained through ``train_locally`` and an edge, once with
the edge in this process and once as a Ray actor, and compared with the slow truth:
losses, every gradient, every buffer and every parameter.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from flwr_smartsplit.device.local_training import (
    Conditions,
    evaluate_locally,
    train_locally,
)
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.hosts.ray import RayEdge, RayHost
from flwr_smartsplit.edge.tensors import WireTensor, state_digest
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE, ClientPlan, Route, Status
from tests.models import (
    DAILY_RESNET18_CUTS,
    OPTIMIZERS,
    RESNET18_NUM_UNITS,
    SMALL_CNN_RANDOM,
    SMALL_CNN_UNITS,
    batches_of,
    channels_last_cnn,
    recording,
    resnet18,
    small_cnn,
    task_of,
)
from tests.oracle import (
    Chance,
    Values,
    compare,
    evaluate_whole,
    fingerprints,
    train_whole,
)

CHANCE = Chance(seed=3, round_number=2, client_key="a", units={})


@dataclass(frozen=True)
class Subject:
    """A model to cut, and the batches to train it on."""

    model_fn: Callable[[], torch.nn.Module]
    num_units: int
    shape: tuple[int, ...]
    batch_size: int
    random_units: tuple[tuple[str, int], ...] = ()
    num_steps: int = 2

    @property
    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return batches_of(self.num_steps, self.batch_size, shape=self.shape)

    def task(self, optimizer: str) -> Task:
        return task_of(self.model_fn, optimizer=OPTIMIZERS[optimizer], shape=self.shape)


SUBJECTS = {
    "small": Subject(
        small_cnn,
        len(SMALL_CNN_UNITS),
        (3, 12, 12),
        6,
        tuple(SMALL_CNN_RANDOM.items()),
        num_steps=3,
    ),
    "strided": Subject(
        channels_last_cnn,
        len(SMALL_CNN_UNITS),
        (3, 12, 12),
        6,
        tuple(SMALL_CNN_RANDOM.items()),
    ),
    "resnet18": Subject(resnet18, RESNET18_NUM_UNITS, (3, 32, 32), 4),
}
SLOW_AT_RAY = (pytest.mark.ray, pytest.mark.slow)  # Each is an actor to start.


def marks_of(name: str, cut: int, marks: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leave most cuts of the large model to make test-all."""
    is_daily = name != "resnet18" or cut in DAILY_RESNET18_CUTS
    return marks if is_daily else (*marks, pytest.mark.slow)


EVERY_CASE = [
    pytest.param(
        *(edge, name, cut),
        marks=marks_of(name, cut, marks),
        id=f"{edge.name}-{name}-cut={cut}",
    )
    for edge, name, first_cut, marks in (
        (LocalEdge(name="local"), "small", 0, ()),
        (LocalEdge(name="local"), "strided", 0, ()),
        (LocalEdge(name="local"), "resnet18", 0, ()),
        (RayEdge(name="ray"), "small", 1, (pytest.mark.ray,)),
        (RayEdge(name="ray"), "resnet18", 1, SLOW_AT_RAY),
    )
    for cut in range(first_cut, SUBJECTS[name].num_units)
]
"""Every cut at both kinds of edge; cut 0 is the whole model on the device."""
EVERY_STEP = [
    pytest.param(
        *case.values,
        optimizer,
        # Small models at an edge in this process show what depends on the optimizer.
        marks=[*case.marks, *([pytest.mark.slow] if is_slow else [])],
        id=f"{case.id}-{optimizer}",
    )
    for case in EVERY_CASE
    for optimizer in ("momentum", "adam")
    for is_slow in [optimizer == "adam" and ("ray" in case.id or "resnet" in case.id)]
]


@cache
def truth(name: str, optimizer: str) -> Values:
    """Train the stock model; fingerprint everything."""
    subject = SUBJECTS[name]
    steps = train_whole(
        subject.model_fn(),
        subject.batches,
        loss_fn=functional.cross_entropy,
        optimizer_fn=OPTIMIZERS[optimizer],
        chance=replace(CHANCE, units=dict(subject.random_units)),
    )
    return summary([fingerprints(step) for step in steps])


def summary(steps: list[Values]) -> Values:
    """Keep what a split run can show: every gradient and loss, the state at the end."""
    values = {
        f"step {index} {name}": value
        for index, step in enumerate(steps)
        for name, value in step.items()
        if not name.startswith("state ")
    }
    last = steps[-1].items()
    return values | {name: value for name, value in last if name.startswith("state ")}


@dataclass
class Place:
    """An edge that holds a subject's first state, and a transport that listens."""

    name: str
    task: Task
    folder: Path
    transport: wire.Transport
    chain: Chain
    losses: list[float] = field(default_factory=list)

    def send(self, request: wire.Request[Any]) -> Any:
        reply = self.transport.send(request)
        if isinstance(reply, wire.Stepped):
            self.losses.append(reply.values["loss"])
        return reply

    def connect(self, place: str, address: str) -> wire.Transport:
        del place, address
        return self

    def plan(self, cut: int) -> ClientPlan:
        return ClientPlan(
            client_key=CHANCE.client_key,
            round_number=CHANCE.round_number,
            route=Route.split(cut) if cut else Route.whole(),
            seed=CHANCE.seed,
            state_digest=first_digest(self.name),
            edge_addresses={EDGE: "wherever"},
        )

    @property
    def state(self) -> dict[str, np.ndarray]:
        return first_state(self.name)

    def gradients(self, *bounds: int) -> Values:
        """Read what the optimizers of the segments wrote down, by name."""
        values: Values = {}
        files = sorted(self.folder.iterdir())
        names = [
            [n for n, p in segment.named_parameters() if p.requires_grad]
            for segment in map(self.chain.segment, bounds[:-1], bounds[1:])
        ]
        for path, owned in zip(files, filter(None, names), strict=True):
            for step, line in enumerate(path.read_text().splitlines()):
                prints = zip(owned, json.loads(line), strict=True)
                values |= {f"step {step} gradient {n}": v for n, v in prints if v}
            path.unlink()
        return values


@cache
def first_state(name: str) -> dict[str, np.ndarray]:
    return state_of(SUBJECTS[name].model_fn())


@cache
def first_digest(name: str) -> str:
    return state_digest(first_state(name))


@pytest.fixture(scope="module")
def place_at(request, tmp_path_factory) -> Iterator[Callable[[Any, str, str], Place]]:
    """Start each edge once, for all cuts of a subject with one optimizer."""
    started = []

    @cache
    def open_place(edge: Any, name: str, optimizer: str) -> Place:
        if isinstance(edge.host, RayHost):
            request.getfixturevalue("ray_cluster")
        folder = tmp_path_factory.mktemp("gradients")
        task = SUBJECTS[name].task(optimizer)
        recorded = partial(recording, optimizer_fn=task.optimizer_fn, folder=folder)
        task = replace(task, optimizer_fn=recorded)
        address = edge.start(task)
        started.append((edge, address))
        place = Place(name, task, folder, edge.connect(address), build_chain(task))
        place.send(wire.HoldState(first_digest(name), place.state))
        return place

    yield open_place
    for edge, address in started:
        edge.stop(address)


def train_split(place: Place, cut: int, *, client_key: str = "a") -> Values:
    """Train along a route; collect what the device and the edge ended with."""
    subject = SUBJECTS[place.name]
    plan = replace(place.plan(cut), client_key=client_key)
    place.losses.clear()
    stop = cut or len(place.chain)
    outcome = train_locally(
        plan,
        {name: place.state[name] for name in place.chain.state_names(0, stop)},
        subject.batches,
        Conditions(task=place.task, connect=place.connect),
    )
    assert outcome.report.status is Status.OK, outcome.report.message
    state = dict(outcome.state)
    for receipt in outcome.receipts:
        entry = wire.Entry(receipt.session, receipt.digest, 1)
        sums = place.send(wire.Commit(plan.round_number, (entry,))).sums
        assert not state.keys() & sums.keys()
        state |= {n: s.mean(place.state[n].dtype) for n, s in sums.items()}
    place.send(wire.Release(plan.round_number, plan.state_digest))
    losses = {f"step {i} loss": loss for i, loss in enumerate(place.losses)}
    bounds = (0, cut, len(place.chain)) if cut else (0, len(place.chain))
    tensors = {f"state {name}": torch.from_numpy(a) for name, a in state.items()}
    return losses | place.gradients(*bounds) | fingerprints(tensors)


def without_losses(values: Values) -> Values:
    """Leave the losses out: a whole run reports their mean only."""
    return {name: v for name, v in values.items() if not name.endswith("loss")}


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_cut_of_the_chain_is_compared(name):
    """The cuts below are all cuts, and chance is where the oracle seeds it."""
    subject = SUBJECTS[name]
    chain = build_chain(subject.task("sgd"))
    assert len(chain) == subject.num_units
    random = {unit.name: i for i, unit in enumerate(chain.units) if unit.is_random}
    assert random == dict(subject.random_units)
    if name == "small":
        assert chain.unit_names == SMALL_CNN_UNITS


@pytest.mark.every(3)
@pytest.mark.parametrize(("edge", "name", "cut", "optimizer"), EVERY_STEP)
def test_a_split_step_is_the_stock_models_step(place_at, edge, name, cut, optimizer):
    """Losses, gradients, buffers and parameters are the stock model's bits."""
    place = place_at(edge, name, optimizer)
    expected, found = truth(name, optimizer), train_split(place, cut)
    if not cut:
        expected = without_losses(expected)
    assert compare(expected, found) == []


@dataclass(frozen=True)
class SpoilingTransport:
    """Spoil every boundary that goes out, and every gradient that comes back."""

    inner: wire.Transport
    spoil: Callable[[torch.Tensor, bool], torch.Tensor]

    def send(self, request: wire.Request[Any]) -> Any:
        if isinstance(request, wire.Forward):
            boundary = self.spoiled(request.boundary, is_gradient=False)
            request = replace(request, boundary=boundary)
        reply = self.inner.send(request)
        if isinstance(reply, wire.Stepped):
            gradients = self.spoiled(reply.gradients, is_gradient=True)
            reply = replace(reply, gradients=gradients)
        return reply

    def spoiled(
        self, packed: tuple[WireTensor, ...], *, is_gradient: bool
    ) -> tuple[WireTensor, ...]:
        return tuple(
            WireTensor.pack(self.spoil(tensor.unpack(), is_gradient))
            for tensor in packed
        )


def bend_gradient(tensor: torch.Tensor, is_gradient: bool) -> torch.Tensor:
    """Bend one element of a gradient by 1e-4."""
    if is_gradient:
        tensor.flatten()[0] *= 1 + 1e-4
    return tensor


def lose_strides(tensor: torch.Tensor, is_gradient: bool) -> torch.Tensor:
    """Lay a tensor out row by row, as a careless wire does."""
    del is_gradient
    return tensor.contiguous()


def train_spoiled(
    place: Place, cut: int, spoil: Callable[[torch.Tensor, bool], torch.Tensor]
) -> list[str]:
    """Compare a run over a spoiling wire with the truth."""
    place = replace(place, transport=SpoilingTransport(place.transport, spoil))
    return compare(truth(place.name, "momentum"), train_split(place, cut))


def test_a_bent_boundary_gradient_would_be_seen(place_at):
    """One element off by 1e-4 is seen in the device's gradients, and only there."""
    wrong = train_spoiled(place_at(LocalEdge(), "small", "momentum"), 4, bend_gradient)
    first = {line.split(":")[0] for line in wrong if line.startswith("step 0")}
    assert all(name.startswith("step 0 gradient") for name in first)
    owners = {name.split()[3].split(".")[0] for name in first}
    assert owners == {"conv1", "norm1", "block"}


def test_lost_strides_would_be_seen(place_at):
    """A tail that gets its boundary in another layout sums in another order."""
    small, strided = (
        place_at(LocalEdge(), name, "momentum") for name in ("small", "strided")
    )
    assert train_spoiled(small, 7, lose_strides) == []  # Was row by row already.
    assert train_spoiled(strided, 7, lose_strides)


def test_a_wrong_stream_would_be_seen(place_at):
    """Another client's dropout changes every loss."""
    place = place_at(LocalEdge(), "small", "momentum")
    wrong = compare(truth("small", "momentum"), train_split(place, 4, client_key="b"))
    assert {"step 0 loss", "step 1 loss", "step 2 loss"} <= {
        line.split(":")[0] for line in wrong
    }


@pytest.mark.every(2)
@pytest.mark.parametrize(("edge", "name", "cut"), EVERY_CASE)
def test_evaluating_along_a_route_is_evaluating_the_stock_model(
    place_at, edge, name, cut
):
    """Each batch's loss in evaluation mode is the stock model's, and state stays."""
    place = place_at(edge, name, "momentum")
    subject = SUBJECTS[name]
    stop = cut or len(place.chain)
    state = {n: place.state[n].copy() for n in place.chain.state_names(0, stop)}
    found = [
        evaluate_locally(
            place.plan(cut),
            state,
            [batch],
            Conditions(task=place.task, connect=place.connect),
        )
        for batch in subject.batches
    ]
    assert [report.message for report in found] == [""] * len(found)
    expected = evaluate_whole(
        subject.model_fn(), subject.batches, loss_fn=functional.cross_entropy
    )
    assert [report.loss for report in found] == expected
    assert all(np.array_equal(state[n], place.state[n]) for n in state)
    for path in place.folder.iterdir():
        path.unlink()
