"""A front that runs slice by slice does the whole batch's step in less memory.

Its gradients are sums in another order, so they agree to a tolerance, and not to the
bit. What the edge is given, and so all it computes, is the same to the bit wherever
the front's kernels go sample by sample, as float64 convolutions do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from flwr_smartsplit import Route, Task, predicted_peak_bytes, profile_chain
from flwr_smartsplit.device import slices as slices_module
from flwr_smartsplit.device.local_training import (
    Conditions,
    Outcome,
    evaluate_locally,
    train_locally,
)
from flwr_smartsplit.edge import part_messages as messages
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import EdgeLink
from flwr_smartsplit.edge.tensors import WireTensor, state_digest
from flwr_smartsplit.errors import InvalidRoute, InvalidTask
from flwr_smartsplit.memory.cap import CapMode
from flwr_smartsplit.profile.sliced_costs import predicted_sliced_peak_bytes
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.train.slicing import SlicedRunner
from flwr_smartsplit.types import ClientPlan, Status, StepReport
from tests.faults import Deliver, MortalEdge, lost_reply, tail_files

NEAR, FAR = "near", "far"
NUM_CLASSES = 3
BATCH_SIZE = 6
SIZES = [1, 2, 4, 5]  # 4 and 5 leave a smaller slice.
CUTS = [1, 2, 3, 4, 5]
HOPS = Route.hops((3, 6), edges=(NEAR, FAR))


class Net(nn.Module):
    """A front of convolutions and a group norm; then what mixes samples, and chance.

    The boundary after the index has gaps, and the gradient of the mean repeats values.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.GroupNorm(2, 8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(7, 6, 3, stride=2, bias=False)  # BatchNorm undoes it
        self.norm2 = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.25)
        self.last = nn.Linear(6, NUM_CLASSES)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.conv2(x[:, 1:]).mean((2, 3))
        x = self.drop(self.norm2(x))
        return self.last(x)


