"""LocalEdge: an edge in this process, for tests and runs without Ray."""

import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flwr_smartsplit.edge.gate.gate import EdgeGate
from flwr_smartsplit.edge.hosts.edge import Edge, new_address
from flwr_smartsplit.edge.hosts.spill_folders import PREFIX, claim, delete_abandoned
from flwr_smartsplit.edge.protocol import LocalTransport
from flwr_smartsplit.errors import EdgeUnreachable
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.torch_device import as_device
from flwr_smartsplit.types import EDGE, EdgeProfile, Link

_edges: dict[str, tuple[EdgeGate, BinaryIO]] = {}


def LocalEdge(  # noqa: PLR0913 - what an edge offers, and where it runs
    *,
    name: str = EDGE,
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    flops_per_second: float | None = None,
    links: Mapping[str, Link] | None = None,
    room_patience_seconds: float = 60.0,
    device: str = "cpu",
) -> Edge:
    """Describe an edge in this process; see ``RayEdge`` for what it takes."""
    profile = EdgeProfile(
        name=name,
        memory_bytes=memory_bytes,
        disk_bytes=disk_bytes,
        flops_per_second=flops_per_second,
        links=links or {},
    )
    return Edge(profile, LocalHost(device), room_patience_seconds)


@dataclass(frozen=True, slots=True)
class LocalHost:
    """Run edges in this process; requests are passed as objects."""

    device: str = "cpu"

    def start(self, task: Task, profile: EdgeProfile) -> str:
        """Start an edge for one run; return its address."""
        device = as_device(self.device)
        address, parent = new_address(profile.name), Path(tempfile.gettempdir())
        delete_abandoned(parent)
        folder = parent / f"{PREFIX}{address}"
        lock = claim(folder)
        gate = EdgeGate(
            task,
            spill_dir=folder,
            incarnation=uuid.uuid4().hex,
            connect=lambda _, address: self.connect(address),
            profile=profile,
            device=device,
        )
        _edges[address] = (gate, lock)
        return address

    def connect(self, address: str) -> LocalTransport:
        """Reach the edge at an address of this process."""
        if address not in _edges:
            raise EdgeUnreachable(f"edge {address!r} does not run in this process.")
        return LocalTransport(_edges[address][0].handle)

    def stop(self, address: str) -> None:
        """Stop the edge and delete its files."""
        if address in _edges:
            with _edges.pop(address)[1] as lock:
                shutil.rmtree(Path(lock.name).parent, ignore_errors=True)
