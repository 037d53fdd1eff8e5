"""Predicted bytes are the bytes that a device's steps are then measured to hold."""

import ast
import copy
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.device.local_training import Conditions, train_locally
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.protocol import LocalTransport
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.memory.cap import memory_cap
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.memory_trace import Observed
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import as_boundary
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import (
    EDGE,
    ChainProfile,
    ClientPlan,
    Route,
    Status,
    StepReport,
)
from tests.models import (
    DAILY_RESNET18_CUTS,
    OPTIMIZERS,
    RESNET18_NUM_UNITS,
    SMALL_CNN_UNITS,
    batches_of,
    densenet,
    frozen_unet,
    resnet18,
    small_cnn,
    task_of,
    unet,
)

NUM_STEPS = 3


class FrozenBody(nn.Module):
    """A large part that is not trained, and a small one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(108, 300).requires_grad_(False)
        self.head = nn.Linear(300, 10)
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.head(self.body(x.flatten(1)))))


class Strided(nn.Module):
    """Boundaries that are parts of larger tensors, or repeat one value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3)
        self.last = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)[:, ::3, 2:6].transpose(1, 3)
        x = x.sum(dim=(1, 2)).unsqueeze(2).expand(-1, -1, 20).sum(dim=1)
        return functional.relu(self.last(x))


class Deep(nn.Module):
    """Layers of falling width, with views and in-place operators between."""

    def __init__(self) -> None:
        super().__init__()
        widths = (432, 200, 100, 50, 20)
        self.layers = nn.Sequential(*(self.layer(*pair) for pair in pairwise(widths)))
        self.last = nn.Linear(20, 10)

    @staticmethod
    def layer(before: int, after: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(before, after),
            nn.LayerNorm(after),
            nn.ReLU(True),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(x.flatten(1)))


SMALL = (3, 12, 12)
FULL = (3, 32, 32)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...], int]] = {
    "small": (small_cnn, len(SMALL_CNN_UNITS), SMALL, 6),
    "resnet18": (resnet18, RESNET18_NUM_UNITS, FULL, 4),
    "frozen": (FrozenBody, 4, (3, 6, 6), 4),
    "deep": (Deep, 13, SMALL, 7),
    "strided": (Strided, 9, SMALL, 5),
    "unet": (unet, 16, SMALL, 3),
    "frozen unet": (frozen_unet, 18, SMALL, 3),
    "densenet": (densenet, 23, SMALL, 3),
}
"""Each model with its number of units, its input shape and a batch size."""

MAX_TENSORS = {"unet": 9, "frozen unet": 9, "densenet": 9}
"""How many tensors may cross a cut, where it is more than one."""

LARGE = ("resnet18", "unet", "frozen unet", "densenet")

EVERY_CUT = [
    pytest.param(name, cut, id=f"{name}-cut={cut}")
    for name, (_, num_units, *_) in MODELS.items()
    for cut in range(num_units)
]
"""Cut 0 is the whole model on the device."""
EVERY_STEP = [
    pytest.param(
        *case.values,
        optimizer,
        marks=pytest.mark.slow if is_slow else (),
        id=f"{case.id}-{optimizer}",
    )
    for case in EVERY_CUT
    for optimizer in OPTIMIZERS
    # The smaller models show what optimizers hold.
    for name, cut in [case.values]
    for is_slow in [
        (name in LARGE and optimizer != "momentum")
        or (name == "resnet18" and cut not in DAILY_RESNET18_CUTS)
        or (name in {"unet", "frozen unet", "densenet"} and cut % 3)
    ]
]


def fresh_batches(batch_size: int, shape: tuple[int, ...]) -> Iterator[tuple]:
    """Yield batches as a loader does: nobody keeps the one before."""
    for index in range(NUM_STEPS):
        inputs, targets = batches_of(index + 1, batch_size, shape=shape)[index]
        yield inputs, targets


@cache
def profiled(name: str, optimizer: str) -> tuple[Task, Chain, ChainProfile]:
    """Profile a model once per optimizer."""
    model_fn, _, shape, batch_size = MODELS[name]
    task = task_of(
        model_fn,
        optimizer=OPTIMIZERS[optimizer],
        shape=shape,
        max_boundary_tensors=MAX_TENSORS.get(name, 1),
    )
    chain = build_chain(task)
    return task, chain, profile_chain(chain, batch_size=batch_size, task=task)


