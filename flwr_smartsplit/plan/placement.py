"""Placing: which edge hosts the rest of a client's model."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flwr_smartsplit.plan.timing import round_seconds
from flwr_smartsplit.types import DeviceProfile, EdgeProfile, RouteOption

NEAR = 1.1
"""An edge is as good as the fastest one if a round over it takes at most this much of
that one's time."""


@dataclass
class Places:
    """The edges of a round, and what is taken of them while it is planned."""

    edges: Sequence[EdgeProfile]
    _clients: Counter[str] = field(init=False, default_factory=Counter)
    _memory_bytes: Counter[str] = field(init=False, default_factory=Counter)
    _disk_bytes: Counter[str] = field(init=False, default_factory=Counter)

    def place(
        self, device: DeviceProfile, options: Iterable[RouteOption], home: str | None
    ) -> RouteOption | None:
        """Give a client the first option for which an edge has room; None if none has.

        Options come most wanted first; ``home`` is the edge where the client was
        before.
        """
        for option in options:
            if option.is_placed or not option.route.cuts:
                return option.at(None)
            edge = self._find(device, option, home)
            if edge is not None:
                self._clients[edge.name] += 1
                self._memory_bytes[edge.name] += option.edge_memory_bytes
                self._disk_bytes[edge.name] += option.edge_disk_bytes
                return option.at(edge.name)
        return None

    def _find(
        self, device: DeviceProfile, option: RouteOption, home: str | None
    ) -> EdgeProfile | None:
        """Choose an edge that has room; None if none has.

        Of the edges over which the client is about as fast: the one where it was
        before, unless another has at least two clients fewer; else the one with the
        fewest.
        """
        free = [edge for edge in self.edges if self._has_room(edge, option)]
        if not free:
            return None
        seconds = {e.name: round_seconds(option.work, device, e) or 0.0 for e in free}
        limit = NEAR * min(seconds.values())
        near = [edge for edge in free if seconds[edge.name] <= limit]
        fewest = min(self._clients[edge.name] for edge in near)
        for edge in near:
            if edge.name == home and self._clients[home] <= fewest + 1:
                return edge
        return next(edge for edge in near if self._clients[edge.name] == fewest)

    def _has_room(self, edge: EdgeProfile, option: RouteOption) -> bool:
        memory = self._memory_bytes[edge.name] + option.edge_memory_bytes
        disk = self._disk_bytes[edge.name] + option.edge_disk_bytes
        return (edge.memory_bytes is None or memory <= edge.memory_bytes) and (
            edge.disk_bytes is None or disk <= edge.disk_bytes
        )
