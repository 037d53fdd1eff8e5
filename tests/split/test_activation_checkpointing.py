"""Units that run twice: every number stays the same, and less is held."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit import Route, plan_recompute, predicted_peak_bytes, profile_chain
from flwr_smartsplit.errors import InvalidPlan
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.plan.checkpointing.plan import least_bytes
from flwr_smartsplit.split import activation_checkpointing as recompute
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.split.segment import no_streams
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.types import KEEP_ALL, RecomputePlan, Rerun
from tests.models import OPTIMIZERS, batches_of, seeded, small_cnn, task_of
from tests.plan.stage_chains import nested
from tests.tasks import differences

STREAMS = UnitStreams(0, 1, "a")
SHAPE = (3, 6, 6)
OPTIMIZER_NAMES = ["sgd", "momentum", "adam"]


class ByChannel(nn.Module):
    """Layer norm over the channels of images."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


LAYERS: dict[str, Callable[[], Sequence[nn.Module]]] = {
    "batch norm": lambda: [nn.BatchNorm2d(4)],
    "average of all batches": lambda: [nn.BatchNorm2d(4, momentum=None)],
    "batch norm of several devices": lambda: [nn.SyncBatchNorm(4)],
    "instance norm": lambda: [nn.InstanceNorm2d(4, track_running_stats=True)],
    "group norm": lambda: [nn.GroupNorm(2, 4)],
    "layer norm": lambda: [ByChannel(4)],
    "dropout": lambda: [nn.Dropout(0.4)],
    "in place": lambda: [nn.BatchNorm2d(4), nn.ReLU(inplace=True)],
}


def network(layers: str) -> nn.Module:
    """Build a chain with some layers between two convolutions."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            *LAYERS[layers](),
            nn.Conv2d(4, 4, 3),
            nn.SiLU(),
            nn.Sequential(nn.Flatten(), nn.Linear(16, 10)),
        )
    )


def trained(
    task: Task,
    plan: RecomputePlan,
    *,
    steps_in_backward: bool = True,
    streams: object = STREAMS,
    shape: tuple[int, ...] = SHAPE,
) -> tuple[list[float], dict[str, object], int]:
    """Train three steps; return losses, state and the peak."""
    chain = build_chain(task)
    segment = materialise(chain, 0, len(chain), initial(task))
    runner = SegmentRunner(
        segment, task, streams=streams, steps_in_backward=steps_in_backward
    )
    runner.recompute = plan
    losses, meter = [], MemoryMeter()
    for step, (inputs, targets) in enumerate(batches_of(3, 4, shape=shape)):
        meter.track(segment, runner.optimizer, inputs, targets)
        with meter:
            loss, _ = runner.finish(
                inputs, targets, step=step, inputs_are_boundary=False
            )
        losses.append(float(loss))
        meter.forget(inputs, targets)
    return losses, state_of(segment), meter.peak_bytes


@cache
def initial(task: Task) -> dict[str, object]:
    """Take a task's first state."""
    return state_of(task.model_fn())


@cache
def task_with(layers: str, optimizer: str) -> Task:
    """Make the task of one small network."""
    make = OPTIMIZERS[optimizer]
    return task_of(partial(network, layers), optimizer=make, shape=SHAPE)


@cache
def truth(layers: str, optimizer: str) -> tuple[list[float], dict[str, object], int]:
    """Train without anything that is ours: no lean step, nothing twice."""
    return trained(task_with(layers, optimizer), KEEP_ALL, steps_in_backward=False)


PLANS = [RecomputePlan(parts) for parts in nested(0, 4)]
EACH = 12
"""Each layer and optimizer runs every twelfth plan; all together run all plans."""


def test_there_are_plans_of_every_shape():
    """Flat, side by side, and three deep."""
    depths = {max(plan.num_runs(unit) for unit in range(4)) for plan in PLANS}
    assert {1, 2, 3, 4} <= depths
    assert KEEP_ALL in PLANS
    assert RecomputePlan((Rerun(0, 2), Rerun(2, 4))) in PLANS


