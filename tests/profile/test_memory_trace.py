"""One logged step: what it says of every cut, and that its parts are all needed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile import fake_step as dry_step
from flwr_smartsplit.profile import memory_trace as step_log
from flwr_smartsplit.profile import profile as profiles
from flwr_smartsplit.profile.fake_step import StepLogger
from flwr_smartsplit.profile.memory_trace import StepLog
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.train import segment_runner
from flwr_smartsplit.train.optimizer_in_backward import GradientEntry
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.models import OPTIMIZERS, task_of
from tests.route_peaks import peaks_of

FLOAT = 4
BATCH_SIZE = 8


class Wide(nn.Module):
    """Cuts where sending, receiving and backward make the peak in turn.

    The gradients of some boundaries repeat one value, or are parts of larger ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 30)
        self.second = nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)[:, :1].expand(-1, 100).tanh()[:, ::2]
        x = functional.relu(self.second(x)).unsqueeze(2)
        return x.expand(-1, -1, 60).clone().sum(dim=2)


WIDE = task_of(Wide, shape=(4,), optimizer=OPTIMIZERS["momentum"])


def predicted(task: Task) -> list[int]:
    """Predict the peak of each cut."""
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=BATCH_SIZE, task=task)
    cuts = range(1, len(chain))
    return [predicted_peak_bytes(profile, Route.split(cut)) for cut in cuts]


def log_of(chain: Chain, task: Task) -> StepLog:
    """Log a training step."""
    return StepLogger(chain, batch_size=BATCH_SIZE, task=task).log()


@cache
def measured() -> list[int]:
    """Measure the peak of each cut of the wide network."""
    batches = example_batches(WIDE, batch_size=BATCH_SIZE)
    with RouteChecker(WIDE, batches) as checker:
        cuts = range(1, len(checker.chain))
        checks = [checker.check(Route.split(cut)) for cut in cuts]
    assert all(check.differences == () for check in checks)
    return [check.measured_peak_bytes for check in checks]


def test_one_log_gives_the_measured_peak_of_every_cut():
    """Boundaries with gaps and gradients that repeat a value among them."""
    assert predicted(WIDE) == measured()


class OfNothing(torch.autograd.Function):
    """Give a gradient even where none comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient + 0.5


class Penalty(nn.Module):
    """A module with a backward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = OfNothing.apply(x)
        return result


class DeadSide(nn.Module):
    """What needs a gradient crosses cuts, and none comes to it."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 40)
        self.third = nn.Linear(40, 3)
        self.penalty = Penalty()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.first(x)
        side = functional.softplus(torch.tanh(torch.sigmoid(x)))
        if self.use == "penalty":
            side = self.penalty(side)
        if self.use == "detached":
            x = x + side.detach()
        x = torch.tanh(torch.sigmoid(self.second(x)))
        x = self.third(x)
        if self.use == "penalty":
            x = x + side.detach().sum()
        return (x, side) if self.use == "output" else x


USES = ("nothing", "detached", "output", "penalty")


def dead_side(use: str) -> Task:
    """Make a task whose loss does not use what is beside the line."""

    def loss(outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        return functional.cross_entropy(first, targets)

    task = task_of(partial(DeadSide, use), shape=(4,), optimizer=OPTIMIZERS["sgd"])
    return replace(task, loss_fn=loss, max_boundary_tensors=3)


@pytest.mark.every(4)
@pytest.mark.parametrize("use", USES)
def test_a_graph_that_no_gradient_comes_to_is_held_where_the_device_ends(use):
    """Behind that cut it waits for backward; elsewhere it dies with its value."""
    found, real = peaks_of(dead_side(use), batch_size=BATCH_SIZE)
    assert len(found) > 4
    assert found == real


# --- planted errors -------------------------------------------------------------------


class AllRun(GradientEntry):
    """Send zeros where there is no gradient."""

    def __init__(self, boundary: Sequence[Tensor]) -> None:
        super().__init__(boundary)
        self.shapes = [tensor.shape for tensor in boundary]

    def backward(self, receive: Callable[[], Sequence[Tensor]]) -> None:
        def received() -> list[Tensor]:
            pairs = zip(receive(), self.shapes, strict=True)
            return [g if g.numel() else torch.zeros(shape) for g, shape in pairs]

        super().backward(received)


def test_running_what_no_gradient_comes_to_would_be_seen(monkeypatch):
    """A backward of the user's own makes a gradient of none."""
    monkeypatch.setattr(segment_runner, "GradientEntry", AllRun)
    with pytest.raises(AssertionError):  # Differences from the stock step.
        peaks_of(dead_side("penalty"), batch_size=BATCH_SIZE)


def test_a_log_that_keeps_the_boundary_predicts_too_much(monkeypatch):
    """A device drops what it has sent; a log must not hold it either."""
    kept, observe = [], step_log.Observed._observe

    def keep(self: object, index: int, value: Tensor) -> Tensor:
        kept.append(value)
        return observe(self, index, value)

    monkeypatch.setattr(step_log.Observed, "_observe", keep)
    monkeypatch.setattr(StepLogger, "require_steady_memory", lambda _: None)
    wrong = predicted(WIDE)
    assert all(w >= m for w, m in zip(wrong, measured(), strict=True))
    assert wrong != measured()