@cache
def first_state(name: str) -> tuple[dict[str, np.ndarray], str]:
    """Build a model's first state once, with its digest."""
    state = state_of(MODELS[name][0]())
    return state, state_digest(state)


@pytest.fixture(scope="module")
def edge_of() -> Iterator[Callable[[str, str], LocalTransport]]:
    """Start one edge for each model and optimizer, in this very process."""
    edge, addresses = LocalEdge(), []

    @cache
    def start(name: str, optimizer: str) -> LocalTransport:
        addresses.append(edge.start(profiled(name, optimizer)[0]))
        transport = edge.connect(addresses[-1])
        state, digest = first_state(name)
        transport.send(wire.HoldState(digest, state))
        return transport

    yield start
    for address in addresses:
        edge.stop(address)


@dataclass(frozen=True)
class Case:
    """A model, a cut (0 for none) and an optimizer."""

    name: str
    cut: int
    optimizer: str

    @property
    def route(self) -> Route:
        return Route.split(self.cut) if self.cut else Route.whole()

    @property
    def predicted_bytes(self) -> int:
        *_, profile = profiled(self.name, self.optimizer)
        return predicted_peak_bytes(profile, self.route)

    def measured(
        self, transport: LocalTransport, *, budget_bytes: int | None = None
    ) -> StepReport:
        """Train with the edge in this very thread; return what the device reports."""
        _, num_units, shape, batch_size = MODELS[self.name]
        task, chain, _ = profiled(self.name, self.optimizer)
        assert len(chain) == num_units
        state, digest = first_state(self.name)
        plan = ClientPlan(
            client_key="a",
            round_number=1,
            route=self.route,
            seed=0,
            budget_bytes=budget_bytes,
            state_digest=digest,
            edge_addresses={EDGE: ""},
        )
        names = chain.state_names(0, self.cut or num_units)
        outcome = train_locally(
            plan,
            {name: state[name] for name in names},
            fresh_batches(batch_size, shape),
            Conditions(task=task, connect=lambda *_: transport, meter_every=1),
        )
        transport.send(wire.Release(1, digest))
        return outcome.report


@pytest.mark.every(5)
@pytest.mark.parametrize(("name", "cut", "optimizer"), EVERY_STEP)
def test_the_predicted_peak_is_the_measured_one_to_the_byte(
    edge_of, name, cut, optimizer
):
    """For every cut, a dry run gives the peak of real steps beside a local edge."""
    case = Case(name, cut, optimizer)
    report = case.measured(edge_of(name, optimizer))
    assert (report.status, report.num_steps) == (Status.OK, NUM_STEPS)
    assert report.peak_bytes == case.predicted_bytes


@pytest.mark.parametrize("cut", [0, 4, 12])
def test_the_prediction_is_the_smallest_budget_that_is_enough(edge_of, cut):
    """With exactly the predicted bytes a device trains; with one less it does not."""
    case, transport = Case("small", cut, "adam"), edge_of("small", "adam")
    needed = case.predicted_bytes
    assert case.measured(transport, budget_bytes=needed).status is Status.OK
    report = case.measured(transport, budget_bytes=needed - 1)
    assert report.status is Status.OUT_OF_MEMORY
    assert report.peak_bytes == needed


def test_a_byte_more_on_the_device_would_be_seen():
    """A loss that holds one float more moves the measured peak, not the prediction."""
    task, _, profile = profiled("deep", "sgd")
    extra: list[Tensor] = []

    def wasteful(outputs: Tensor, targets: Tensor) -> Tensor:
        extra.append(torch.zeros(1))
        return functional.cross_entropy(outputs, targets)

    _, _, shape, batch_size = MODELS["deep"]
    plan = ClientPlan(
        client_key="a", round_number=1, route=Route.whole(), seed=0, edge_addresses={}
    )
    outcome = train_locally(
        plan,
        first_state("deep")[0],
        fresh_batches(batch_size, shape),
        Conditions(
            task=replace(task, loss_fn=wasteful),
            connect=lambda *_: pytest.fail("a whole route needs no edge"),
            meter_every=1,
        ),
    )
    predicted = predicted_peak_bytes(profile, Route.whole())
    assert outcome.report.peak_bytes == predicted + NUM_STEPS * 4


