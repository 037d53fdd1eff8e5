"""Planning: how long it takes to plan a round for a large fleet, and what that misses.

The fleet is of measured phones; the model is torchvision's Swin-T, which can be cut in
40 places; labels and losses are drawn. Only the planner runs, nothing is trained.
"""

import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from random import Random
from statistics import median
from typing import Any

import numpy as np

from flwr_smartsplit import (
    Route,
    Selection,
    SelectionRequest,
    predicted_peak_bytes,
    profile_chain,
)
from flwr_smartsplit.plan.rounds import Routing, plan_round
from flwr_smartsplit.plan.selection.history import NO_HISTORY, History, Observation
from flwr_smartsplit.plan.selection.label_coverage import divergence
from flwr_smartsplit.plan.selection.utility import (
    BY_UTILITY,
    SelectByUtility,
    factors_of,
    normalised,
)
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import ChainProfile, DeviceProfile, EdgeProfile
from simulations.experiments.models import image_task, torchvision_model
from simulations.fleets.devices import Needs
from simulations.fleets.presets import phones

NUM_CLASSES = 10
BATCH_SIZE = 16
ROUND = 6
NUM_REPEATS = 5


def measure_planning(
    num_devices: int, num_selected: int, *, seed: int
) -> dict[str, Any]:
    """Plan the same round a few times; compare with a choice among all.

    Returns
    -------
    dict[str, Any]
        ``seconds`` is the median wall-clock time of a plan, ``first_seconds`` that of
        the first one, with plans that recompute; ``peak_mib`` the most
        that a plan allocates; ``regret`` the share of the utility that is lost by
        looking at the most promising clients only.
    """
    profile = _swin()
    fleet, history = _fleet(profile, num_devices, seed)
    edges = tuple(EdgeProfile(name=name, flops_per_second=2e11) for name in "ab")
    plan = partial(
        plan_round,
        fleet,
        {BATCH_SIZE: profile},
        round_number=ROUND,
        num_clients=num_selected,
        history=history,
    )
    routing = Routing(edges=edges)
    times = []
    for _ in range(1 + NUM_REPEATS):
        started = time.perf_counter()
        plan(routing=routing, rng=Random(seed))
        times.append(time.perf_counter() - started)
    tracemalloc.start()
    made = plan(routing=routing, rng=Random(seed))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    judge = _Judge()
    for considered in (BY_UTILITY.considered, num_devices):
        judge.rule = replace(BY_UTILITY, considered=considered)
        plan(routing=replace(routing, select=judge), rng=Random(seed))
    quick, thorough = judge.found
    return {
        "devices": num_devices,
        "cuts": len(profile.units) - 1,
        "selected": len(made.assignments),
        "unfit": len(made.unfit),
        "seconds": median(times[1:]),
        "first_seconds": times[0],
        "peak_mib": peak_bytes / 2**20,
        "regret": 1 - quick / thorough,
    }


def utility_of(
    rule: SelectByUtility, asked: SelectionRequest, chosen: Sequence[str]
) -> float:
    """Say what a set of clients is worth: what a choice by utility climbs.

    From 0, where the least promising client adds nothing, so that a share of it means
    something.
    """
    factors = factors_of(asked.candidates, asked)
    prior = (
        rule.loss * normalised(factors.loss)
        + rule.memory * normalised(factors.memory)
        + rule.speed * normalised(factors.speed)
        + rule.waiting * factors.waiting
    )
    prior -= prior.min()
    devices = [each.device for each in asked.candidates]
    counts = np.array([device.traits.label_counts for device in devices], np.float64)
    wanted = set(chosen)
    rows = [i for i, device in enumerate(devices) if device.client_key in wanted]
    target = counts.sum(axis=0) / counts.sum()
    covered = 1 - divergence(counts[rows].sum(axis=0), target) / np.log(2)
    return float(prior[rows].sum() + rule.coverage * asked.num_clients * covered)


class _Judge:
    """A selection that also notes what it is worth."""

    def __init__(self) -> None:
        self.rule = BY_UTILITY
        self.found: list[float] = []

    def __call__(self, request: SelectionRequest) -> Selection:
        selection = self.rule(request)
        keys = [each.client_key for each in selection.chosen]
        self.found.append(utility_of(self.rule, request, keys))
        return selection


def _swin() -> ChainProfile:
    task = image_task(partial(torchvision_model, "swin_t", num_classes=NUM_CLASSES))
    return profile_chain(build_chain(task), batch_size=BATCH_SIZE, task=task)


def _fleet(
    profile: ChainProfile, num_devices: int, seed: int
) -> tuple[list[DeviceProfile], History]:
    """Draw phones with data of their own, a third of whom have taken part before."""
    draw = np.random.default_rng(seed)
    cuts = range(1, len(profile.units))
    needs = Needs(
        whole_peak_bytes=predicted_peak_bytes(profile, Route.whole()),
        smallest_peak_bytes=min(
            predicted_peak_bytes(profile, Route.split(cut)) for cut in cuts
        ),
    )
    shares = draw.dirichlet(np.full(NUM_CLASSES, 0.1), size=num_devices)
    counts = np.ceil(shares * draw.integers(20, 400, size=(num_devices, 1))).astype(int)
    fleet = [
        DeviceProfile(
            client_key=str(index),
            budget_bytes=phone.budget_bytes,
            num_examples=int(own.sum()),
            batch_size=BATCH_SIZE,
            traits=replace(phone.traits, label_counts=tuple(own.tolist())),
        )
        for index, (phone, own) in enumerate(
            zip(phones(needs, num_devices, seed), counts, strict=True)
        )
    ]
    seen = draw.random(num_devices) < 1 / 3
    return fleet, NO_HISTORY.after(
        Observation(
            client_key=device.client_key,
            round_number=int(draw.integers(1, ROUND)),
            num_examples=device.num_examples,
            loss_rms=float(draw.uniform(0.1, 3)),
        )
        for device, was_there in zip(fleet, seen, strict=True)
        if was_there
    )