@pytest.mark.parametrize("use", USES)
def test_one_log_for_all_cuts_holds_what_no_gradient_comes_to(monkeypatch, use):
    """In one log each cut holds what only a device that ends there does."""
    monkeypatch.setattr(
        profiles, "logs_of_cuts", lambda chain, log, **_: [log] * len(chain)
    )
    found, real = peaks_of(dead_side(use), batch_size=BATCH_SIZE)
    assert found != real
    assert all(f >= r for f, r in zip(found, real, strict=True))


@pytest.mark.parametrize("part", ["gradients", "unpacking_bytes", "packing_bytes"])
def test_a_log_that_forgets_a_part_of_the_wire_predicts_too_little(monkeypatch, part):
    """The gradient that arrives, its re-laying, and the copy that closes gaps."""
    head_bytes = StepLog.head_bytes

    def forgetful(self: StepLog, index: int, temporary_bytes: int) -> int:
        boundary = self.boundaries[index]
        nothing = dict.fromkeys(boundary.gradients, 0) if part == "gradients" else 0
        setattr(boundary, part, nothing)
        return head_bytes(self, index, temporary_bytes)

    monkeypatch.setattr(StepLog, "head_bytes", forgetful)
    wrong = predicted(WIDE)
    assert all(w <= m for w, m in zip(wrong, measured(), strict=True))
    assert wrong != measured()


def test_a_log_of_the_first_step_would_miss_the_state(monkeypatch):
    """Momentum is there from the second step on: the whole route's peak has it."""
    chain = build_chain(WIDE)
    logged = log_of(chain, WIDE).peak_bytes
    run = dry_step.DryStep.run
    monkeypatch.setattr(
        dry_step.DryStep, "run", lambda dry, step: run(dry, step) if step == 0 else 0
    )
    assert log_of(chain, WIDE).peak_bytes < logged


# --- worked out by hand ---------------------------------------------------------------

INPUTS, HIDDEN, CLASSES = 5, 3, 10
BOUNDARY = BATCH_SIZE * HIDDEN * FLOAT
WEIGHT = INPUTS * HIDDEN * FLOAT
NO_TEMPORARY, LARGE_TEMPORARY = 0, 1000


@pytest.fixture
def by_hand() -> StepLog:
    """Log a layer without bias, an activation and a layer."""
    layers = (
        partial(nn.Linear, INPUTS, HIDDEN, bias=False),
        nn.ReLU,
        partial(nn.Linear, HIDDEN, CLASSES),
    )
    task = task_of(lambda: nn.Sequential(*(layer() for layer in layers)), shape=(5,))
    return log_of(build_chain(task), task)


def test_what_is_in_a_step_by_hand(by_hand):
    """The batch and its targets, the boundaries, and what got a gradient."""
    assert by_hand.batch_bytes == BATCH_SIZE * (INPUTS * FLOAT + 8)
    assert [by_hand.boundary_bytes(index) for index in (0, 1)] == [BOUNDARY] * 2
    assert by_hand.trained == {"0.weight", "2.weight", "2.bias"}
    assert by_hand.optimizer_temporary_bytes == 0  # SGD updates in place


def test_what_forward_keeps_by_hand(by_hand):
    """The activation keeps its result; nobody needs the first layer's."""
    assert [by_hand.saved_bytes(index) for index in (0, 1)] == [0, BOUNDARY]


def test_what_a_head_holds_by_hand(by_hand):
    """The first layer: gradient in, weight's out; sent boundaries are gone by then."""
    assert by_hand.head_bytes(0, NO_TEMPORARY) == BOUNDARY + WEIGHT
    # With the activation: its result, the gradient that came, and the one it makes.
    assert by_hand.head_bytes(1, NO_TEMPORARY) == 3 * BOUNDARY


@pytest.mark.parametrize("index", [0, 1])
def test_the_optimizer_finds_only_the_gradients(by_hand, index):
    """When it steps, activations are gone."""
    assert by_hand.head_bytes(index, LARGE_TEMPORARY) == WEIGHT + LARGE_TEMPORARY


def test_a_gradient_that_repeats_one_value_is_one_value():
    """The gradient of a sum spans one element, and is laid out only to be sent."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(INPUTS, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return functional.softplus(self.layer(x)).sum(dim=1, keepdim=True)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()

    task = Task(
        model_fn=Summed,
        loss_fn=loss,
        optimizer_fn=OPTIMIZERS["sgd"],
        example_inputs=torch.zeros(1, INPUTS),
        example_targets=torch.zeros(1),
    )
    log = log_of(build_chain(task), task)
    boundary = log.boundaries[-2]
    assert (boundary.gradient_bytes, boundary.unpacking_bytes) == (FLOAT, BOUNDARY)


def test_the_log_numbers_each_storage_once():
    """Changes of one storage carry one number, and sum up to what is left of it."""
    meter = step_log.LoggingMeter()
    with meter:
        first, second = torch.zeros(3), torch.zeros(5)
        first.resize_(4)
        assert meter.birth_of(first.view(2, 2)) != meter.birth_of(second)
        assert meter.birth_of(torch.zeros(0, device="meta")) == -1
        del first
    assert meter.changes == [12, 20, 4, -16]
    assert meter.births == [0, 1, 0, 0]
    assert sum(meter.changes) == meter.live_bytes == second.nbytes
