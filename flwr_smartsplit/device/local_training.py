"""Train or evaluate one client for a round, under both of Flower's APIs."""

import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from flwr_smartsplit.device.batches import own_batch
from flwr_smartsplit.device.gradient_check import Ratings
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.device.step_timer import StepSeconds, StepTimer
from flwr_smartsplit.edge.client import Connect
from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.errors import (
    EdgeError,
    MemoryCapExceeded,
    NoFeasiblePlan,
    SmartSplitError,
)
from flwr_smartsplit.memory.allocator import keep_freed_memory
from flwr_smartsplit.memory.cap import CapMode, KindsOfSteps, MemoryCap, known_steps
from flwr_smartsplit.memory.process import (
    MemoryGrowth,
    process_fence,
    process_growth,
)
from flwr_smartsplit.profile.example_shapes import example_shapes
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.threads import torch_threads
from flwr_smartsplit.train.torch_device import CPU
from flwr_smartsplit.types import ClientPlan, Receipt, Shapes, Status, StepReport

Loader = Iterable[tuple[Any, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What stays the same for a client in every round."""

    task: Task
    connect: Connect
    cap_mode: CapMode | str = CapMode.SAMPLED
    meter_every: int = 50  # If sampled, the first two steps, then one in so many
    local_epochs: int = 1  # Passes over the training loader
    # Examples per step, if the loader has no ``batch_size``: edges reserve memory by it
    batch_size: int | None = None
    # Whether only this client uses its process's memory. Training then also measures
    # the resident set; the system refuses memory beyond the plan's budget and 32 MiB.
    owns_process: bool = False
    clock: Callable[[], float] = time.perf_counter  # Monotonic, in seconds
    # Called before each training step; may move the first cut or recompute more
    between_steps: Callable[[RouteRunner], None] | None = None
    step_seconds: StepSeconds | None = None  # Predicts steps' times; measured if None
    device: torch.device = CPU  # Where this client computes
    # What its cap allows beyond a plan's budget: see ``accelerator_overhead``
    spare_bytes: int = 0
    # Checks the gradients of edges, and holds what was found: see ``GradientCheck``
    ratings: Ratings | None = None
    # Of a defence's noise; a new one for each part of a round if None
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("meter_every", "local_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1.")
        CapMode(self.cap_mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A client's results of a round."""

    state: State  # Of its device segments; empty unless the report's status is OK
    receipts: tuple[Receipt, ...]  # For the tails at its edges
    report: StepReport


def train_locally(
    plan: ClientPlan, state: State, loader: Loader, conditions: Conditions
) -> Outcome:
    """Train one client for one round; ``state`` is that of its device segments.

    If it exceeds its cap or loses an edge, the report says so, with all measurements;
    no exception is raised.
    """
    start = conditions.clock()
    growth: AbstractContextManager[MemoryGrowth] = nullcontext(MemoryGrowth())
    if conditions.owns_process:
        growth = process_growth(conditions.device)
    else:
        keep_freed_memory()
    with torch_threads(plan.num_threads), growth as resident:
        runner = _route_runner(plan, conditions, is_trained=True)
        try:
            with _fence(plan, conditions):
                outcome = _trained(runner, state, loader, conditions)
        except (MemoryCapExceeded, NoFeasiblePlan, EdgeError) as error:
            runner.abandon()
            outcome = Outcome(
                state={}, receipts=(), report=_failure(runner, error, conditions.task)
            )
        except BaseException:
            runner.abandon()
            raise
    report = replace(
        outcome.report,
        resident_growth_bytes=resident.growth_bytes,
        seconds=conditions.clock() - start,
    )
    return replace(outcome, report=report)


def evaluate_locally(
    plan: ClientPlan, state: State, loader: Loader, conditions: Conditions
) -> StepReport:
    """Evaluate along the route, as ``train_locally`` trains; seal nothing."""
    start = conditions.clock()
    runner = _route_runner(plan, conditions, is_trained=False)
    token, size = uuid.uuid4().hex, _batch_size(loader, conditions)
    examples = conditions.task.example_targets
    with torch_threads(plan.num_threads):
        try:
            runner.open(state, conditions.connect, token=token, batch_size=size)
            for batch in runner.streams.batches(loader, 0):
                runner.evaluate_step(*own_batch(batch, examples))
            report = runner.report(num_epochs=1)
        except (MemoryCapExceeded, EdgeError) as error:
            report = _failure(runner, error, conditions.task)
        finally:
            runner.abandon()
    return replace(report, seconds=conditions.clock() - start)


def _trained(
    runner: RouteRunner, state: State, loader: Loader, conditions: Conditions
) -> Outcome:
    """Take a round's steps, all or until the edge lets the client stop."""
    token, size = uuid.uuid4().hex, _batch_size(loader, conditions)
    runner.open(state, conditions.connect, token=token, batch_size=size)
    for epoch in range(conditions.local_epochs):
        runner.metrics.begin_epoch()
        for batch in runner.streams.batches(loader, epoch):
            if runner.metrics.is_released(runner.advice):
                break
            if conditions.between_steps is not None:
                conditions.between_steps(runner)
            runner.train_step(*own_batch(batch, conditions.task.example_targets))
    return Outcome(
        receipts=runner.seal(),
        state=runner.state(),
        report=runner.report(num_epochs=conditions.local_epochs),
    )


def _fence(plan: ClientPlan, conditions: Conditions) -> AbstractContextManager[None]:
    """Limit the process's memory, if it is this client's and there is a budget."""
    extra_bytes = None
    if conditions.owns_process and plan.budget_bytes is not None:
        extra_bytes = plan.budget_bytes + conditions.spare_bytes
    client = f"client {plan.client_key}"
    return process_fence(extra_bytes, device=conditions.device, client=client)


def _route_runner(
    plan: ClientPlan, conditions: Conditions, *, is_trained: bool
) -> RouteRunner:
    cap = MemoryCap(
        plan.budget_bytes,
        name=f"client {plan.client_key}",
        mode=conditions.cap_mode,
        every=conditions.meter_every,
        device=conditions.device,
        spare_bytes=conditions.spare_bytes,
        known=_known_steps(plan, conditions, is_trained=is_trained),
    )
    return RouteRunner(
        plan,
        conditions.task,
        cap,
        is_trained=is_trained,
        timer=StepTimer(plan, clock=conditions.clock, given=conditions.step_seconds),
        device=conditions.device,
        ratings=conditions.ratings,
        noise_seed=conditions.noise_seed,
    )


def _known_steps(
    plan: ClientPlan, conditions: Conditions, *, is_trained: bool
) -> KindsOfSteps | None:
    """Return what this process knows of such steps; None if the task has no digest."""
    if not plan.task_digest:
        return None
    place = conditions.device, conditions.ratings is not None, is_trained
    variant = plan.variant.leading()  # Those of one size hold as much.
    how = plan.route, plan.recompute, variant, plan.codecs, plan.accumulate
    return known_steps(plan.task_digest, *place, *how)


def _failure(runner: RouteRunner, error: SmartSplitError, task: Task) -> StepReport:
    over = isinstance(error, MemoryCapExceeded | NoFeasiblePlan)
    report, message = runner.report(num_epochs=1), str(error)
    if over and report.example_shapes:
        message += (
            f" The examples have shapes up to {_text(report.example_shapes)}, and the "
            f"prediction is for {_text(example_shapes(task))}, those of the "
            "task: the next round is planned for the larger ones."
        )
    return replace(
        report,
        status=Status.OUT_OF_MEMORY if over else Status.EDGE_FAILED,
        message=message,
    )


def _text(shapes: Shapes) -> str:
    return ", ".join(map(str, shapes))


def _batch_size(loader: Loader, conditions: Conditions) -> int | None:
    """Return the examples per batch, if the loader or the client knows."""
    size = getattr(loader, "batch_size", None)
    return size if isinstance(size, int) else conditions.batch_size