@pytest.mark.parametrize("name", ["unet", "densenet"])
def test_a_gradient_that_is_left_out_would_be_seen(edge_of, name, monkeypatch):
    """All gradients of a boundary are there when the first of them is used."""
    task, chain, _ = profiled(name, "sgd")  # Rightly, before the error is planted.
    came = Observed._gradients_came
    monkeypatch.setattr(
        Observed,
        "_gradients_came",
        lambda self, boundary, watched, dead, *gradients: came(
            self, boundary, watched[-1:], dead, gradients[-1]
        ),
    )
    wrong = profile_chain(chain, batch_size=MODELS[name][-1], task=task)
    several = [i for i, u in enumerate(chain.units, 1) if sum(u.gradients) > 1]
    cases = [Case(name, cut, "sgd") for cut in several]
    found = [predicted_peak_bytes(wrong, case.route) for case in cases]
    assert found != [case.predicted_bytes for case in cases]
    assert all(w <= c.predicted_bytes for w, c in zip(found, cases, strict=True))


def test_a_frozen_front_holds_no_gradient_and_no_graph(edge_of):
    """Its peak is that of a forward, whatever the optimizer."""
    case = Case("frozen", 1, "adam")
    _, chain, profile = profiled("frozen", "adam")
    assert chain.units[0].gradients == (False,)
    assert profile.units[0].waiting_bytes == 0
    assert case.predicted_bytes == Case("frozen", 1, "sgd").predicted_bytes
    assert case.measured(edge_of("frozen", "adam")).peak_bytes == case.predicted_bytes


def grey_cnn() -> nn.Module:
    """Take images of one channel, whose channel may come first or last in memory."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.GroupNorm(4, 24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 64, 10),
    )


def grey_images(count: int, *, is_last: bool) -> Tensor:
    """Make images ``(count, 1, 8, 8)``: the same numbers in either layout."""
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    strides = (64, 1, 8, 1) if is_last else (64, 64, 8, 1)
    return images.as_strided(images.shape, strides)


def grey_peaks(*, example_last: bool, batch_last: bool) -> tuple[int, int]:
    """Predict from one layout of the example, and measure with one of the batch."""
    examples = grey_images(1, is_last=example_last)
    task = replace(
        task_of(grey_cnn, optimizer=OPTIMIZERS["sgd"], shape=(1, 8, 8)),
        example_inputs=examples,
    )
    profile = profile_chain(build_chain(task), batch_size=4, task=task)
    plan = ClientPlan(
        client_key="a", round_number=1, route=Route.whole(), seed=0, edge_addresses={}
    )
    outcome = train_locally(
        plan,
        state_of(grey_cnn()),
        [(grey_images(4, is_last=batch_last), torch.zeros(4, dtype=torch.int64))],
        Conditions(
            task=task,
            connect=lambda *_: pytest.fail("a whole route needs no edge"),
            meter_every=1,
        ),
    )
    return predicted_peak_bytes(profile, Route.whole()), outcome.report.peak_bytes


@pytest.mark.parametrize("is_last", [False, True])
def test_the_layout_of_an_example_is_that_of_the_batch(is_last):
    """Torchvision's ToTensor puts the channel of a grey image last, at no stride."""
    predicted, measured = grey_peaks(example_last=is_last, batch_last=is_last)
    assert predicted == measured


def test_an_example_laid_out_otherwise_predicts_another_step():
    predicted, measured = grey_peaks(example_last=False, batch_last=True)
    assert predicted != measured


# --- what a profile says of each unit -------------------------------------------------


@pytest.mark.parametrize("name", ["small", "resnet18", "deep"])
def test_units_add_up_to_the_model(name):
    """Parameters and buffers of the units are those of the model, each once."""
    model = MODELS[name][0]()
    *_, profile = profiled(name, "sgd")
    for kind in ("parameter", "buffer"):
        tensors = list(getattr(model, f"{kind}s")())
        total = sum(getattr(unit, f"{kind}_bytes") for unit in profile.units)
        assert total == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", MODELS)
