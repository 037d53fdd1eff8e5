"""Light units: the same numbers, with less kept, and nothing costly run again."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models, ops
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.models.resnet import BasicBlock

from flwr_smartsplit.memory.cap import memory_cap
from flwr_smartsplit.profile.fake_step import StepLogger
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.profile.unit_memory import step_bytes
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Segment
from flwr_smartsplit.split.trace import selective_checkpointing
from flwr_smartsplit.train.rng import stream
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    RecomputePlan,
    Rerun,
    StepBytes,
)
from tests.models import OPTIMIZERS, Residual, batches_of, seeded, task_of
from tests.oracle import compare
from tests.slow_cases import daily

BATCH_SIZE = 4
SIDE = 32


class SmallNet(nn.Sequential):
    """Two residual blocks, one with squeeze-and-excitation, and what is around them."""

    def __init__(self) -> None:
        config = InvertedResidualConfig(8, 3, 48, 8, True, "HS", 1, 1, 1.0)
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            BasicBlock(8, 8),
            BasicBlock(8, 8),
            InvertedResidual(config, nn.BatchNorm2d),
            Residual(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )


def small_convnext() -> nn.Module:
    """Build a ConvNeXt whose blocks are left out at random."""
    stages = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)]
    return models.ConvNeXt(stages, stochastic_depth_prob=0.3, num_classes=10)


# Each model, and the part that its selective step may keep.
MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "small": (SmallNet, 0.8),
    "resnet18": (partial(models.resnet18, num_classes=10), 0.8),
    "mobilenet": (partial(models.mobilenet_v3_small, num_classes=10), 0.7),
    "densenet": (partial(models.DenseNet, 8, (3, 4), 16, num_classes=10), 0.65),
    "regnet": (partial(models.regnet_y_400mf, num_classes=10), 0.7),
    "convnext": (small_convnext, 0.65),
    "vit": (
        lambda: models.VisionTransformer(SIDE, 8, 2, 4, 64, 256, 0.0, 0.0, 10),
        0.75,
    ),
}


SMALL = ("small", "densenet", "convnext", "vit")


@cache
def chain_of(name: str) -> Chain:
    """Read a model; nobody trains this copy of it."""
    return Chain.from_module(seeded(MODELS[name][0]), torch.zeros(1, 3, SIDE, SIDE))


def selective_units(chain: Chain) -> tuple[int, ...]:
    """List the units that can be selective."""
    return tuple(i for i, unit in enumerate(chain.units) if unit.selective_forward)


def trained(chain: Chain, plan: RecomputePlan) -> Iterator[dict[str, object]]:
    """Take three steps of a copy; yield loss, gradients, parameters and buffers."""
    segment = chain.own_segment(0, len(chain))
    task = task_of(nn.Identity, optimizer=OPTIMIZERS["momentum"])
    runner = SegmentRunner(
        segment, task, streams=lambda step, unit: stream(100 * step + unit)
    )
    runner.recompute = plan
    batches = batches_of(3, BATCH_SIZE, shape=(3, SIDE, SIDE))
    for step, (inputs, targets) in enumerate(batches):
        loss, _ = runner.finish(inputs, targets, step=step, inputs_are_boundary=False)
        values: dict[str, object] = {f"{step} loss": loss}
        for name, parameter in segment.named_parameters():
            if parameter.grad is not None:
                values[f"{step} gradient {name}"] = parameter.grad.clone()
        for name, tensor in segment.state_dict().items():
            values[f"{step} {name}"] = tensor.clone()
        yield values


def steps_of(chain: Chain, plan: RecomputePlan) -> dict[str, object]:
    """Take three steps; return all of their values."""
    return {k: value for values in trained(chain, plan) for k, value in values.items()}


@cache
def plain_steps(name: str) -> dict[str, object]:
    """Take the steps of a model that recomputes nothing."""
    return steps_of(chain_of(name), KEEP_ALL)


def plans_of(chain: Chain) -> dict[str, RecomputePlan]:
    """Plan for all units to be selective, for some, and for some that run thrice."""
    units, size = selective_units(chain), len(chain)
    thrice = Rerun(size // 2, size, (Rerun(size // 2 + 1, size - 1),))
    return {
        "all": RecomputePlan((), units),
        "some": RecomputePlan((), units[::2]),
        "rerun": RecomputePlan((Rerun(0, size // 2), thrice), units[1:]),
    }


# --- the same numbers -----------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("name", "kind"),
    daily(
        lambda name, kind: name in SMALL or (name == "resnet18" and kind == "rerun"),
        product(MODELS, ["all", "some", "rerun"]),
    ),
)
def test_selective_units_train_to_the_bit_as_others_do(name, kind):
    """Losses, gradients, parameters and buffers, BatchNorm's counters among them."""
    chain = chain_of(name)
    found = steps_of(chain, plans_of(chain)[kind])
    assert compare(plain_steps(name), found) == []


