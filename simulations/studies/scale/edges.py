"""What an edge holds while more and more clients are selected, two training at a time.

Every client opens a session, trains two steps and seals, on a real ``EdgeService``
whose tensors are counted. The devices are left out: each step brings the same
boundary, which the model's first units made once.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flwr_smartsplit import Task
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import EdgeClient
from flwr_smartsplit.edge.tensors import WireTensor, state_digest
from flwr_smartsplit.plan.tail_memory import TailBytes, tail_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.split.segment import Boundary, as_boundary
from flwr_smartsplit.types import EDGE, EdgeProfile
from simulations.experiments.models import (
    image_network,
    image_task,
    torchvision_model,
)
from simulations.studies.scale.metered_edge import MeteredEdge

NUM_CLASSES, BATCH_SIZE, SIDE = 10, 16, 32
AT_ONCE, NUM_STEPS = 2, 2
PAPER_BYTES, PAPER_CLIENTS = 80_000_000_000, 100
"""What MP-SL's paper says of VGG-19 with 100 participants at one node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeCase:
    """A model whose tails are hosted."""

    title: str  # Its name
    model_fn: Callable[[], nn.Module]  # For colour images of 32 x 32 in ten classes
    cut: int  # The first unit at the edge

    @property
    def task(self) -> Task:
        """Return what the edge builds its part from: SGD with momentum."""
        return image_task(self.model_fn, side=SIDE)


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    """Return what builds one of torchvision's models."""
    return partial(torchvision_model, name, num_classes=NUM_CLASSES)


SMALL = EdgeCase(title="small network", model_fn=image_network, cut=3)
RESNET18 = EdgeCase(title="ResNet-18", model_fn=of_torchvision("resnet18"), cut=4)
VGG19 = EdgeCase(title="VGG-19", model_fn=of_torchvision("vgg19"), cut=5)


def needed_bytes(case: EdgeCase) -> TailBytes:
    """Predict what one client takes at the edge."""
    task = case.task
    profile = profile_of(task, batch_size=BATCH_SIZE)
    return tail_bytes(profile, case.cut, len(build_chain(task)))


def measure_edge(case: EdgeCase, num_clients: int, *, seed: int) -> dict[str, Any]:
    """Train the tails of many clients, two at a time, within a budget for two.

    ``points`` has, for each number of clients that were sealed so far, the most bytes
    in memory, and those on disk.
    """
    need, points = needed_bytes(case), []
    with _metered_edge(case, AT_ONCE * need.memory_bytes) as edge:
        state, boundary, request = _first_batch(case, seed)
        digest = state_digest(state)
        edge.service.handle(wire.HoldState(digest, state))
        del state
        open_session = partial(_opened, edge, case, digest)
        for first in range(0, num_clients, AT_ONCE):
            clients = range(first, min(first + AT_ONCE, num_clients))
            links = [open_session(client) for client in clients]
            for number in range(NUM_STEPS):
                for link in links:
                    sent = link.outward.encode(boundary)
                    link.pass_on(replace(request, step=number, boundary=sent))
            for client, link in zip(clients, links, strict=True):
                link.seal(NUM_STEPS, None)
                points.append((client + 1, edge.meter.peak_bytes, edge.disk_bytes))
    return {
        "batch_size": BATCH_SIZE,
        "cut": case.cut,
        "clients_at_once": AT_ONCE,
        "predicted": need._asdict(),
        "points": points,
    }


def work_out_vgg19(measured: dict[str, Any] | None = None) -> dict[str, Any]:
    """Work out 100 clients of VGG-19 from what one of them takes."""
    need = needed_bytes(VGG19)
    return {
        "is_worked_out": True,
        "clients": PAPER_CLIENTS,
        "batch_size": BATCH_SIZE,
        "session": need._asdict(),
        "memory_bytes": AT_ONCE * need.memory_bytes,
        "disk_bytes": PAPER_CLIENTS * need.disk_bytes,
        "all_at_once_bytes": PAPER_CLIENTS * need.memory_bytes,
        "paper_bytes": PAPER_BYTES,
        "measured": measured,
    }


@contextmanager
def _metered_edge(case: EdgeCase, memory_bytes: int) -> Iterator[MeteredEdge]:
    folder = Path(tempfile.mkdtemp(prefix="smartsplit-scale-"))
    profile = EdgeProfile(name=EDGE, memory_bytes=memory_bytes)
    try:
        yield MeteredEdge(case.task, folder, profile=profile)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _first_batch(
    case: EdgeCase, seed: int
) -> tuple[wire.State, Boundary, wire.Forward]:
    """Draw a state and a batch, and bring it up to the cut."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        state = state_of(case.model_fn())
        inputs = torch.randn(BATCH_SIZE, 3, SIDE, SIDE)
        front = materialise(build_chain(case.task), 0, case.cut, state)
        boundary = as_boundary(front(inputs))
    targets: Tensor = torch.arange(BATCH_SIZE) % NUM_CLASSES
    request = wire.Forward(
        step=0, targets=WireTensor.pack(targets), num_examples=BATCH_SIZE
    )
    return state, boundary, request


def _opened(edge: MeteredEdge, case: EdgeCase, digest: str, client: int) -> EdgeClient:
    opening = wire.OpenSession(
        session=f"1/{client}/{EDGE}",
        place=EDGE,
        round_number=1,
        client_key=str(client),
        start=case.cut,
        stop=len(build_chain(case.task)),
        state_digest=digest,
        seed=0,
        num_threads=1,
        token="t",
        batch_size=BATCH_SIZE,
    )
    return EdgeClient(edge.connect(EDGE), opening)