def test_boundaries_are_what_crosses(name):
    """A unit's boundary has the bytes of its real output for one batch."""
    model_fn, num_units, shape, batch_size = MODELS[name]
    *_, profile = profiled(name, "sgd")
    values, _ = next(fresh_batches(batch_size, shape))
    most = MAX_TENSORS.get(name, 1)
    chain = Chain.from_module(model_fn(), values, max_boundary_tensors=most)
    for index, unit in enumerate(profile.units[:-1]):
        values = chain.segment(index, index + 1)(values)
        assert unit.boundary_bytes == sum(v.nbytes for v in as_boundary(values))
    assert profile.units[-1].boundary_bytes == 0
    assert [unit.name for unit in profile.units] == list(chain.unit_names)
    assert profile.batch_size == batch_size
    assert len(profile.units) == num_units


def test_the_batch_size_is_the_one_asked_for():
    """Boundaries grow with the batch, parameters do not."""
    task, chain, six = profiled("small", "sgd")
    twelve = profile_chain(chain, batch_size=12, task=task)
    for small, large in zip(six.units, twelve.units, strict=True):
        assert large.boundary_bytes == 2 * small.boundary_bytes
        assert large.parameter_bytes == small.parameter_bytes
        assert large.device_peak_bytes > small.device_peak_bytes


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_examples_is_refused(batch_size):
    """The error gives the number."""
    task, chain, _ = profiled("small", "sgd")
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        profile_chain(chain, batch_size=batch_size, task=task)


def test_profiling_again_gives_the_same_numbers_whoever_looks():
    """A profile depends on nothing that ran before, nor on a meter around it."""
    task, chain, profile = profiled("small", "adam")
    torch.manual_seed(77)
    assert profile_chain(chain, batch_size=6, task=task) == profile
    with memory_cap(None):
        assert profile_chain(chain, batch_size=6, task=task) == profile


def test_profiling_leaves_values_modes_and_the_generator_alone():
    """No value, no gradient, no random number and no mode is changed."""
    task, _, _ = profiled("small", "adam")
    model = small_cnn()
    chain = Chain.from_module(model, task.example_inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    profile_chain(chain, batch_size=6, task=task)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# --- nothing is allocated -------------------------------------------------------------

WIDTH = 2**11
LAYER_BYTES = WIDTH**2 * 4
NUM_LAYERS = 3


def linear_layers(width: int) -> nn.Module:
    """Build a model whose parameters are all there is to it."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(NUM_LAYERS)))


def most_bytes() -> int:
    """Read the most memory this process ever held.

    Linux lets a process inherit its parent's ``ru_maxrss``, but not its ``VmHWM``.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth(width: int) -> dict[str, int]:
    """Measure by how much a process grows when it profiles, and when it copies."""
    task = task_of(partial(linear_layers, width), shape=(width,))
    model = task.model_fn()
    grown = {}
    for name, read in (
        ("meta", lambda: build_chain(task)),
        ("real", lambda: Chain.from_module(model, task.example_inputs)),
        (
            "copied",
            lambda: Chain.from_module(copy.deepcopy(model), task.example_inputs),
        ),
    ):
        before = most_bytes()
        profile = profile_chain(read(), batch_size=2**14, task=task)
        grown[name] = most_bytes() - before
        assert profile.units[-1].device_peak_bytes > 2 * NUM_LAYERS * width**2 * 4
    return grown


@pytest.fixture(scope="module")
def grown_bytes() -> dict[str, int]:
    """Measure in a process of its own, which has never been larger."""
    script = (
        "from tests.profile.test_profile import *\n"
        f"growth(16)  # loads what is loaded once\nprint(growth({WIDTH}))"
    )
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    return ast.literal_eval(output)


@pytest.mark.parametrize("parameters", ["meta", "real"])
def test_profiling_allocates_nothing(grown_bytes, parameters):
    """The process does not grow by a layer, whether or not the model is in memory."""
    assert grown_bytes[parameters] < LAYER_BYTES // 2


def test_a_copy_would_be_seen(grown_bytes):
    """The measurement above sees a copy of the model, when one is made."""
    assert grown_bytes["copied"] > (NUM_LAYERS - 0.5) * LAYER_BYTES