def test_a_cut_may_lie_between_selective_units():
    """A segment takes its own part of the plan."""
    chain = chain_of("small")
    boundary = chain.segment(0, 2)(torch.ones(2, 3, SIDE, SIDE)).detach()
    tail = chain.segment(2, len(chain)).train()
    plan = RecomputePlan((), selective_units(chain))
    values = [
        tail(boundary, streams=lambda *_: stream(3), recompute=each)
        for each in (KEEP_ALL, plan)
    ]
    assert torch.equal(*values)


def test_evaluation_is_never_selective():
    """What runs twice in training only costs time in evaluation."""
    unit = chain_of("small").units[1]
    assert unit.forward_in(False, is_selective=True) is unit.eval_forward
    assert unit.forward_in(True, is_selective=True) is unit.selective_forward
    assert unit.forward_in(True) is unit.forward


# --- what it saves, and what it costs -------------------------------------------------


def forward_bytes(segment: Segment, plan: RecomputePlan) -> int:
    """Measure what a forward leaves to backward."""
    inputs, _ = batches_of(1, BATCH_SIZE, shape=(3, SIDE, SIDE))[0]
    with memory_cap(None) as meter:
        meter.track(segment, inputs)
        before = meter.live_bytes
        outputs = segment(inputs, streams=lambda *_: stream(1), recompute=plan)
        assert outputs.requires_grad
        return meter.live_bytes - before


def step_flops(segment: Segment, plan: RecomputePlan) -> tuple[int, int]:
    """Count a forward, and a whole step."""
    inputs, targets = batches_of(1, BATCH_SIZE, shape=(3, SIDE, SIDE))[0]
    with FlopCounterMode(display=False) as counter:
        outputs = segment(inputs, streams=lambda *_: stream(1), recompute=plan)
        forward = counter.get_total_flops()
        functional.cross_entropy(outputs, targets).backward()
    return forward, counter.get_total_flops()


@pytest.mark.every(3)
@pytest.mark.parametrize("name", MODELS)
def test_selective_units_keep_less_and_run_no_costly_operator_again(name):
    """Convolutions and products of matrices run once, but for tiny ones."""
    chain = chain_of(name)
    segment = chain.own_segment(0, len(chain)).train()
    plan = RecomputePlan((), selective_units(chain))
    kept = forward_bytes(segment, plan) / forward_bytes(segment, KEEP_ALL)
    assert kept < MODELS[name][1]
    forward, plain = step_flops(segment, KEEP_ALL)
    assert step_flops(segment, plan)[1] - plain <= 0.02 * forward
    if name in ("resnet18", "vit"):
        assert step_flops(segment, plan)[1] == plain


TASK = task_of(SmallNet, optimizer=OPTIMIZERS["momentum"], shape=(3, SIDE, SIDE))


@cache
def small_profile() -> ChainProfile:
    """Profile the small network."""
    return profile_chain(chain_of("small"), batch_size=BATCH_SIZE, task=TASK)


