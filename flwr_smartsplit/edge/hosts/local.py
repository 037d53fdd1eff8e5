"""LocalEdge: an edge in this process, for tests and runs without Ray."""

import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.protocol import LocalTransport
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.errors import EdgeUnreachable
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE, EdgeProfile

_services: dict[str, EdgeService] = {}
_folders: dict[str, Path] = {}


def LocalEdge(
    *,
    name: str = EDGE,
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    flops_per_second: float | None = None,
    room_patience_seconds: float = 60.0,
) -> Edge:
    """Describe an edge that lives and dies with this process.

    Parameters
    ----------
    name, memory_bytes, disk_bytes, flops_per_second
        As in ``EdgeProfile``.
    room_patience_seconds : float
        How long a client waits for room.
    """
    profile = EdgeProfile(
        name=name,
        memory_bytes=memory_bytes,
        disk_bytes=disk_bytes,
        flops_per_second=flops_per_second,
    )
    return Edge(profile, LocalHost(), room_patience_seconds)


@dataclass(frozen=True, slots=True)
class LocalHost:
    """Run edges in this process; requests are handed over as they are."""

    def start(self, task: Task, profile: EdgeProfile) -> str:
        """Start an edge for one run; return its address."""
        address = f"{profile.name}-{uuid.uuid4().hex[:12]}"
        folder = Path(tempfile.mkdtemp(prefix="smartsplit-"))
        _folders[address] = folder
        _services[address] = EdgeService(
            task,
            spill_dir=folder,
            incarnation=uuid.uuid4().hex,
            connect=lambda _, address: self.connect(address),
            profile=profile,
        )
        return address

    def connect(self, address: str) -> LocalTransport:
        """Reach the edge at an address of this process."""
        if address not in _services:
            raise EdgeUnreachable(f"edge {address!r} does not run in this process.")
        return LocalTransport(_services[address].handle)

    def stop(self, address: str) -> None:
        """End the edge and delete its files."""
        _services.pop(address, None)
        folder = _folders.pop(address, None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