def accuracy(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Count which fraction of a batch is right."""
    return {"accuracy": float((outputs.argmax(dim=1) == targets).double().mean())}


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def task_of(
    optimizer: str = "momentum", dtype: torch.dtype = torch.float64, **more: Any
) -> Task:
    """Make a task."""
    return Task(
        model_fn=partial(Net, dtype),
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=OPTIMIZERS[optimizer],
        example_inputs=torch.zeros(1, 3, 9, 9, dtype=dtype),
        example_targets=torch.zeros(1, dtype=torch.int64),
        metrics_fn=accuracy,
        **more,
    )


class Pair:
    """One client and two edges."""

    def __init__(self, folder: Path, task: Task) -> None:
        """Start both edges and give them the state."""
        self.task, self.chain = task, build_chain(task)
        torch.manual_seed(1)
        self.state = state_of(task.model_fn())
        self.edges = {n: MortalEdge(folder / n, name=n) for n in (NEAR, FAR)}
        self.addresses: dict[str, str] = {}
        hold = wire.HoldState(state_digest(self.state), self.state)
        for name, edge in self.edges.items():
            edge.neighbours = self.edges
            self.addresses[name] = edge.start(task)
            edge.connect(self.addresses[name]).send(hold)
        chance = torch.Generator().manual_seed(2)
        dtype = next(task.model_fn().parameters()).dtype
        self.batches = [
            (
                torch.randn(size, 3, 9, 9, generator=chance, dtype=dtype),
                torch.randint(0, NUM_CLASSES, (size,), generator=chance),
            )
            for size in (BATCH_SIZE, BATCH_SIZE, 3)
        ]

    def train(self, route: Route, slice_size: int | None = None, **how: Any) -> Outcome:
        """Train along a route."""
        return train_locally(*self._parts(route, slice_size, **how))

    def evaluate(self, route: Route, slice_size: int | None = None) -> StepReport:
        """Evaluate along a route."""
        return evaluate_locally(*self._parts(route, slice_size))

    def _parts(
        self,
        route: Route,
        slice_size: int | None,
        *,
        num_batches: int = 3,
        budget_bytes: int | None = None,
    ) -> Any:
        plan = ClientPlan(
            client_key="c0",
            round_number=1,
            route=route,
            seed=7,
            budget_bytes=budget_bytes,
            state_digest=state_digest(self.state),
            edge_addresses=self.addresses,
            slice_size=slice_size,
        )
        state = {
            name: self.state[name]
            for leg in route.device_legs(len(self.chain))
            for name in self.chain.state_names(leg.start, leg.stop)
        }
        conditions = Conditions(
            task=self.task,
            connect=lambda place, address: self.edges[place].connect(address),
            cap_mode=CapMode.STRICT,
        )
        batches = [(x.clone(), y.clone()) for x, y in self.batches[:num_batches]]
        return plan, state, batches, conditions

    def whole_state(self, outcome: Outcome) -> dict[str, Any]:
        """Join what the device sends and what the edges have sealed."""
        assert outcome.report.status is Status.OK, outcome.report.message
        state = dict(outcome.state)
        for receipt in outcome.receipts:
            entry = wire.Entry(receipt.session, receipt.digest, 1)
            edge = self.edges[receipt.place]
            transport = edge.connect(self.addresses[receipt.place])
            sums = transport.send(wire.Commit(1, (entry,))).sums
            state |= {n: s.mean(self.state[n].dtype) for n, s in sums.items()}
        return state


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Start two edges."""
    yield Pair(tmp_path, task_of())


def split(cut: int) -> Route:
    """Cut once."""
    return Route.split(cut, edge=NEAR)


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Find the largest difference, relative to the scale of each array."""
    assert one.keys() == other.keys()
    return max(
        float(np.abs(one[n] - other[n]).max() / max(np.abs(other[n]).max(), 1e-3))
        for n in one
    )


# --- the numbers ----------------------------------------------------------------------

# After three steps, relative to each array's scale: sums in another order differ by
# some units in the last place, more where terms cancel. Measured: 2e-14 and 2.3e-5.
FLOAT64, FLOAT32, BFLOAT16 = 1e-12, 1e-3, 0.1


ALL = [(route, "momentum") for route in (*map(split, CUTS), HOPS)]
ALL += [(route, name) for route in (split(2), HOPS) for name in ("sgd", "adam")]


@pytest.mark.parametrize(("route", "optimizer"), ALL)
def test_slices_train_as_the_whole_batch_does(
    tmp_path: Path, route: Route, optimizer: str
) -> None:
    """State, loss, counts and traffic; the sum's order is all that differs."""
    pair = Pair(tmp_path, task_of(optimizer))
    whole = pair.train(route)
    expected = pair.whole_state(whole)
    for size in SIZES:
        found = pair.train(route, size)
        assert distance(pair.whole_state(found), expected) < FLOAT64
        assert found.report.loss == pytest.approx(whole.report.loss, rel=1e-12)
        counts = [(r.num_steps, r.num_examples) for r in found.receipts]
        assert counts == [(r.num_steps, r.num_examples) for r in whole.receipts]
        assert found.report.sent_bytes == whole.report.sent_bytes
        assert found.report.received_bytes == whole.report.received_bytes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_single_precision_they_agree_to_some_digits(
    tmp_path: Path, optimizer: str
) -> None:
    """The same, with 29 bits less."""
    pair = Pair(tmp_path, task_of(optimizer, torch.float32))
    for cut in (1, 5):
        expected = pair.whole_state(pair.train(split(cut)))
        for size in (1, 4):
            found = pair.whole_state(pair.train(split(cut), size))
            assert 0 < distance(found, expected) < FLOAT32


@pytest.mark.parametrize("route", [*map(split, CUTS), HOPS], ids=str)
def test_the_edges_compute_the_same_to_the_bit(pair: Pair, route: Route) -> None:
    """The first step's loss and tails, and evaluation: their boundary is the same.

    This front's kernels go sample by sample in float64.
    """
    whole = pair.train(route, num_batches=1)
    evaluated = pair.evaluate(route)
    for size in SIZES:
        found = pair.train(route, size, num_batches=1)
        assert found.report.loss == whole.report.loss
        digests = [receipt.digest for receipt in found.receipts]
        assert digests == [receipt.digest for receipt in whole.receipts]
        report = pair.evaluate(route, size)
        assert (report.loss, report.metrics) == (evaluated.loss, evaluated.metrics)


def test_a_batch_of_one_slice_is_a_plain_step(pair: Pair) -> None:
    """Bit for bit, with the messages of one."""
    whole = pair.train(split(3))
    pair.edges[NEAR].requests.clear()
    found = pair.train(split(3), BATCH_SIZE)
    assert {type(r) for r in pair.edges[NEAR].requests} == {
        wire.OpenSession,
        wire.TrainStep,
        wire.Seal,
    }
    assert distance(pair.whole_state(found), pair.whole_state(whole)) == 0.0


def step_schedule(optimizer: torch.optim.Optimizer, config: Any) -> StepLR:
    """Halve the learning rate with every step."""
    del config
    return StepLR(optimizer, 1, 0.5)


@pytest.mark.parametrize(
    "more",
    [
        {"max_gradient_norm": 0.3},
        {"max_gradient_norm": 0.3, "schedule_fn": step_schedule},
    ],
)
@pytest.mark.parametrize("route", [split(3), HOPS], ids=str)
def test_clipping_and_schedules_work_as_ever(
    tmp_path: Path, route: Route, more: dict[str, Any]
) -> None:
    """Norms are taken when all slices are done; a batch is one step."""
    pair = Pair(tmp_path, task_of(**more))
    expected = pair.whole_state(pair.train(route))
    found = pair.whole_state(pair.train(route, 2))
    assert distance(found, expected) < FLOAT64
    plain = Pair(tmp_path / "plain", task_of())
    assert distance(plain.whole_state(plain.train(route)), expected) > 1e-4


def test_under_autocast_slices_agree_to_bfloat16s_digits(tmp_path: Path) -> None:
    """Each slice's gradient is rounded to bfloat16 before it is added."""
    task = task_of(dtype=torch.float32, autocast_dtype=torch.bfloat16)
    pair = Pair(tmp_path, task)
    expected = pair.whole_state(pair.train(split(3)))
    found = pair.whole_state(pair.train(split(3), 2))
    assert 0 < distance(found, expected) < BFLOAT16


# --- planted errors -------------------------------------------------------------------


def test_gradients_of_other_samples_are_seen(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted error: the samples of a slice get each other's gradients."""
    expected = pair.whole_state(pair.train(split(3), 2))
    gradient_part = EdgeLink.gradient_part

    def swapped(self: EdgeLink, step: int, start: int, stop: int) -> WireTensor:
        right = gradient_part(self, step, start, stop).unpack()
        return WireTensor.pack(right.flip(0))

    monkeypatch.setattr(EdgeLink, "gradient_part", swapped)
    found = pair.whole_state(pair.train(split(3), 2))
    assert distance(found, expected) > 1e-6


def test_a_slice_that_is_left_out_is_seen(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted error: only the last slice's gradients are there."""
    expected = pair.whole_state(pair.train(split(3), 2))
    part_step = SlicedRunner._part_step

    def forgetful(self: Any, part: Any, receive: Any, step: int) -> None:
        self._whole.release_gradients()
        part_step(self, part, receive, step)

    monkeypatch.setattr(SlicedRunner, "_part_step", forgetful)
    found = pair.whole_state(pair.train(split(3), 2))
    assert distance(found, expected) > 1e-6


# --- memory ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "cuts", "sizes"),
    [("momentum", CUTS, [2]), ("adam", [2], [1, 4]), ("sgd", [5], [1, 2, 3, 4, 5])],
)
def test_the_peak_is_the_predicted_one_and_falls_with_the_slice(
    tmp_path: Path, optimizer: str, cuts: list[int], sizes: list[int]
) -> None:
    """To the byte; boundaries with gaps and gradients that repeat are no exception."""
    task = task_of(optimizer)
    pair = Pair(tmp_path, task)
    profile = profile_chain(pair.chain, batch_size=BATCH_SIZE, task=task)
    for cut in cuts:
        peaks = []
        for size in sizes:
            measured = pair.train(split(cut), size, num_batches=2).report.peak_bytes
            assert measured == predicted_sliced_peak_bytes(
                pair.chain, task, cut=cut, batch_size=BATCH_SIZE, slice_size=size
            ), (cut, size)
            peaks.append(measured)
        peaks.append(predicted_peak_bytes(profile, split(cut)))
        assert peaks == sorted(peaks)
        assert peaks[0] < 0.7 * peaks[-1]


def test_a_slice_that_stays_would_be_seen(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted error: the device holds on to what it has sent."""
    held = []
    packed = slices_module.packed

    def hoarding(boundary: Any) -> Any:
        held.append(boundary)
        return packed(boundary)

    monkeypatch.setattr(slices_module, "packed", hoarding)
    measured = pair.train(split(2), 2, num_batches=2).report.peak_bytes
    assert measured > predicted_sliced_peak_bytes(
        pair.chain, pair.task, cut=2, batch_size=BATCH_SIZE, slice_size=2
    )


def test_a_budget_that_is_too_small_for_the_batch_is_enough_for_slices(
    pair: Pair,
) -> None:
    """That is what they are for; also in evaluation."""
    budget = predicted_sliced_peak_bytes(
        pair.chain, pair.task, cut=3, batch_size=BATCH_SIZE, slice_size=1
    )
    whole = pair.train(split(3), budget_bytes=budget)
    assert whole.report.status is Status.OUT_OF_MEMORY
    assert pair.train(split(3), 1, budget_bytes=budget).report.status is Status.OK
    evaluated = [pair.evaluate(split(3), size).peak_bytes for size in (1, None)]
    assert evaluated[0] <= budget < evaluated[1]


@pytest.mark.parametrize("slice_size", [0, BATCH_SIZE, -1])
def test_a_prediction_is_of_several_slices(pair: Pair, slice_size: int) -> None:
    """A slice of a batch and more is a plain step."""
    with pytest.raises(ValueError, match=f"slice_size is {slice_size}: give 1..5"):
        predicted_sliced_peak_bytes(
            pair.chain,
            pair.task,
            cut=2,
            batch_size=BATCH_SIZE,
            slice_size=slice_size,
        )


def test_a_prediction_for_units_that_mix_is_refused(pair: Pair) -> None:
    """It names them."""
    with pytest.raises(InvalidRoute, match="units norm2 are not known"):
        predicted_sliced_peak_bytes(
            pair.chain, pair.task, cut=6, batch_size=BATCH_SIZE, slice_size=2
        )


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "reason"),
    [
        (Route.whole(), "is on the device"),
        (Route.u_shape(2, 5, edge=NEAR), "is on the device"),
        (split(6), "unit 5 is not known to treat samples one by one. Cut at 5"),
    ],
)
def test_other_routes_are_refused_before_anything_is_opened(
    pair: Pair, route: Route, reason: str
) -> None:
    """Training and evaluation alike."""
    for act in (pair.train, pair.evaluate):
        with pytest.raises(InvalidRoute, match=reason):
            act(route, 2)
    assert pair.edges[NEAR].requests == pair.edges[NEAR].requests[:1]


class ReadsItsSize(nn.Module):
    """Reads the number of samples early, and uses it at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        self.last = nn.Linear(4 * 49, NUM_CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        num_samples = x.shape[0]
        result: Tensor = self.last(self.first(x).view(num_samples, -1))
        return result


def test_a_boundary_that_carries_the_batch_size_is_refused(tmp_path: Path) -> None:
    """A slice would carry its own."""
    task = replace(task_of(), model_fn=ReadsItsSize)
    pair = Pair(tmp_path, task)
    for act in (pair.train, pair.evaluate):
        with pytest.raises(InvalidRoute, match=r"shape \(0, 0, 2, 0\), which cannot"):
            act(split(1), 2)
    pair.train(split(2), 2)
    assert tail_files(pair.edges[NEAR].folder)


class TwoInputs(nn.Module):
    """Adds its second input to what it makes of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.body(x + y)
        return result


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_all_inputs_of_a_batch_are_sliced(tmp_path: Path, form: str) -> None:
    """Unless they are not of the same samples."""

    def shaped(x: Tensor, y: Tensor) -> Any:
        return (x, y) if form == "tuple" else {"x": x, "y": y}

    example = torch.zeros(1, 3, 9, 9, dtype=torch.float64)
    inputs = shaped(example, example)
    pair = Pair(tmp_path, replace(task_of(), model_fn=TwoInputs, example_inputs=inputs))
    batches = [(shaped(x, x.flip(0)), y) for x, y in pair.batches]
    with fed(pair, batches):
        expected = pair.whole_state(pair.train(split(3)))
        found = pair.whole_state(pair.train(split(3), 2))
        assert distance(found, expected) < FLOAT64
    uneven = [(shaped(x, x[:1]), y) for x, y in pair.batches]
    with fed(pair, uneven), pytest.raises(InvalidTask, match=r"have \[1, 6\] samples"):
        pair.train(split(3), 2)


@contextmanager
def fed(pair: Pair, batches: list[Any]) -> Iterator[None]:
    """Give a client other batches."""
    parts = pair._parts

    def others(*args: Any, **how: Any) -> Any:
        plan, state, _, conditions = parts(*args, **how)
        return plan, state, batches, conditions

    pair._parts = others  # type: ignore[method-assign]
    yield
    pair._parts = parts  # type: ignore[method-assign]


# --- what fails on the way ------------------------------------------------------------

PART_KINDS = [messages.BoundaryPart, messages.TrainParts, messages.GradientPart]
MOMENTS = [
    (split(3), kind, NEAR) for kind in [wire.OpenSession, *PART_KINDS, wire.Seal]
] + [
    *((HOPS, kind, NEAR) for kind in PART_KINDS),
    *((HOPS, kind, FAR) for kind in (wire.TrainStep, wire.Seal)),
]


@pytest.mark.parametrize(("route", "kind", "place"), MOMENTS)
def test_a_request_that_is_delivered_twice_counts_once(
    pair: Pair, route: Route, kind: type, place: str
) -> None:
    """Whichever it is, at whichever edge, to the bit."""
    expected = pair.train(route, 2)
    pair.edges[place].hook = lost_reply(kind, lambda: None)
    outcome = pair.train(route, 2)
    assert outcome.report.status is Status.OK
    assert outcome.receipts == expected.receipts
    assert distance(dict(outcome.state), dict(expected.state)) == 0.0


@pytest.mark.parametrize(("route", "kind", "place"), MOMENTS[1::2])
def test_losing_an_edge_ends_in_a_report_and_leaves_nothing(
    pair: Pair, route: Route, kind: type, place: str
) -> None:
    """In the middle of a step too."""

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, kind):
            pair.edges[place].kill()
        return deliver(request)

    pair.edges[place].hook = hook
    outcome = pair.train(route, 2)
    assert outcome.report.status is Status.EDGE_FAILED
    assert place in outcome.report.message
    assert (outcome.state, outcome.receipts) == ({}, ())
    alive = [name for name, edge in pair.edges.items() if tail_files(edge.folder)]
    assert [name for name in alive if name != place] == []


@dataclass
class Changed:
    """Change one field of the first request of a kind."""

    kind: type
    change: Callable[[Any], Any]

    def __call__(self, request: Any, deliver: Deliver) -> Any:
        return deliver(
            self.change(request) if isinstance(request, self.kind) else request
        )


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (messages.BoundaryPart, lambda r: replace(r, start=r.start + 1)),
        (messages.TrainParts, lambda r: replace(r, step=r.step + 1)),
        (messages.GradientPart, lambda r: replace(r, start=r.start + 1)),
    ],
)
def test_a_part_in_the_wrong_place_ends_in_a_report(
    pair: Pair, kind: type, change: Callable[[Any], Any]
) -> None:
    """The session is void."""
    pair.edges[NEAR].hook = Changed(kind, change)
    report = pair.train(split(3), 2).report
    assert report.status is Status.EDGE_FAILED
    assert f"in a {kind.__name__}. The session is void" in report.message
