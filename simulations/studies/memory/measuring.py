"""Measure one case: the row of a results file."""

import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from flwr_smartsplit import Task, profile_chain
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.plan.checkpointing.plan import extra_flops
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.train.micro_batches import micro_batch_size
from flwr_smartsplit.types import ChainProfile, Route
from simulations.studies.memory.cases import BATCH_SIZE, OPTIMIZER, MemoryCase
from simulations.studies.memory.choosing import (
    Choice,
    Point,
    all_cuts,
    floor_parts,
    floor_text,
    flops_fraction,
    least_choice,
    plan_curves,
    useful_cuts,
)
from simulations.studies.memory.stepping import (
    Batch,
    arriving_gradient,
    dry_whole_peak_bytes,
    measured_peak_bytes,
    measured_whole_peak_bytes,
    random_batch,
    runner_of,
    timed_steps,
)

MAX_DEVICE_BYTES = 3 * 2**30
MAX_DEVICE_FLOPS = 300 * 10**9
"""A device's part of a step is run for real up to here; beyond, it is predicted."""
MAX_WHOLE_BYTES = 2 * 2**30
MAX_WHOLE_FLOPS = 30 * 10**9
"""The whole model is run for real, and steps are timed, up to here."""
MAX_TIMED_SECONDS = 20.0
ACCUMULATE = (8, 32)
"""Micro-batches of a batch of 32, of four examples and of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFigures:
    """What a device needs along one route."""

    cut: int  # Where the device ends
    unit: str  # Its last unit
    plan: str  # What it runs twice
    peak_bytes: int  # Measured, or predicted where it was not run
    predicted_bytes: int  # What the profile says
    is_measured: bool  # Whether it was run
    boundary_bytes: int  # Size of what crosses the cut, each way
    flops_fraction: float  # The device's share of the model's forward FLOPs
    extra_flops_fraction: float  # What the plan adds, over the model's forward FLOPs


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """What one case gave."""

    model: str
    family: str
    input_side: int
    seed: int
    batch_size: int
    optimizer: str
    num_units: int
    num_parameters: int
    forward_flops: int
    whole_peak_bytes: int  # A dry run of a plain step of the whole model
    whole_lean_bytes: int  # The same of our step, without recomputation
    whole_measured_bytes: int | None  # The plain step, really run
    least: RouteFigures  # The route that needs least of all
    useful: RouteFigures | None  # That of ``useful_cuts`` that needs least
    floor_bytes: int  # What no cut can go below
    floor_parts: dict[str, int]  # What it is made of
    floor_text: str  # Why the least is above it
    # CPU time of plain whole steps, each with that of the split one next to it
    step_seconds: list[tuple[float, float]] = field(default_factory=list)
    # Of each rule: predicted peaks and extra FLOPs at the useful cut
    curves: dict[str, list[Point]] = field(default_factory=dict)
    # The least route of all in so many micro-batches, by their number
    accumulated: dict[str, RouteFigures] = field(default_factory=dict)
    case_seconds: float = 0.0  # How long all this took

    @property
    def title(self) -> str:
        """What it is called in pictures and tables."""
        return f"{self.model}, {self.input_side} px"

    @property
    def ratio(self) -> float:
        """How many times less the least route needs than a plain whole step."""
        return self.whole_peak_bytes / self.least.peak_bytes

    @property
    def useful_ratio(self) -> float | None:
        """The same for the useful route."""
        if self.useful is None:
            return None
        return self.whole_peak_bytes / self.useful.peak_bytes

    @property
    def accumulated_ratio(self) -> float | None:
        """The same for the least route in the most micro-batches."""
        peaks = [figures.peak_bytes for figures in self.accumulated.values()]
        return self.whole_peak_bytes / min(peaks) if peaks else None

    @property
    def step_time_ratio(self) -> float | None:
        """How many times as long a split step takes, by the medians of both."""
        if not self.step_seconds:
            return None
        whole = statistics.median(pair[0] for pair in self.step_seconds)
        return statistics.median(pair[1] for pair in self.step_seconds) / whole

    def values(self) -> dict[str, Any]:
        """Return all of it as JSON values, with the figures that follow from others."""
        return asdict(self) | {
            "device_peak_bytes": self.least.peak_bytes,
            "predicted_bytes": self.least.predicted_bytes,
            "is_measured": self.least.is_measured,
            "ratio": self.ratio,
            "useful_ratio": self.useful_ratio,
            "extra_flops_fraction": self.useful and self.useful.extra_flops_fraction,
            "step_time_ratio": self.step_time_ratio,
        }

    @classmethod
    def from_values(cls, read: Mapping[str, Any]) -> Self:
        """Read what ``values`` wrote, also by way of JSON."""
        kept = {name: read[name] for name in cls.__dataclass_fields__ if name in read}
        kept["accumulated"] = {
            count: RouteFigures(**figures)
            for count, figures in kept.get("accumulated", {}).items()
        }
        kept["least"] = RouteFigures(**kept["least"])
        kept["useful"] = kept["useful"] and RouteFigures(**kept["useful"])
        kept["step_seconds"] = [tuple(pair) for pair in kept["step_seconds"]]
        kept["curves"] = {
            rule: [(int(peak), float(extra)) for peak, extra in points]
            for rule, points in kept["curves"].items()
        }
        return cls(**kept)


@dataclass(frozen=True, slots=True)
class _Subject:
    """A case with its chain, profile and batch."""

    case: MemoryCase
    task: Task
    chain: Chain
    profile: ChainProfile
    batch: Batch

    @property
    def forward_flops(self) -> int:
        return sum(unit.forward_flops for unit in self.profile.units)


def measure_case(case: MemoryCase, *, cache_dir: Path | None = None) -> MemoryRow:
    """Find, measure and time the routes of one model."""
    started = time.perf_counter()
    task = case.task
    subject = _subject(case, task, cache_dir)
    chain, profile, batch = subject.chain, subject.profile, subject.batch
    least = _least(subject)
    useful = least_choice(profile, useful_cuts(profile, batch[0].nbytes))
    figures = _figures(subject, least)
    whole_bytes = dry_whole_peak_bytes(chain, task, batch_size=BATCH_SIZE)
    parts = floor_parts(profile)
    return MemoryRow(
        model=case.model,
        family=case.family,
        input_side=case.input_side,
        seed=case.seed,
        batch_size=BATCH_SIZE,
        optimizer=OPTIMIZER,
        num_units=len(chain),
        num_parameters=sum(p.numel() for p in chain.model.parameters()),
        forward_flops=subject.forward_flops,
        whole_peak_bytes=whole_bytes,
        whole_lean_bytes=profile.units[-1].device_peak_bytes,
        least=figures,
        useful=None if useful is None else _figures(subject, useful),
        floor_bytes=sum(parts.values()),
        floor_parts=parts,
        floor_text=floor_text(profile, cut=least.cut, peak_bytes=figures.peak_bytes),
        curves=plan_curves(profile, useful.cut) if useful and case.has_curves else {},
        **_whole_runs(subject, useful, whole_bytes),
        accumulated=_accumulated(case, cache_dir),
        case_seconds=time.perf_counter() - started,
    )


def _accumulated(case: MemoryCase, cache_dir: Path | None) -> dict[str, RouteFigures]:
    """Measure the least cut with gradients accumulated, by the number of micro-batches.

    BatchNorm trains on no micro-batch of one value a channel: that number is left out.
    """
    found = {}
    for count in ACCUMULATE:
        task = replace(case.task, accumulate=count)
        with suppress(InvalidTask):
            subject = _subject(case, task, cache_dir)
            found[str(count)] = _figures(subject, _least(subject))
    return found


def _subject(case: MemoryCase, task: Task, cache_dir: Path | None) -> _Subject:
    chain = build_chain(task)
    profile = profile_chain(
        chain, batch_size=BATCH_SIZE, task=task, cache_dir=cache_dir
    )
    batch = random_batch(task, batch_size=BATCH_SIZE, seed=case.seed)
    return _Subject(case, task, chain, profile, batch)


def _least(subject: _Subject) -> Choice:
    least = least_choice(subject.profile, all_cuts(subject.profile))
    if least is None:
        raise ValueError(f"{subject.case.model} is one unit: nothing can be cut.")
    return least


def _figures(subject: _Subject, choice: Choice) -> RouteFigures:
    """Measure a route, if it is small enough to be run."""
    profile, last = subject.profile, subject.profile.units[choice.cut - 1]
    own = sum(unit.forward_flops for unit in profile.units[: choice.cut])
    extra = extra_flops(profile, Route.split(choice.cut), choice.plan)
    is_run = (
        choice.predicted_bytes <= MAX_DEVICE_BYTES and own + extra <= MAX_DEVICE_FLOPS
    )
    return RouteFigures(
        cut=choice.cut,
        unit=last.name,
        plan=str(choice.plan),
        peak_bytes=_measured(subject, choice) if is_run else choice.predicted_bytes,
        predicted_bytes=choice.predicted_bytes,
        is_measured=is_run,
        boundary_bytes=last.boundary_bytes,
        flops_fraction=flops_fraction(profile, choice.cut),
        extra_flops_fraction=extra / max(subject.forward_flops, 1),
    )


def _measured(subject: _Subject, choice: Choice) -> int:
    """Run a device's part of two steps, and meter the second."""
    chain, task = subject.chain, subject.task
    runner = runner_of(
        chain, task, range(choice.cut), seed=subject.case.seed, steps_in_backward=True
    )
    runner.recompute = choice.plan
    size = micro_batch_size(BATCH_SIZE, task.accumulate)
    gradient = arriving_gradient(chain, choice.cut, task, batch_size=size)
    return measured_peak_bytes(runner, subject.batch, gradient)


def _whole_runs(
    subject: _Subject, useful: Choice | None, whole_bytes: int
) -> dict[str, Any]:
    """Run the whole model and time it beside the useful route, if small enough."""
    chain, task, batch = subject.chain, subject.task, subject.batch
    if whole_bytes > MAX_WHOLE_BYTES or subject.forward_flops > MAX_WHOLE_FLOPS:
        return {"whole_measured_bytes": None}
    runs: dict[str, Any] = {
        "whole_measured_bytes": measured_whole_peak_bytes(chain, task, batch)
    }
    if useful is not None:
        runs["step_seconds"] = timed_steps(
            chain,
            task,
            batch,
            cut=useful.cut,
            plan=useful.plan,
            max_seconds=MAX_TIMED_SECONDS,
        )
    return runs