def measured_steps(chain: Chain, plan: RecomputePlan) -> list[StepBytes]:
    """Log a step with some units selective."""
    logger = StepLogger(chain, batch_size=BATCH_SIZE, task=TASK)
    steps, _ = step_bytes(chain, logger.log(plan))
    return [replace(step, rerun_flops=0) for step in steps]


@pytest.mark.every(4)
@pytest.mark.parametrize("picked", [(1,), (2,), (2, 3), (1, 3)])
def test_a_units_costs_do_not_depend_on_its_neighbours(picked):
    """Any units may be selective: the profile has the numbers of each, to the byte."""
    chain, units = chain_of("small"), small_profile().units
    selective_steps = tuple(
        selective_units(chain)[i] for i in range(3) if i + 1 in picked
    )
    assert len(selective_steps) == len(picked)
    expected = [
        unit.selective_step if index in selective_steps else unit.step
        for index, unit in enumerate(units)
    ]
    found = measured_steps(chain, RecomputePlan((), selective_steps))
    assert found == [replace(step, rerun_flops=0) for step in expected]


def test_the_profile_states_the_flops_that_run_again():
    """The sum over the units is what a whole step does more."""
    chain = chain_of("small")
    segment = chain.own_segment(0, len(chain)).train()
    plan = RecomputePlan((), selective_units(chain))
    more = step_flops(segment, plan)[1] - step_flops(segment, KEEP_ALL)[1]
    steps = [unit.selective_step for unit in small_profile().units]
    assert sum(step.rerun_flops for step in steps if step is not None) == more > 0


def test_a_unit_without_a_selective_forward_has_no_selective_step():
    """A unit of one operator has nothing between costly results."""
    for unit, cost in zip(chain_of("small").units, small_profile().units, strict=True):
        assert (unit.selective_forward is None) == (cost.selective_step is None)
        if cost.selective_step is not None:
            assert cost.selective_step.saved_bytes < cost.step.saved_bytes
    assert {unit.selective_forward is None for unit in chain_of("small").units} == {
        True,
        False,
    }


# --- which nodes ----------------------------------------------------------------------


class Block(nn.Module):
    """A block around which its input goes: one unit."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x


def last_conv() -> nn.Module:
    """Make what a block ends with."""
    return nn.Conv2d(4, 4, 3, padding=1)


class Counting(nn.Module):
    """Count the forwards, in a number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return functional.hardswish(x)


class Moving(nn.Module):
    """Keep a running mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return functional.hardswish(x)


class OwnStatistics(nn.Module):
    """Normalise without torch's module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.mean, self.variance, training=True)


