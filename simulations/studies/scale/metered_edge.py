"""MeteredEdge: a real edge service whose tensors are counted, in this process.

It has the ``Edge`` protocol's methods. Only what the service itself makes is counted:
the meter is entered for each request, and left with the reply.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr_smartsplit.edge.client import Connect, nowhere
from flwr_smartsplit.edge.hosts.edge import BytesTransport, answered
from flwr_smartsplit.edge.message_bytes import Piece
from flwr_smartsplit.edge.protocol import ReplyT, Request
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.errors import EdgeUnreachable
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE, EdgeProfile


class MeteredEdge:
    """Host sessions and count the bytes of their tensors."""

    def __init__(
        self,
        task: Task,
        folder: Path,
        *,
        profile: EdgeProfile | None = None,
        connect: Connect = nowhere,
    ) -> None:
        self.profile = EdgeProfile(name=EDGE) if profile is None else profile
        self.folder = folder
        self.meter = MemoryMeter()
        self.service = EdgeService(
            task,
            spill_dir=folder,
            incarnation="metered",
            connect=connect,
            profile=self.profile,
        )

    @property
    def name(self) -> str:
        """The place's name in routes."""
        return self.profile.name

    @property
    def disk_bytes(self) -> int:
        """What its sealed tails take on disk, headers included."""
        return sum(path.stat().st_size for path in self.folder.glob("*.tail.*"))

    def start(self, task: Any) -> str:
        """Return its address; it runs already."""
        del task
        return self.name

    def connect(self, address: str) -> "MeteredTransport":
        """Reach it."""
        if address != self.name:
            raise EdgeUnreachable(f"no edge at {address!r}; this one is {self.name!r}.")
        return MeteredTransport(self)

    def stop(self, address: str) -> None:
        """Do nothing: whoever made the folder deletes it."""


@dataclass(frozen=True, slots=True)
class MeteredTransport:
    """Call a metered edge."""

    edge: MeteredEdge

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Answer a request under the edge's meter.

        It goes there as bytes and to a thread of its own, as to another process: what
        it shared with its sender would be counted for both.
        """
        return BytesTransport(self._carry).send(request)

    def _carry(self, pieces: list[Piece]) -> list[Piece]:
        with ThreadPoolExecutor(max_workers=1) as aside:
            return [aside.submit(self._answer, b"".join(pieces)).result()]

    def _answer(self, sent: bytes) -> bytes:
        with self.edge.meter:
            return b"".join(answered(self.edge.service.handle, sent))
