"""LocalEdge: an edge in this process, for tests and runs without Ray."""

import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from flwr_smartsplit.errors import EdgeUnreachable
from flwr_smartsplit.runtime.edge import EdgeService
from flwr_smartsplit.runtime.transport import LocalTransport
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE

_services: dict[str, EdgeService] = {}
_folders: dict[str, Path] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalEdge:
    """An edge that lives and dies with this process.

    Parameters
    ----------
    name : str
        The place's name in routes.
    """

    name: str = EDGE

    def start(self, task: Task) -> str:
        """Start the edge for one run; return its address."""
        address = f"{self.name}-{uuid.uuid4().hex[:12]}"
        folder = Path(tempfile.mkdtemp(prefix="smartsplit-"))
        _folders[address] = folder
        _services[address] = EdgeService(
            task,
            spill_dir=folder,
            incarnation=uuid.uuid4().hex,
            connect=lambda place, address: LocalEdge(name=place).connect(address),
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