class Attention(nn.Module):
    """Attention saves its output, so nothing before it can stop short of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(x)
        return functional.scaled_dot_product_attention(x, x, x)


@pytest.fixture
def regions(monkeypatch):
    """Trace a block and list the nodes of its regions."""
    found: list[list[str]] = []
    find = selective_checkpointing.find_regions

    def spy(*args: object) -> object:
        regions = find(*args)
        found.extend([node.name for node in region.nodes] for region in regions)
        return regions

    monkeypatch.setattr(selective_checkpointing, "find_regions", spy)

    def trace(model: nn.Module) -> list[list[str]]:
        Chain.from_module(model, torch.zeros(1, 4, 8, 8))
        return found

    return trace


def test_a_region_ends_with_the_convolution_that_needs_it(regions):
    """A normalisation and an activation run again, and the convolution stops that."""
    block = Block(nn.BatchNorm2d(4), nn.ReLU(inplace=True), last_conv())
    names = [["layers_1", "layers_2", "layers_3"]]
    assert regions(nn.Sequential(last_conv(), block)) == [
        [f"_1_{name}" for name in each] for each in names
    ]


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        Counting(),
        Moving(),
        OwnStatistics(),
        nn.InstanceNorm2d(4, track_running_stats=True),
        ops.StochasticDepth(0.5, "row"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_must_not_run_again_is_in_no_region(regions, layer):
    """What writes into a costly result, draws, or changes the model."""
    block = Block(layer, nn.Hardswish(), nn.BatchNorm2d(4), nn.Hardswish(), last_conv())
    found = regions(nn.Sequential(last_conv(), block))
    assert found
    assert not any("_1_layers_1" in names for names in found)


def test_attention_ends_no_region(regions):
    """To get what it saves, it would have to run again."""
    found = regions(Block(nn.BatchNorm2d(4), Attention(), last_conv()))
    assert not any("scaled" in name for names in found for name in names)


def test_a_selective_unit_keeps_no_input_that_it_would_not_keep_otherwise(regions):
    """Else what the unit before it keeps would depend on it."""

    class BeforeActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = last_conv()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(functional.relu(x))

    assert regions(nn.Sequential(last_conv(), BeforeActivation())) == []


# --- planted errors -------------------------------------------------------------------


def differences_of(model: nn.Module) -> list[str]:
    """Compare a selective step of a block with the plain one."""
    chain = Chain.from_module(model, torch.zeros(1, 3, SIDE, SIDE))
    plan = RecomputePlan((), selective_units(chain))
    assert plan.selective
    return compare(steps_of(chain, KEEP_ALL), steps_of(chain, plan))


def block_net(*layers: nn.Module) -> nn.Module:
    """Put a block where it can be trained."""
    flat = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), Block(*layers), *flat)


def test_a_region_that_writes_into_what_it_keeps_is_caught(monkeypatch):
    """Torch refuses to run it again; legal regions leave such an operator out."""
    layers = (nn.ReLU(inplace=True), nn.Hardswish(), nn.BatchNorm2d(4), last_conv())
    assert differences_of(block_net(*layers)) == []
    whole = lambda self, *run: iter([run])  # noqa: E731
    monkeypatch.setattr(selective_checkpointing._UnitGraph, "options", whole)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        differences_of(block_net(*layers))


def test_a_statistic_that_is_updated_twice_is_caught(monkeypatch):
    """A region that forgets its BatchNorm changes its buffers and counter."""
    layers = (nn.BatchNorm2d(4), nn.ReLU(), last_conv())
    assert differences_of(block_net(*layers)) == []
    monkeypatch.setattr(selective_checkpointing._UnitGraph, "norms", lambda *_: [])
    wrong = "\n".join(differences_of(block_net(*layers)))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert f"1.layers.1.{name}" in wrong


def test_a_costly_operator_inside_a_region_would_be_counted(monkeypatch):
    """If all operators passed for cheap, whole blocks would run twice."""
    monkeypatch.setattr(selective_checkpointing, "_is_cheap", lambda _: True)
    chain = Chain.from_module(seeded(SmallNet), torch.zeros(1, 3, SIDE, SIDE))
    segment = chain.own_segment(0, len(chain)).train()
    forward, plain = step_flops(segment, KEEP_ALL)
    plan = RecomputePlan((), selective_units(chain))
    assert step_flops(segment, plan)[1] - plain > 0.3 * forward


def test_without_its_rule_for_inputs_a_units_costs_would_depend_on_the_next(
    monkeypatch,
):
    """A region that takes the unit's input makes the unit before it keep that."""

    class BeforeActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(functional.relu(x))

    legal = selective_checkpointing._UnitGraph._is_legal

    def forgetful(self: object, *option: int) -> bool:
        self._closed = set()
        return legal(self, *option)

    monkeypatch.setattr(selective_checkpointing._UnitGraph, "_is_legal", forgetful)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), BeforeActivation(), nn.Flatten(), nn.Linear(7200, 10)
    )
    chain = Chain.from_module(net, torch.zeros(1, 3, SIDE, SIDE))
    (unit,) = selective_units(chain)
    plain = measured_steps(chain, KEEP_ALL)[unit - 1]
    beside = measured_steps(chain, RecomputePlan((), (unit,)))[unit - 1]
    assert beside.saved_bytes > plain.saved_bytes
