"""LocalEdge: an edge in this process, for tests and runs without Ray."""

import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from flwr_smartsplit.edge.protocol import LocalTransport
from flwr_smartsplit.edge.retry import PatientTransport
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.errors import EdgeUnreachable
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE, EdgeProfile

_services: dict[str, EdgeService] = {}
_folders: dict[str, Path] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalEdge:
    """An edge that lives and dies with this process.

    Parameters
    ----------
    name : str
        The place's name in routes.
    memory_bytes, disk_bytes : int or None
        What its sessions and sealed tails may take; None means no limit.
    flops_per_second : float or None
        Floating-point operations it does in a second, for one client, for whoever
        plans; None if unknown.
    room_patience_seconds : float
        How long a client waits for room.
    """

    name: str = EDGE
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    flops_per_second: float | None = None
    room_patience_seconds: float = 60.0

    @property
    def profile(self) -> EdgeProfile:
        """What the edge offers."""
        return EdgeProfile(
            name=self.name,
            memory_bytes=self.memory_bytes,
            disk_bytes=self.disk_bytes,
            flops_per_second=self.flops_per_second,
        )

    def start(self, task: Task) -> str:
        """Start the edge for one run; return its address."""
        address = f"{self.name}-{uuid.uuid4().hex[:12]}"
        folder = Path(tempfile.mkdtemp(prefix="smartsplit-"))
        _folders[address] = folder
        _services[address] = EdgeService(
            task,
            spill_dir=folder,
            incarnation=uuid.uuid4().hex,
            connect=lambda _, address: _transport(address),
            profile=self.profile,
        )
        return address

    def connect(self, address: str) -> PatientTransport:
        """Reach the edge at an address of this process."""
        return PatientTransport(_transport(address), self.room_patience_seconds)

    def stop(self, address: str) -> None:
        """End the edge and delete its files."""
        _services.pop(address, None)
        folder = _folders.pop(address, None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _transport(address: str) -> LocalTransport:
    """Reach an edge for another one, which must not wait: its clients do."""
    if address not in _services:
        raise EdgeUnreachable(f"edge {address!r} does not run in this process.")
    return LocalTransport(_services[address].handle)
