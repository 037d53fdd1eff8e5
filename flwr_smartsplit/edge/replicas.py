"""Replicas: one copy of some units for everybody who predicts with them.

Nothing of a model changes while it predicts, so any number of sessions can have one
copy. It runs one batch at a time: so an edge needs memory for one, however many ask.
"""

from collections.abc import Callable
from itertools import chain as joined
from threading import Lock
from types import TracebackType
from weakref import WeakValueDictionary

from flwr_smartsplit.edge.protocol import OpenSession
from flwr_smartsplit.errors import EdgeError
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Segment


def replica_name(request: OpenSession, chain: Chain) -> str:
    """Name the copy that a session shares; "" if it has one of its own.

    That is so in training and evaluation, and where running the units changes them, as
    a counter does: then each client must see what its own batches changed.
    """
    if not request.predicts or not chain.is_constant(request.start, request.stop):
        return ""
    return f"{request.state_digest} {request.start}:{request.stop} {request.variant}"


class Replica:
    """A segment in evaluation mode; enter it to run it."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._turn = Lock()
        named = segment.named_parameters(), segment.named_buffers()
        self._tensors = dict(joined(*named))
        self._versions = self._now()

    def __enter__(self) -> None:
        self._turn.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        now = self._now()
        self._turn.release()
        changed = [name for name in now if now[name] != self._versions[name]]
        if changed:
            raise EdgeError(
                f"the model changes {', '.join(changed[:3])} when it predicts, in a "
                "copy that clients share, so that one would see what another sent: "
                "let forward write only if self.training."
            )

    def _now(self) -> dict[str, int]:
        """Count the changes of each tensor so far."""
        return {name: tensor._version for name, tensor in self._tensors.items()}


class Replicas:
    """The copies that sessions have in common; each lives as long as one of these."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._held: WeakValueDictionary[str, Replica] = WeakValueDictionary()

    def of(self, name: str, build: Callable[[], Segment]) -> Replica:
        """Return the copy of this name, and build it if there is none."""
        with self._lock:
            found = self._held.get(name)
            if found is None:
                found = self._held[name] = Replica(build())
            return found