@pytest.mark.every(4)
@pytest.mark.parametrize("optimizer", OPTIMIZER_NAMES)
@pytest.mark.parametrize("layers", LAYERS)
def test_every_plan_gives_the_plain_steps_numbers(layers, optimizer):
    """Losses, parameters, statistics and counters are equal to the bit."""
    task = task_with(layers, optimizer)
    assert len(build_chain(task)) >= 4
    losses, state, _ = truth(layers, optimizer)
    turn = 3 * list(LAYERS).index(layers) + OPTIMIZER_NAMES.index(optimizer)
    for plan in PLANS[turn % EACH :: EACH]:
        found = trained(task, plan)
        assert found[0] == losses, plan
        assert differences(found[1], state) == [], plan


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_can_go_wrong_in_a_cut_goes_right_in_a_rerun(dtype):
    """Three random operators, a block, in-place, and mixed precision."""
    task = task_of(small_cnn, optimizer=OPTIMIZERS["momentum"])
    object.__setattr__(task, "autocast_dtype", dtype)
    losses, state, _ = trained(
        task, KEEP_ALL, steps_in_backward=False, shape=(3, 12, 12)
    )
    plan = RecomputePlan((Rerun(0, 2), Rerun(2, 9, (Rerun(3, 6, (Rerun(4, 5),)),))))
    found = trained(task, plan, shape=(3, 12, 12))
    assert found[0] == losses
    assert differences(found[1], state) == []


def test_a_rerun_holds_less():
    """What is run again is not kept."""
    plan = RecomputePlan((Rerun(0, 2),))
    shape = (3, 12, 12)
    task = task_of(small_cnn)
    assert trained(task, plan, shape=shape)[2] < trained(task, KEEP_ALL, shape=shape)[2]


def test_without_streams_torchs_own_generator_is_put_back():
    """A segment that is used by itself draws the same masks again."""
    task = task_with("dropout", "sgd")
    found = []
    for plan in (KEEP_ALL, RecomputePlan((Rerun(0, 4),))):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            found.append(trained(task, plan, streams=no_streams))
    assert found[0][0] == found[1][0]
    assert differences(found[0][1], found[1][1]) == []


# --- planted errors -------------------------------------------------------------------

TWICE = RecomputePlan((Rerun(0, 3),))


def test_a_statistic_that_is_updated_twice_is_seen(monkeypatch):
    """Mean, variance and counter."""
    monkeypatch.setattr(recompute, "statistics_kept", lambda root: nullcontext())
    found = trained(task_with("batch norm", "sgd"), TWICE)
    changed = differences(found[1], truth("batch norm", "sgd")[1])
    assert [name for name in changed if "running_mean" in name]
    assert [name for name in changed if "num_batches_tracked" in name]


def test_a_random_stream_that_is_lost_is_seen(monkeypatch):
    """The second mask is another one, and the gradients with it."""
    task, calls = task_with("dropout", "sgd"), []

    def lost(step: int, unit: int) -> object:
        calls.append((step, unit))
        return STREAMS(step + 100 * calls.count((step, unit)), unit)

    once = trained(task, KEEP_ALL, streams=lost)
    calls.clear()
    twice = trained(task, TWICE, streams=lost)
    assert differences(once[1], twice[1]) != []


# --- what must not run twice ----------------------------------------------------------


class Counting(nn.Module):
    """Count batches in a buffer, which it changes or replaces."""

    def __init__(self, *, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.replaces:
            self.seen = self.seen + 1
        else:
            self.seen.add_(1)
        return x * 2


@pytest.mark.parametrize("replaces", [False, True])
def test_a_unit_that_counts_is_never_run_twice(replaces):
    """Its costs say so, and no plan has it; a BatchNorm may be run again."""

    def model() -> nn.Module:
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
        return nn.Sequential(*layers, Counting(replaces=replaces), nn.Conv2d(4, 4, 3))

    task = task_of(partial(seeded, model), shape=SHAPE)
    task = replace(task, loss_fn=lambda outputs, targets: outputs.mean())
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=4, task=task)
    able = [unit.step.can_rerun for unit in profile.units]
    counting = chain.unit_names.index("3")
    assert able == [index != counting for index in range(len(chain))]
    route = Route.split(len(chain) - 1)
    plan = plan_recompute(profile, route, budget_bytes=least_bytes(profile, route))
    assert plan.num_runs(counting) == 1
    with pytest.raises(InvalidPlan, match="must not run twice"):
        predicted_peak_bytes(profile, route, RecomputePlan((Rerun(0, len(chain) - 1),)))
